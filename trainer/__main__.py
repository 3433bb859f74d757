"""``python -m trainer`` is ``dpu-train``."""

from trainer.cli import main

main(prog_name="dpu-train")
