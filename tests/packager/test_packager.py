# SPDX-License-Identifier: Apache-2.0
import textwrap

import packager
from edge_runtime.formats.patch import open_patch
from packager.rounds.folder import read_round


def test_every_exported_name_is_there():
    assert packager.__all__ == sorted(packager.__all__)
    for name in packager.__all__:
        assert getattr(packager, name).__name__ == name


def test_an_unknown_name_is_an_attribute_error():
    assert not hasattr(packager, "pack_rounds")


def test_the_example_in_the_docstring_runs(run, monkeypatch):
    run.add(5)
    monkeypatch.chdir(run.path.parent.parent)
    example = [
        line for line in packager.__doc__.splitlines() if line.startswith("    ")
    ]
    exec(textwrap.dedent("\n".join(example)), {})
    target = read_round(run.path / "round_05").record.target
    with open_patch("round_05.dpu") as patch:
        assert patch.header.target == target
