"""The command lines ``dpu-pack`` and ``dpu-patch``."""
