# SPDX-License-Identifier: Apache-2.0
"""What a released version wrote decodes for ever, by two independent decoders."""

import hashlib
from pathlib import Path

import pytest

from edge_runtime.errors import PatchIntegrityError
from edge_runtime.formats.apply import apply_patch
from edge_runtime.formats.header import VERSION
from edge_runtime.formats.patch import open_patch
from edge_runtime.formats.weights import read_weights
from tests.golden import independent
from tests.golden.make import OUTPUTS, SECONDS

GOLDEN = Path(__file__).parent
PATCHES = sorted(GOLDEN.glob("v*/*.dpu"))


def weights_beside(path):
    """The base and target of a golden patch, as bytes."""
    name = "sparse" if path.stem in ("signed_twice", "dated") else path.stem
    return [path.with_name(name + end).read_bytes() for end in (".base", ".target")]


def names(path):
    return f"{path.parent.name}/{path.stem}"


def test_every_golden_file_is_there_and_unchanged():
    lines = (GOLDEN / "SHA256SUMS").read_text().splitlines()
    expected = {name: digest for digest, name in map(str.split, lines)}
    files = [path for path in GOLDEN.rglob("*.*") if not path.suffix.startswith(".py")]
    found = {
        str(path.relative_to(GOLDEN)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }
    assert found == expected


def test_every_version_has_golden_files():
    assert {path.parent.name for path in PATCHES} == {
        f"v{number}" for number in range(1, VERSION + 1)
    }


@pytest.mark.parametrize("path", PATCHES, ids=names)
def test_a_golden_patch_leads_to_its_target(path):
    base, target = weights_beside(path)
    with open_patch(path) as patch:
        assert bytes(apply_patch(read_weights(base), patch).data) == target


def test_only_one_golden_patch_says_when_it_was_signed():
    for path in PATCHES:
        with open_patch(path) as patch:
            expected = SECONDS if path.stem == "dated" else None
            assert patch.header.signed_at == expected, path


def test_only_one_golden_patch_expects_outputs():
    for path in PATCHES:
        with open_patch(path) as patch:
            assert patch.outputs == OUTPUTS.get(path.stem, b""), path


@pytest.mark.parametrize("path", PATCHES, ids=names)
def test_the_independent_decoder_agrees(path):
    base, target = weights_beside(path)
    assert independent.apply(base, path.read_bytes()) == target


@pytest.mark.parametrize("path", PATCHES, ids=names)
def test_both_decoders_refuse_a_damaged_golden_patch(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    with pytest.raises(ValueError, match=r"."):
        independent.apply(weights_beside(path)[0], bytes(data))
    with pytest.raises(PatchIntegrityError):
        open_patch(bytes(data))
