# SPDX-License-Identifier: Apache-2.0
"""Make the golden files of the current format version.

    python -m tests.golden.make           # those that are not there yet
    python -m tests.golden.make FOLDER    # all of them, to compare

Golden files are made once and never again: what a released writer wrote must decode for
ever. A new version has a folder of its own; new cases come last, and in ``SHA256SUMS``
(``sha256sum report_v1.json stores/* v1/*``).
"""

import sys
from pathlib import Path

import numpy as np

from edge_runtime.formats.header import VERSION
from edge_runtime.formats.subspace import Term, round_scale
from edge_runtime.formats.subspace_moves import move_weights
from edge_runtime.formats.weights import pack_weights
from packager.build import header_for, pack_changes
from packager.diff import diff
from packager.keys import generate_key
from packager.signing import date_patch, sign_patch

FOLDER = Path(__file__).parent / f"v{VERSION}"
MODEL = "5a" * 32
SECONDS = 1767225600  # 1 January 2026, when the dated one says that it was signed
OUTPUTS = {"outputs": np.linspace(-3, 4, 20, dtype="<f4").tobytes()}  # expected ones


def rounded(array, bits):
    """Round float32 to fewer mantissa bits."""
    drop = 23 - bits
    raw = array.astype("<f4").view("<u4").astype(np.uint64)
    raw = (raw + (1 << (drop - 1))) >> drop << drop
    return raw.astype("<u4").view("<f4")


def changed(rng, array, density, scale=0.01):
    """Change a share of an array's elements."""
    where = rng.random(array.shape) < density
    if array.dtype.kind == "f":
        new = array + rng.normal(0, scale, array.shape).astype(array.dtype)
    elif array.dtype.kind == "b":
        new = ~array
    else:
        new = array + rng.integers(1, 4, array.shape, dtype=array.dtype)
    return np.where(where, new, array).astype(array.dtype)


def cases():
    """Yield name, base arrays, target arrays, and types that NumPy cannot name."""
    rng = np.random.default_rng(1)

    def normal(*shape):
        return rng.normal(0, 0.1, shape).astype("<f4")

    base = {"fc.weight": normal(40, 60), "fc.bias": normal(40)}
    yield (
        "sparse",
        base,
        {
            "fc.weight": changed(rng, base["fc.weight"], 0.02),
            "fc.bias": changed(rng, base["fc.bias"], 1.0),
        },
        {},
    )
    for bits in (10, 7):
        low = {name: rounded(array, bits) for name, array in base.items()}
        yield (
            f"rounded_{bits}_bits",
            low,
            {
                name: rounded(changed(rng, array, 0.05), bits)
                for name, array in low.items()
            },
            {},
        )
    densities = {f"t{share:03d}": normal(20, 30) for share in (0, 1, 24, 26, 50, 74)}
    densities |= {f"t{share:03d}": normal(20, 30) for share in (76, 99, 100)}
    yield (
        "densities",
        densities,
        {
            name: changed(rng, array, int(name[1:]) / 100)
            for name, array in densities.items()
        },
        {},
    )
    kinds = {
        "f8": rng.normal(size=50),
        "f4": normal(7, 9),
        "f2": normal(8, 8).astype("<f2"),
        "bf16": rng.integers(0, 1 << 16, 60, dtype="<u2"),
        "i8": rng.integers(-9, 9, 30, dtype="<i8"),
        "i1": rng.integers(-99, 99, (6, 6), dtype="i1"),
        "u1": rng.integers(0, 99, 40, dtype="u1"),
        "flags": rng.random(25) < 0.5,
        "scalar": np.array(3.5, "<f4"),
        "empty": np.zeros((0, 3), "<f4"),
    }
    yield (
        "types",
        kinds,
        {name: changed(rng, array, 0.4) for name, array in kinds.items()},
        {"bf16": "BF16"},
    )
    odd = np.array(
        [
            0,
            0x80000000,
            1,
            0x80000001,
            0x7F800000,
            0xFF800000,
            0x7FC00001,
            0xFFFFFFFF,
            0x3F800000,
            0x007FFFFF,
            0x00800000,
            0x7F7FFFFF,
        ],
        "<u4",
    )
    grid = np.repeat(odd, len(odd)), np.tile(odd, len(odd))
    yield "odd_floats", {"w": grid[0].view("<f4")}, {"w": grid[1].view("<f4")}, {}
    yield "nothing", base, base, {}
    inputs = {
        "conv.weight": normal(12, 20, 3, 3),
        "fc.weight": normal(30, 150),
        "half.weight": normal(16, 40).astype("<f2"),
        "scale.weight": normal(9, 1),
        "whole.bias": normal(12),
    }
    dead = {  # in which columns nothing travels
        "conv.weight": rng.random((1, 20, 1, 1)) < 0.5,
        "fc.weight": rng.random((1, 150)) < 0.8,
        "half.weight": rng.random((1, 40)) < 0.6,
    }
    yield (
        "columns",
        inputs,
        {
            name: np.where(
                dead.get(name, False),
                array,
                changed(rng, array, 1.0 if name == "whole.bias" else 0.2),
            )
            for name, array in inputs.items()
        },
        {},
    )
    few = {"fc.weight": normal(8, 5), "fc.bias": normal(8)}
    moved = {name: changed(rng, array, 0.2) for name, array in few.items()}
    yield "outputs", few, moved, {}
    spread = {f"t{share}": normal(40, 60) for share in (1, 3, 40, 97)}
    moved = {name: changed(rng, a, int(name[1:]) / 100) for name, a in spread.items()}
    yield "unary", spread, moved, {}


