"""The command line ``dpu-edge``."""
