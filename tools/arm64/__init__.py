# SPDX-License-Identifier: Apache-2.0
"""The runtime on emulated aarch64."""
