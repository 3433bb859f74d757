# SPDX-License-Identifier: Apache-2.0
"""``dpu-patch info``, ``diff``, ``report`` and ``extract``."""

import json
import shutil

import numpy as np
import onnx
import pytest
import safetensors.numpy

from edge_runtime.formats.weights import fingerprint_file, pack_weights
from packager.cli.pack import pack, patch


@pytest.fixture
def packed(run, monkeypatch, command):
    """A patch from round_00 to round_01, and the two weight files."""
    monkeypatch.setenv("DPU_RUNS", str(run.path.parent))
    command(pack, "round_01", "-q")
    return (
        run.path / "round_01.dpu",
        run.path / "round_00" / "weights.safetensors",
        run.path / "round_01" / "weights.safetensors",
    )


@pytest.fixture
def alone(packed, tmp_path):
    """The patch, far from its run."""
    return shutil.copy(packed[0], tmp_path / "alone.dpu")


# info --------------------------------------------------------------------------------


def test_info_accounts_for_every_byte(alone, command):
    code, out, _ = command(patch, "info", alone, "--json")
    record = json.loads(out)
    assert code == 0
    assert record["bytes"] == sum(record["parts"].values()) == alone.stat().st_size
    assert sum(s["packed_bytes"] for s in record["sections"]) < record["bytes"]
    assert (record["round"], record["changed"], record["tensors_changed"]) == (1, 30, 4)
    assert "tensors" not in record


def test_info_names_the_tensors_where_a_weight_file_gives_them(packed, alone, command):
    record = json.loads(command(patch, "info", alone, "--base", packed[1], "--json")[1])
    changed = {tensor["name"]: tensor["changed"] for tensor in record["tensors"]}
    assert changed == {"fc1.weight": 5, "fc2.weight": 5, "fc1.bias": 16, "fc2.bias": 4}
    assert record["floor"]["total"]["ratio"] > 0
    out = command(patch, "info", alone, "--base", packed[1])[1]
    assert "fc2.weight" in out
    assert record["target"] in out
    assert "times the floor" in out
    assert "LoRa SF12" in out


def test_info_finds_the_weights_in_the_run_that_the_patch_lies_in(run, packed, command):
    record = json.loads(command(patch, "info", packed[0], "--json")[1])
    assert len(record["tensors"]) == 4
    assert record["tensors"][0]["relative_change"] > 0  # it is the parent
    command(pack, "round_00", "-q")
    first = run.path / "round_00.dpu"
    record = json.loads(command(patch, "info", first, "--json")[1])
    assert "relative_change" in record["tensors"][0]  # the regenerated init weights
    shutil.rmtree(run.path / "model")
    record = json.loads(command(patch, "info", first, "--json")[1])
    assert "relative_change" not in record["tensors"][0]


def damage(path, how):
    if how == "gone":
        path.unlink()
    elif how == "cut":
        path.write_bytes(path.read_bytes()[:-9])
    else:
        path.write_bytes(b"mine")


@pytest.mark.parametrize("how", ["gone", "cut", "other"])
@pytest.mark.parametrize(
    "names",
    [
        ["round_00/weights.safetensors"],
        ["round_00/weights.safetensors", "round_01/weights.safetensors"],
        ["model/init.json", "round_00/weights.safetensors"],
        ["round_00/round.json"],
    ],
)
def test_info_tells_of_a_patch_whatever_lies_beside_it(
    run, packed, command, names, how
):
    for name in names:
        damage(run.path / name, how)
    code, out, err = command(patch, "info", packed[0], "--json")
    assert code == 0, err
    assert json.loads(out)["round"] == 1


def test_info_takes_the_weights_of_any_file(packed, alone, command, tmp_path):
    arrays = safetensors.numpy.load_file(packed[1])
    odd = tmp_path / "odd.safetensors"
    safetensors.numpy.save_file(arrays, odd, metadata={"format": "np"})
    record = json.loads(command(patch, "info", alone, "--base", odd, "--json")[1])
    assert "relative_change" in record["tensors"][0]


def test_info_refuses_weights_of_another_network(alone, command, tmp_path):
    other = tmp_path / "other.safetensors"
    other.write_bytes(pack_weights({"w": np.zeros(3, "f4")}).data)
    assert command(patch, "info", alone, "--base", other)[0] == 3


def test_info_refuses_what_is_not_a_patch(packed, command):
    assert command(patch, "info", packed[1])[0] == 3
    assert command(patch, "info", packed[0].with_name("nothing.dpu"))[0] == 2


def test_info_prints_markdown_for_a_pull_request(packed, command):
    out = command(patch, "info", packed[0], "--md")[1]
    assert out.startswith("## Patch round\\_01.dpu\n")
    assert "| part | bytes | share | floor | times the floor |" in out


