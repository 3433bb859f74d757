# SPDX-License-Identifier: Apache-2.0
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from edge_runtime.errors import RoundError
from edge_runtime.formats.weights import write_weights
from tools.bench import contest
from tools.bench.contest import Contest, Entry, Sample, chosen_tools, compete, hold_bars
from tools.bench.contest_report import markdown, replace_section, svg
from tools.bench.measure import measure_here
from tools.bench.rivals import TOOLS, Kind, Tool
from tools.bench.rounds import JOBS, Pair, find_pairs

ALWAYS = {"ours", "full-zstd-3", "full-zstd-19", "sparse", "xor"}
INSTALLED = [key for key, tool in TOOLS.items() if not tool.missing()]
ROOT = Path(__file__).resolve().parents[3]


def write_pair(folder):
    rng = np.random.default_rng(3)
    base = {"w": rng.normal(size=(300, 70)).astype("f4"), "b": np.ones(7, "f2")}
    target = {name: array.copy() for name, array in base.items()}
    target["w"].reshape(-1)[rng.choice(21_000, 400, replace=False)] = 0.5
    target["b"][3] = -0.0  # 14 bytes: the file is no multiple of four
    folder.mkdir()
    write_weights(base, folder / "base.safetensors")
    write_weights(target, folder / "target.safetensors")
    return folder


@pytest.fixture
def pair(tmp_path):
    folder = write_pair(tmp_path / "tiny")
    return next(find_pairs(folder, tmp_path))


def test_what_comes_with_the_project_is_always_installed():
    assert set(INSTALLED) >= ALWAYS


@pytest.mark.parametrize("key", INSTALLED)
def test_an_installed_tool_leads_to_the_target(key, pair, tmp_path):
    patch, result = tmp_path / "patch", tmp_path / "result"
    made = measure_here(TOOLS[key], "make", pair.base, patch, pair.target)
    applied = measure_here(TOOLS[key], "apply", pair.base, patch, result)
    assert result.read_bytes() == pair.target.read_bytes()
    expected = subprocess.check_output(["sha256sum", pair.target], text=True)
    assert applied["sha256"] == expected.split()[0]
    assert made["work_s"] > 0
    assert applied["peak_bytes"] >= applied["before_peak_bytes"] > 0


def test_a_pair_counts_changes_as_bits(pair):
    assert pair.changed == 401  # -0.0 instead of 1.0 among them
    assert pair.file_size == pair.target.stat().st_size


def test_tools_compete_in_processes_of_their_own(pair):
    result = compete(pair, chosen_tools(["sparse"]), 2, lambda _text: None)
    assert [entry.key for entry in result.entries] == ["ours", "sparse"]
    for entry in result.entries:
        assert entry.problem == ""
        assert entry.made == entry.applied == 2
        assert 0 < entry.size < pair.file_size
        assert entry.apply.startup_s > 0


def test_what_is_not_installed_is_reported_as_absent_by_name(pair):
    ghost = Tool(
        "ghost", "Ghost 1", Kind.DELTA, TOOLS["xor"].make, TOOLS["xor"].apply,
        "pip install ghost", ("no_such_module_1",), ("no-such-program-1",),
    )  # fmt: skip
    said = []
    result = compete(pair, [ghost], 1, said.append)
    problem = "absent: no_such_module_1, no-such-program-1 (pip install ghost)"
    assert result.entries[0].problem == problem
    assert f"  Ghost 1: {problem}" in said


def test_a_tool_that_fails_is_reported_and_the_others_go_on(tmp_path):
    base, target = tmp_path / "base", tmp_path / "target"
    base.write_bytes(b"not a weight file" * 9)
    target.write_bytes(b"not a weight filE" * 9)
    pair = Pair("broken", base, target, 153, 1)
    result = compete(pair, chosen_tools(["sparse"]), 1, lambda _text: None)
    ours, sparse = result.entries
    assert ours.problem.startswith("failed to make: edge_runtime.errors.WeightsError")
    assert sparse.problem == ""
    assert not any(bar.holds for bar in hold_bars([result]))


def test_a_tool_that_gives_another_target_is_reported(pair, monkeypatch):
    measure = contest._measure_apart

    def wrong(*arguments):
        record, whole_s = measure(*arguments)
        return record | {"sha256": "00" * 32}, whole_s

    monkeypatch.setattr(contest, "_measure_apart", wrong)
    result = compete(pair, chosen_tools(["sparse"]), 1, lambda _text: None)
    assert {e.problem for e in result.entries} == {"failed: it gave another target"}


def made_up(pair, **sizes_and_times):
    entries = []
    for key, (size, apply_s) in sizes_and_times.items():
        sample = Sample(apply_s, apply_s, 0.1, 2 << 20, 1 << 20)
        kind = Kind(key.partition("_")[0])
        entries.append(
            Entry(key, f"<{key}>", kind, size, sample, sample, apply_s, 1, 1)
        )
    return Contest(pair, tuple(entries))


