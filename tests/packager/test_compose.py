# SPDX-License-Identifier: Apache-2.0
import json
from itertools import pairwise

import pytest

from edge_runtime.errors import WrongModelError, WrongParentError
from edge_runtime.formats.apply import apply_patch
from edge_runtime.formats.patch import open_patch
from packager.build import pack_round
from packager.cli.pack import patch
from packager.compose import compose_patches
from packager.rounds.folder import parent_from, read_round


@pytest.fixture
def chain(run):
    """Four rounds in memory, and the patches between them, by the name of the round."""
    run.add(2)
    run.add(3, base=run.init)  # re-initialised, as training does now and then
    rounds = [read_round(run.path / f"round_{n:02d}") for n in range(4)]
    data = {
        after.name: pack_round(after, parent_from(before)).data
        for before, after in pairwise(rounds)
    }
    for path, patch_data in zip("abc", data.values(), strict=True):
        run.path.joinpath(f"{path}.dpu").write_bytes(patch_data)
    return rounds, {name: open_patch(patch_data) for name, patch_data in data.items()}


@pytest.fixture
def files(chain, run):
    """The same as files: ``a.dpu``, ``b.dpu``, ``c.dpu`` and the base."""
    paths = [run.path / f"{name}.dpu" for name in "abc"]
    return paths, chain[0][0].path / "weights.safetensors"


def test_one_patch_does_what_the_patches_do_in_order(chain):
    rounds, patches = chain
    packed = compose_patches(rounds[0].weights, list(patches.items()))
    with open_patch(packed.data) as opened:
        result = apply_patch(rounds[0].weights, opened)
        assert result.data == rounds[3].weights.data
        assert (opened.header.round, opened.header.counter) == (3, 3)
        assert opened.header.parent == rounds[0].weights.fingerprint
        assert opened.signatures == ()
    assert len(packed.data) < sum(opened.size for opened in patches.values())


def test_a_single_patch_composes_to_itself(chain, files):
    rounds, patches = chain
    packed = compose_patches(rounds[0].weights, [("a", patches["round_01"])])
    assert packed.data == files[0][0].read_bytes()


def test_patches_in_another_order_are_refused_with_the_right_one(chain):
    rounds, patches = chain
    named = list(patches.items())
    shuffled = [named[0], named[2], named[1]]
    with pytest.raises(WrongParentError, match="round_03 leads from weights") as err:
        compose_patches(rounds[0].weights, shuffled)
    assert "give them in this order: round_01 round_02 round_03" in str(err.value)
    assert err.value.expected == rounds[2].weights.fingerprint
    assert err.value.actual == rounds[1].weights.fingerprint


def test_a_missing_patch_is_said_to_be_missing(chain):
    rounds, patches = chain
    with pytest.raises(WrongParentError, match="nothing leads on from there"):
        compose_patches(
            rounds[0].weights,
            [("a", patches["round_01"]), ("c", patches["round_03"])],
        )


def test_another_base_is_refused(chain):
    rounds, patches = chain
    with pytest.raises(WrongParentError, match="but the base is"):
        compose_patches(rounds[1].weights, list(patches.items()))


def test_patches_of_two_networks_do_not_compose(chain, new_run, reload_graph):
    rounds, patches = chain
    other = new_run("other")
    other.graph = reload_graph(other, lambda m: setattr(m.graph, "name", "other"))
    other.add(0)
    strange = open_patch(pack_round(read_round(other.path / "round_00")).data)
    with pytest.raises(WrongModelError, match="two networks"):
        compose_patches(rounds[0].weights, [("a", patches["round_01"]), ("b", strange)])


def test_there_and_back_is_nothing_to_send(chain, command, files):
    rounds, patches = chain
    back = pack_round(rounds[0], parent_from(rounds[1]), counter=5)
    named = [("a", patches["round_01"]), ("back", open_patch(back.data))]
    assert compose_patches(rounds[0].weights, named) is None


def test_the_command_writes_one_file_and_says_what_it_saves(command, files, tmp_path):
    paths, base = files
    out = tmp_path / "out" / "abc.dpu"
    code, text, err = command(patch, "compose", *paths, "--base", base, "-o", out)
    assert (code, err) == (0, f"wrote {out}\n")
    assert text.startswith("3 patches  ")
    assert "of the sum (lower is better)" in text
    record = json.loads(
        command(patch, "compose", *paths, "--base", base, "-o", out, "--json")[1]
    )
    assert record["bytes"] == out.stat().st_size
    assert record["sum_bytes"] == sum(path.stat().st_size for path in paths)
    assert record["written"] is True
    assert command(patch, "verify", out, "--base", base)[0] == 0


def test_the_command_names_the_files_that_do_not_chain(command, files, tmp_path):
    (a, b, c), base = files
    out = tmp_path / "out.dpu"
    code, _, err = command(patch, "compose", b, a, c, "--base", base, "-o", out)
    assert code == 4
    assert f"give them in this order: {a} {b} {c}" in err
    assert not out.exists()


def test_the_command_names_the_file_that_is_no_patch(command, files, tmp_path):
    (good, *_), base = files
    bad = tmp_path / "bad.dpu"
    bad.write_bytes(b"PK")
    out = tmp_path / "x.dpu"
    code, _, err = command(patch, "compose", good, bad, "--base", base, "-o", out)
    assert (code, f"{bad}: not a patch: it begins with b'PK'" in err) == (3, True)


def test_the_command_writes_nothing_where_nothing_is_to_send(
    chain, command, files, tmp_path
):
    rounds, _ = chain
    (a, *_), base = files
    back = tmp_path / "back.dpu"
    back.write_bytes(pack_round(rounds[0], parent_from(rounds[1]), counter=9).data)
    out = tmp_path / "out.dpu"
    code, text, _ = command(patch, "compose", a, back, "--base", base, "-o", out)
    assert code == 0
    assert "nothing to send" in text
    assert not out.exists()