@pytest.mark.parametrize(
    ("name", "begins"),
    [
        ("x.html", "<!doctype html>"),
        ("x.md", "## Patch"),
        ("x.json", '{\n  "schema": 1'),
        ("x.txt", "Patch round_01.dpu\n  model "),
    ],
)
def test_an_output_is_what_its_name_says(packed, command, tmp_path, name, begins):
    path = tmp_path / "new" / name
    code, out, err = command(patch, "info", packed[0], "-o", path)
    assert (code, out, err) == (0, "", f"wrote {path}\n")
    assert path.read_text().startswith(begins)


@pytest.mark.parametrize("name", ["x.pdf", "x.csv"])
def test_an_output_of_another_name_is_not_written(packed, command, tmp_path, name):
    for words in (("info", packed[0]), ("report", "tiny")):
        code, _, err = command(patch, *words, "-o", tmp_path / name)
        assert (code, "ends with .html, .md, .json, .txt" in err) == (2, True)
    assert not (tmp_path / name).exists()


def test_verify_names_the_weights_that_it_needs(packed, command):
    code, _, err = command(patch, "verify", packed[0], "--base", packed[2])
    parent = fingerprint_file(packed[1])[:12]
    assert (code, f"give the weights {parent}" in err) == (4, True)


# diff --------------------------------------------------------------------------------


def test_diff_counts_tensor_by_tensor(packed, command):
    code, out, _ = command(patch, "diff", packed[1], packed[2], "--json")
    record = json.loads(out)
    assert code == 0
    assert (record["changed"], record["size"]) == (30, 276)
    text = command(patch, "diff", packed[1], packed[2])[1]
    assert text.startswith("30 of 276 values differ (10.87 %)\n")
    assert "fc1.bias" in text
    same = command(patch, "diff", packed[1], packed[1])[1]
    assert same == "0 of 276 values differ (0.00 %)\n"


def test_diff_refuses_weights_of_another_network(packed, command):
    selection = packed[2].with_name("selection.safetensors")
    assert command(patch, "diff", packed[1], selection)[0] == 4


def test_diff_tells_equal_weights_of_two_networks_apart(command, tmp_path):
    for name, operator in (("a", "Relu"), ("b", "Tanh")):
        model = onnx.helper.make_model(
            onnx.parser.parse_graph(
                f"g (float[N, 4] x) => (float[N, 3] y) "
                f"{{ h = MatMul(x, w)  y = {operator}(h) }}"
            ),
            opset_imports=[onnx.helper.make_opsetid("", 17)],
        )
        weights = onnx.numpy_helper.from_array(np.ones((4, 3), "f4"), "w")
        model.graph.initializer.append(weights)
        onnx.save(model, tmp_path / f"{name}.onnx")
    files = tmp_path / "a.onnx", tmp_path / "b.onnx"
    code, out, err = command(patch, "diff", *files)
    assert (code, "operator 1 differs" in err) == (0, True)
    assert out == "0 of 12 values differ (0.00 %), and the networks do\n"
    record = json.loads(command(patch, "diff", *files, "--json")[1])
    assert "operator 1 differs" in record["other_network"]
    same = json.loads(command(patch, "diff", files[0], files[0], "--json")[1])
    assert same["other_network"] is None


def test_diff_draws_a_page(packed, command, tmp_path):
    command(patch, "diff", packed[1], packed[2], "-o", tmp_path / "d.html")
    assert "<svg" in (tmp_path / "d.html").read_text()


# report ------------------------------------------------------------------------------


def test_a_report_of_a_patch_is_a_page_beside_it(packed, command):
    code, out, err = command(patch, "report", packed[0])
    page = packed[0].with_suffix(".html")
    assert (code, out, err) == (0, "", f"wrote {page}\n")
    text = page.read_text()
    assert text.count("<svg") == 3
    assert "fc1.weight" in text


def test_a_report_of_a_run_is_a_page_in_its_folder(run, packed, new_run, command):
    other = new_run("other", seed=9)
    other.add(0)
    for name in ("tiny", str(run.path)):
        code, _, err = command(patch, "report", name, "--beside", "other")
        assert (code, err) == (0, f"wrote {run.path / 'report.html'}\n")
    text = (run.path / "report.html").read_text()
    assert "Run tiny" in text
    assert "Weights that are selected again" in text
    record = json.loads(command(patch, "report", "tiny", "--json")[1])
    assert [entry["round"] for entry in record["rounds"]] == [0, 1]
    assert command(patch, "report", "tiny", "--md")[1].startswith("## Run tiny\n")


def test_the_report_leaves_the_run_packable(run, packed, command):
    command(patch, "report", "tiny")
    assert command(pack, "round_01", "--dry-run")[0] == 0


def test_a_name_that_is_no_run_lists_the_runs(run, packed, command):
    (run.path.parent / "notes.txt").touch()
    code, _, err = command(patch, "report", "tinny")
    assert code == 2
    assert err.endswith("there are: tiny\n")


@pytest.mark.parametrize(
    "arguments", [("tiny", "--base", "weights"), ("patch", "--beside", "tiny")]
)
def test_options_of_the_other_kind_are_usage_errors(packed, command, arguments):
    places = {"weights": packed[1], "patch": packed[0]}
    assert command(patch, "report", *(places.get(a, a) for a in arguments))[0] == 2


