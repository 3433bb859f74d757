# SPDX-License-Identifier: Apache-2.0
"""Import torchvision, also where its compiled operators do not fit the installed torch.

PyPI's Linux wheels of torchvision are built for CUDA. Beside a CPU-only torch their
operator library does not load, and the import of torchvision ends with ``operator
torchvision::nms does not exist``: its Python code registers shapes for ``nms`` and
``qnms`` and needs them defined. Data sets, transforms and classifiers never call them,
so two definitions without an implementation are enough. Where the real operators load,
nothing is defined here.

This is the only module that imports torchvision; the others take it from here, and so
may your own modules, on any mixture of the two packages::

    from trainer.data.vision import torchvision
"""

import importlib
import importlib.util
from pathlib import Path
from types import ModuleType

import torch

_NMS = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


def _real_operators_load(package: Path) -> bool:
    """Try what torchvision itself is going to try: load its operator library."""
    try:
        for library in package.glob("_C*.so"):
            torch.ops.load_library(library)  # type: ignore[no-untyped-call]
    except OSError:
        return False
    return hasattr(torch.ops.torchvision, "nms")


def _import_torchvision() -> tuple[ModuleType, torch.library.Library | None]:
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("no torchvision", name="torchvision")
    definitions = None
    if not _real_operators_load(Path(spec.origin).parent):
        definitions = torch.library.Library(  # type: ignore[no-untyped-call]
            "torchvision", "DEF"
        )
        for name in ("nms", "qnms"):
            definitions.define(name + _NMS)  # type: ignore[no-untyped-call]
    return importlib.import_module("torchvision"), definitions


# The definitions live only as long as the library object does, so it is kept.
torchvision, _definitions = _import_torchvision()
