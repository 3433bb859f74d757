"""The runtime on emulated aarch64."""
