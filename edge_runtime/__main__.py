"""``python -m edge_runtime`` is ``dpu-edge``."""

from edge_runtime.cli import main

main(prog_name="dpu-edge")
