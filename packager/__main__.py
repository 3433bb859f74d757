"""``python -m packager`` is ``dpu-pack``."""

from packager.cli import pack

pack(prog_name="dpu-pack")