def subspaces():
    """Return base and target of the subspace case, its types, and its terms.

    Two terms move tensors of each type, and some elements change on top.
    """
    rng = np.random.default_rng(2)

    def coefficients(bits, count):
        return (2 * rng.integers(0, 1 << bits, count) - (1 << bits) + 1).astype("<i2")

    base = {
        "conv.weight": rng.normal(0, 0.1, (13, 7, 3, 3)).astype("<f4"),
        "fc.bias": rng.normal(0, 0.1, 40).astype("<f4"),
        "fc.weight": rng.normal(0, 0.1, (40, 60)).astype("<f4"),
        "half.weight": rng.normal(0, 0.1, (16, 40)).astype("<f2"),
        "steps": np.arange(5, dtype="<i4"),
        "wide.weight": rng.normal(0, 0.1, 300).astype("<f4").view("<u4") >> 16,
    }
    base["wide.weight"] = base["wide.weight"].astype("<u2")
    # Kept where taps cancel: a zero of each sign, denormal floats. And far away.
    odd = np.array([0, 0x80000000, 1, 0x807FFFFF, 0x7F000000, 0x00800000], "<u4")
    base["fc.weight"].reshape(-1)[:96] = np.repeat(odd, 16).view("<f4")
    types = {"wide.weight": "BF16"}
    scales = {0: 0.01, 2: 0.03, 4: 0.02, 5: 0.05}
    scales = {number: round_scale(scale) for number, scale in scales.items()}
    terms = [
        Term(2**40 + 7, 1, 2, scales, coefficients(1, 192)),
        Term(0, 5, 3, {0: 2.0**-100, 2: scales[0]}, coefficients(5, 64)),
        Term(9, 8, 1, {5: scales[0] / 64}, coefficients(8, 128)),
    ]
    moved = move_weights(pack_weights(base, types), terms)
    target = {name: np.array(array) for name, array in moved.items()}
    target["conv.weight"] = changed(rng, target["conv.weight"], 0.02)
    target["fc.bias"] = changed(rng, target["fc.bias"], 1.0)
    return base, target, types, terms


def int8_subspaces():
    """Return what :func:`subspaces` does, of int8 weights.

    Moves by halves, which end at the even one, and beyond both ends.
    """
    rng = np.random.default_rng(3)

    def coefficients(bits, count):
        return (2 * rng.integers(0, 1 << bits, count) - (1 << bits) + 1).astype("<i2")

    base = {
        "bias": rng.normal(0, 0.1, 20).astype("<f4"),
        "conv.weight": rng.integers(-127, 128, (13, 7, 3, 3)).astype("<i1"),
        "ends.weight": rng.integers(-128, 128, 300).astype("<i1"),
        "fc.weight": rng.integers(-20, 21, (40, 60)).astype("<i1"),
    }
    base["fc.weight"].reshape(-1)[:64] = -128  # on no grid, and kept where taps cancel
    terms = [
        Term(2**40 + 9, 1, 2, {1: 2.5, 3: 0.25}, coefficients(1, 192)),
        Term(
            4, 5, 3, {0: round_scale(0.01), 3: round_scale(0.07)}, coefficients(5, 64)
        ),
        Term(5, 1, 1, {2: 2.0**100}, coefficients(1, 128)),
    ]
    moved = move_weights(pack_weights(base), terms)
    target = {name: np.array(array) for name, array in moved.items()}
    target["fc.weight"][3, 5:9] += 1
    return base, target, {}, terms


def main(folder):
    """Write every case that is not in the folder."""
    folder.mkdir(exist_ok=True)
    every = [
        *((*case, ()) for case in cases()),
        ("subspaces", *subspaces()),
        ("subspaces_int8", *int8_subspaces()),
    ]
    for number, (name, base, target, types, terms) in enumerate(every):
        if (folder / f"{name}.dpu").exists():
            continue
        old, new = pack_weights(base, types), pack_weights(target, types)
        header = header_for(old, new, model=MODEL, round_=number, counter=number)
        changes = diff(move_weights(old, terms), new)
        outputs = OUTPUTS.get(name, b"")
        patch = pack_changes(
            old, new, header, changes, outputs=outputs, terms=terms
        ).data
        for suffix, data in (
            (".base", old.data),
            (".target", new.data),
            (".dpu", patch),
        ):
            (folder / f"{name}{suffix}").write_bytes(data)
        if name == "sparse":
            signed = sign_patch(sign_patch(patch, generate_key()), generate_key())
            (folder / "signed_twice.dpu").write_bytes(signed)
    if not (folder / "dated.dpu").exists():
        dated = date_patch((folder / "sparse.dpu").read_bytes(), SECONDS)
        (folder / "dated.dpu").write_bytes(dated)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