# extract -----------------------------------------------------------------------------


def test_extract_writes_the_canonical_file_of_any(packed, command, tmp_path):
    arrays = safetensors.numpy.load_file(packed[1])
    odd = tmp_path / "odd.safetensors"
    safetensors.numpy.save_file(arrays, odd, metadata={"format": "np"})
    code, out, _ = command(patch, "extract", odd, "-o", tmp_path / "slot")
    assert code == 0
    written = tmp_path / "slot" / "weights.safetensors"
    assert written.read_bytes() == packed[1].read_bytes()
    assert out.startswith(fingerprint_file(written))
    record = json.loads(
        command(patch, "extract", packed[1], "-o", tmp_path / "slot", "--json")[1]
    )
    assert (record["canonical"], record["graph"]) == (True, None)


def test_extract_writes_over_nobodys_weights(packed, command, tmp_path):
    mine = tmp_path / "weights.safetensors"
    mine.write_bytes(b"mine")
    code, _, err = command(patch, "extract", packed[1], "-o", tmp_path)
    assert code == 2
    assert "holds something else" in err
    assert mine.read_bytes() == b"mine"


# What is read is not written over -----------------------------------------------------


def test_no_output_replaces_what_a_command_reads(run, packed, command, tmp_path):
    made, base, target = packed
    other = tmp_path / "link.safetensors"
    other.symlink_to(target)
    key, public = tmp_path / "key.pem", tmp_path / "key.pub.pem"
    assert command(patch, "keygen", key)[0] == 0
    ledger, record = run.path / "releases.jsonl", run.path / "round_01" / "round.json"
    kept = *packed, key, public, ledger, record
    before = {path: path.read_bytes() for path in kept}
    for words in (
        (pack, "--base", base, "--target", target, "-o", target),
        (pack, "--base", base, "--target", target, "-o", other),
        (pack, "--base", base, "--target", target, "-o", base),
        (pack, "round_01", "--force", "-o", target),
        (pack, "round_01", "--force", "-o", run.path / "model" / "golden.npz"),
        (pack, "round_01", "--force", "-o", base),
        (pack, "round_01", "--force", "-o", run.path / "releases.jsonl"),
        (pack, "round_01", "--force", "--sign", key, "-o", key),
        (pack, "--base", base, "--target", target, "--sign", key, "-o", key),
        (patch, "report", "tiny", "-o", run.path / "round_01" / "round.json"),
        (patch, "info", made, "-o", run.path / "round_01" / "round.json"),
        (patch, "info", made, "-o", made),
        (patch, "info", made, "--base", base, "-o", base),
        (patch, "diff", base, target, "-o", other),
        (patch, "report", made, "-o", made),
        (patch, "compose", made, "--base", base, "-o", base),
        (patch, "apply", base, made, "--force", "-o", made),
        (patch, "apply", base, made, "--trust", public, "--force", "-o", public),
    ):
        code, _, err = command(*words)
        assert (code, "the result would replace it" in err) == (2, True), words
    assert {path: path.read_bytes() for path in before} == before


def test_a_file_of_another_kind_is_replaced_only_by_force(packed, command, tmp_path):
    made, base, target = packed
    other = tmp_path / "other"
    files = pack, "--base", base, "--target", target, "-o", other
    composed = patch, "compose", made, "--base", base, "-o", other
    for content, kind in ((base.read_bytes(), "a weight file"), (b"notes", "no patch")):
        for words in (files, composed):
            other.write_bytes(content)
            code, _, err = command(*words)
            assert (code, f"{kind}" in err, "--force" in err) == (2, True, True), err
            assert other.read_bytes() == content
            assert command(*words, "--force")[0] == 0
            assert command(*words)[0] == 0  # a patch by a patch
    for words in ("info", made), ("diff", base, target), ("report", made):
        code, _, err = command(patch, *words, "--json", "-o", other)
        assert (code, "is a patch, and a page would replace it" in err) == (2, True)


def test_an_empty_or_damaged_file_may_be_replaced(packed, command, tmp_path):
    made, base, target = packed
    other = tmp_path / "other"
    for content in (b"", made.read_bytes()[:-1], made.read_bytes()[:20]):
        other.write_bytes(content)
        words = "--base", base, "--target", target, "-o", other
        assert command(pack, *words)[0] == 0
        assert other.read_bytes() != content


@pytest.mark.parametrize(
    "words",
    [
        ["info", "PATCH", "-o"],
        ["report", "PATCH", "-o"],
        ["compose", "PATCH", "--base", "BASE", "-o"],
        ["keygen"],
    ],
)
def test_a_name_that_ends_with_a_slash_is_no_files(packed, command, tmp_path, words):
    known = {"PATCH": packed[0], "BASE": packed[1]}
    given = [known.get(word, word) for word in words]
    code, _, err = command(patch, *given, f"{tmp_path}/there/")
    assert (code, "expected the name of a file" in err) == (2, True)
    assert not (tmp_path / "there").exists()