def test_bars_compare_with_the_best_of_the_others(pair):
    result = made_up(
        pair, ours=(90, 2.0), delta_a=(100, 3.0), delta_b=(91, 9.0), naive=(200, 1.0)
    )
    smaller, faster, naive = hold_bars([result])
    assert smaller.holds and "91 B of <delta_b>" in smaller.text
    assert faster.holds and "3000.0 ms of <delta_a>" in faster.text
    assert not naive.holds


def test_equal_is_not_smaller(pair):
    smaller, *_ = hold_bars([made_up(pair, ours=(90, 2.0), full=(90, 1.0))])
    assert not smaller.holds


@pytest.mark.parametrize(("size", "holds"), [(89, True), (90, False)])
def test_rounds_of_dpu_have_to_be_a_tenth_smaller(pair, size, holds):
    dpu = replace(pair, method="dpu")
    result = made_up(dpu, ours=(size, 2.0), delta=(100, 3.0), naive=(95, 3.0))
    assert {bar.bar: bar.holds for bar in hold_bars([result])}[
        "a tenth smaller"
    ] is holds


def test_a_bar_does_not_hold_where_nobody_can_be_beaten(pair):
    assert not any(bar.holds for bar in hold_bars([made_up(pair, ours=(90, 2.0))]))


def test_plot_and_table_show_every_tool(pair):
    result = made_up(pair, ours=(90, 2.0), delta_a=(100, 3.0), full=(9000, 1.0))
    absent = Entry("gone", "Gone", Kind.DELTA, problem="absent: gone (pip install it)")
    result = replace(result, entries=(*result.entries, absent))
    picture = svg([result, result])
    ElementTree.fromstring(picture)  # well formed, although titles hold < and >
    text = markdown([result], list(hold_bars([result])), {"cores": 2}, "python")
    for title in ("ours", "delta_a", "full", "Gone"):
        assert title in picture
        assert title in text
    assert "absent: gone (pip install it)" in text
    assert "100.000" in text  # full weights, times ours


def test_a_new_section_replaces_only_the_old_one():
    old = "# Results\n\n## A\n\nkeep\n\n## Patches\n\nold\n\n## B\n\nkeep too\n"
    new = replace_section(old, "## Patches\n\nnew\n")
    assert new == "# Results\n\n## A\n\nkeep\n\n## Patches\n\nnew\n\n## B\n\nkeep too\n"
    assert replace_section(new, "## Patches\n\nnew\n") == new
    first = replace_section("# Results\n", "## Patches\n\nnew\n")
    assert first == "# Results\n\n## Patches\n\nnew\n"


def test_a_run_stands_for_its_last_update_of_an_earlier_round(run, tmp_path):
    run.add(2)
    [pair] = find_pairs(run.path, tmp_path)
    assert pair.name == f"{run.path.name}/round_02"
    earlier = run.path / "round_01" / "weights.safetensors"
    assert pair.base.read_bytes() == earlier.read_bytes()
    assert [p.name for p in find_pairs(run.path.parent, tmp_path)] == [pair.name]


def test_a_run_with_one_update_stands_for_that_of_its_init_weights(new_run, tmp_path):
    run = new_run()
    run.add(0)
    run.add(1, {name: array.copy() for name, array in run.deployed.items()})
    [pair] = find_pairs(run.path, tmp_path)
    assert pair.name == "tiny/round_00"
    assert pair.base.read_bytes() == bytes(run.init.data)


def test_a_folder_without_rounds_is_refused(tmp_path):
    with pytest.raises(RoundError, match="neither a round, a run"):
        list(find_pairs(tmp_path, tmp_path))


def test_a_run_stands_for_all_its_updates_where_every_one_is_asked_for(run, tmp_path):
    run.add(2)
    pairs = list(find_pairs(run.path, tmp_path, every=True))
    assert [pair.name.partition("/")[2] for pair in pairs] == [
        "round_00",
        "round_01",
        "round_02",
    ]
    for pair in pairs:
        base, target = pair.read()
        assert base.fingerprint != target.fingerprint


@pytest.mark.parametrize("job", JOBS.values(), ids=JOBS)
def test_every_job_is_a_valid_recipe(job):
    from trainer.config import load_config

    path = ROOT / "trainer" / "recipes" / f"{job.recipe}.toml"
    assert load_config(path, job.overrides, name=job.name).run.name == job.name


def test_check_ends_with_1_exactly_where_a_bar_is_missed(tmp_path):
    folder = write_pair(tmp_path / "tiny")
    command = [sys.executable, "-m", "tools.bench.patch", "--json", "--check"]
    command += ["--tools", "sparse,xor", "--repeats", "1", "--rounds", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    record = json.loads(done.stdout)
    assert [tool["key"] for tool in record["rounds"][0]["tools"]] == [
        "ours",
        "sparse",
        "xor",
    ]
    missed = [bar for bar in record["bars"] if not bar["holds"]]
    assert done.returncode == (1 if missed else 0)
    for bar in missed:
        assert f"missed: {bar['bar']}" in done.stderr
