# SPDX-License-Identifier: Apache-2.0
"""From round folders to patch files, each proved before it gets its name.

May import ``edge_runtime``, ``onnx`` to check a graph, and torch where a PyTorch state
dict is given. How a round folder looks is in ``docs/round-folder.md``.

    from packager import find_round, pack_round, read_round, write_file

    round_05 = read_round(find_round("round_05", runs="runs"))
    packed = pack_round(round_05, max_size=200_000)
    if packed is not None:                       # None: there is nothing to send
        write_file(packed.data, "round_05.dpu")

For new devices: :func:`write_bundle`. To sign either: :func:`sign_patch`,
:func:`sign_bundle`. Several patches in one: :func:`compose_patches`. From ONNX files or
checkpoints, without rounds: :func:`read_model`, then :func:`pack_models` or
:func:`adopt_model`; between any two weight files: :func:`build_patch`. Which elements
differ: :func:`packager.diff.diff`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from packager.build import PackedPatch, build_patch, pack_round, write_file
    from packager.bundles.from_model import adopt_model
    from packager.bundles.from_round import PackedBundle, build_bundle, write_bundle
    from packager.compose import compose_patches
    from packager.keys import generate_key, load_private
    from packager.models.read import Model, pack_models, read_model
    from packager.rounds.folder import Parent, RoundFolder, find_parent, read_round
    from packager.rounds.names import find_round
    from packager.signing import sign_bundle, sign_patch

__all__ = [
    "Model",
    "PackedBundle",
    "PackedPatch",
    "Parent",
    "RoundFolder",
    "adopt_model",
    "build_bundle",
    "build_patch",
    "compose_patches",
    "find_parent",
    "find_round",
    "generate_key",
    "load_private",
    "pack_models",
    "pack_round",
    "read_model",
    "read_round",
    "sign_bundle",
    "sign_patch",
    "write_bundle",
    "write_file",
]

# Those that import onnx come last.
_MODULES = (
    *("rounds.folder", "rounds.names", "build", "compose", "models.read"),
    *("keys", "signing", "bundles.from_round", "bundles.from_model"),
)


def __getattr__(name: str) -> Any:
    # Late, so that ``dpu-pack --help`` imports neither NumPy nor onnx.
    if name in __all__:
        for module in _MODULES:
            found = getattr(import_module(f"packager.{module}"), name, None)
            if found is not None:
                return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
