# SPDX-License-Identifier: Apache-2.0
"""What README and the pages of docs/ show works as it stands there.

A block of ``sh`` is run: all of a page in order, in a folder of its own with a
trained run in it. A block that cannot run says why: ``sh no-run: REASON``. What a page
takes for granted it shows too: nothing is run that a reader does not see. A command
that ends with another code than 0 says so: ``# ... (exit 5)``.
"""

import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from dataclasses import asdict
from importlib.metadata import entry_points
from pathlib import Path

import click
import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

import edge_runtime.cli.main
import packager.cli.fleet
import packager.cli.pack
import trainer.cli
from edge_runtime import Device, fingerprint_file
from edge_runtime.exit_codes import EXIT_CODE_HELP
from edge_runtime.limits import Limits
from edge_runtime.store.slots import MAX_CHANGES
from packager.build import pack_round
from packager.bundles.from_round import build_bundle
from packager.rounds.folder import read_round
from tools.layers import FLOORS

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
# Those that are included in the site stand elsewhere.
PAGES = sorted(
    {
        *(ROOT / "docs").rglob("*.md"),
        *ROOT.glob("*.md"),
        *ROOT.glob("*/README.md"),
        *(ROOT / "edge_runtime").glob("*.md"),
        ROOT / "tools" / "RESULTS.md",
    }
)
TEXTS = {str(path.relative_to(ROOT)): path.read_text() for path in PAGES}
COMMANDS = {
    "dpu-edge": edge_runtime.cli.main.main,
    "dpu-pack": packager.cli.pack.pack,
    "dpu-patch": packager.cli.pack.patch,
    "dpu-fleet": packager.cli.fleet.fleet,
    "dpu-train": trainer.cli.main,
}
OURS = re.compile(r"(?:sudo (?:-u \S+ )?)?(?:[\w./]*/)?(dpu-\w+ .*)")
FENCE = re.compile(r"^```([^\n`]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(text, language):
    return [body for info, body in FENCE.findall(text) if info == language]


def script(text):
    """The commands of a page, as one script."""
    lines = "".join(blocks(text, "sh")).splitlines()
    for at, line in enumerate(lines):
        if refused := re.search(r"\(exit (\d+)\)$", line):
            lines[at] = f"expect {refused[1]} {line}"
    expect = 'expect() { code=$1; shift; "$@" && got=0 || got=$?; [ $got = $code ]; }'
    return "\n".join(["set -euo pipefail", expect, *lines])


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """What the tour begins with, and files of the kinds that pages speak of."""
    world = tmp_path_factory.mktemp("world")
    start("dpu-train run digits --quiet", world)
    random = np.random.default_rng(0)
    picture = random.integers(0, 255, (20, 30), dtype=np.uint8)
    (world / "folder").mkdir()
    (world / "patches").mkdir()
    for name in ("photo.jpg", "other.png", "folder/one.png", "folder/two.png"):
        Image.fromarray(picture).save(world / name)
    samples = np.load(world / "runs/digits/model/golden.npz")["inputs"][:3]
    np.save(world / "samples.npy", samples)
    weight = random.normal(size=(4, 3)).astype(np.float32)
    for name in ("old", "new", "newer"):
        weight.flat[len(name)] += 1
        onnx.save(plain_model(weight), world / f"{name}.onnx")
    for path in (ROOT / "examples").glob("own_model.*"):
        shutil.copy(path, world)
    return world


def plain_model(weight):
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Gemm", ["x", "w"], ["y"])],
        "plain",
        [value("x", TensorProto.FLOAT, ["batch", 4])],
        [value("y", TensorProto.FLOAT, ["batch", 3])],
        [numpy_helper.from_array(weight, "w")],
    )
    opset = [helper.make_opsetid("", 17)]
    return helper.make_model(graph, opset_imports=opset, ir_version=9)


def start(commands, folder):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("DPU_")}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    done = subprocess.run(
        ["bash", "-c", commands],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, commands + "\n" + done.stdout + done.stderr


@pytest.mark.parametrize(
    "page", [page for page, text in TEXTS.items() if blocks(text, "sh")]
)
def test_the_commands_of_a_page_run_in_its_order(page, trained, tmp_path):
    world = tmp_path / "world"
    shutil.copytree(trained, world)
    start(script(TEXTS[page]), world)


@pytest.mark.parametrize("page", TEXTS)
def test_every_block_says_what_it_is_and_why_it_is_not_run(page):
    for info, body in FENCE.findall(TEXTS[page]):
        language, _, rest = info.partition(" ")
        assert language, f"a block without a language: {body[:60]!r}"
        if language == "sh" and rest:
            assert re.fullmatch(r"no-run: \S.{5,}", rest), info


def shown(text):
    """Every line that a page has in blocks of commands."""
    for info, body in FENCE.findall(text):
        if info.startswith("sh"):
            yield from body.splitlines()


def our_commands(text):
    """Of those the ones that start a command of ours, without what stands before."""
    yield from (found[1] for found in map(OURS.match, shown(text)) if found)


def units(text):
    """User, store, half and folder of every unit that a page has somebody write."""
    written = r"dpu-edge (.*) (?:\| sudo tee|>) (?:\S*/)?(\S+)\.service"
    start = r"^User=(\S+)$.* --store (\S+) (agent|sync \S+) (\S+)"
    for line in our_commands(text):
        if found := re.fullmatch(written, line):
            runner = CliRunner(catch_exceptions=False)
            unit = runner.invoke(COMMANDS["dpu-edge"], shlex.split(found[1])).stdout
            assert f"systemctl edit {found[2].rstrip('@')}" in unit, line
            yield re.search(start, unit, re.M | re.S).groups()


def test_the_units_of_a_page_share_one_folder():
    pages = {page: set(units(text)) for page, text in TEXTS.items()}
    both = {page for page, found in pages.items() if len({u[2] for u in found}) == 2}
    assert both
    for page in both:
        assert len({folder for *_, folder in pages[page]}) == 1, page
        for user, store, _, folder in pages[page]:
            assert f"useradd --system {user}\n" in TEXTS[page]
            # No user reads what lies in the home of another.
            assert not [path for path in (store, folder) if path.startswith("/home")]


@pytest.mark.parametrize(
    "line", sorted({line for text in TEXTS.values() for line in our_commands(text)})
)
def test_every_command_that_is_shown_exists(line):
    words = shlex.split(line, comments=True)
    command = COMMANDS[words[0]]
    known = {option for p in command.params for option in p.opts}
    while isinstance(command, click.Group):
        word = next(w for w in words[1:] if w in command.commands)
        command = command.commands[word]
    ends = [at for at, word in enumerate(words) if word in (">", "|")]
    words = words[: min(ends, default=len(words))]
    known |= {option for p in command.params for option in p.opts}
    assert {word for word in words if word.startswith("--")} <= known


@pytest.mark.parametrize("page", TEXTS)
def test_every_command_that_is_shown_is_given_what_it_needs(page):
    lines, exported = our_commands(TEXTS[page]), set()
    for line in shown(TEXTS[page]):
        exported |= set(re.findall(r"^export (\w+)=", line))
        if OURS.match(line):
            words = shlex.split(next(lines), comments=True)
            given = set(words)
            for option in needed(words):
                options = {*option.opts, *(["--name"] if "service" in words else [])}
                assert option.envvar in exported or given & options, line


def needed(words):
    """The options that a command does not work without; a device's store is one."""
    command = COMMANDS[words[0]]
    while isinstance(command, click.Group):
        inner = [word for word in words[1:] if word in command.commands]
        if not inner:  # dpu-edge --version
            return []
        command = command.commands[inner[0]]
    options = [p for p in command.params if isinstance(p, click.Option)]
    return [option for option in options if option.required or option.name == "store"]


def test_no_text_installs_this_project_by_its_name_from_an_index():
    sources = {
        str(path.relative_to(ROOT)): path.read_text()
        for folder in ("docs", "edge_runtime", "packager", "trainer", "tools", "tests")
        for path in (ROOT / folder).rglob("*.py")
    }
    by_name = re.compile(r"""pip3? install\b(.*?)['" ]dpu[-_]edge(?=[\['"`\s]|$)""")
    for name, text in (TEXTS | sources).items():
        for line in text.splitlines():
            found = by_name.search(line)
            asks_an_index = found and "--no-index" not in found[1]
            assert not asks_an_index or "finds nothing" in line, (name, line)


def test_crash_md_names_every_limit():
    units = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "MB": 10**6}
    named = {
        name: int(number.replace(",", "")) * units.get(unit, 1)
        for number, unit, name in re.findall(
            r"(\d[\d,]*) ([\w ]+?) \(`([a-z_]+)`\)", TEXTS["edge_runtime/CRASH.md"]
        )
    }
    assert named == asdict(Limits())


@pytest.mark.parametrize(
    "page", ["edge_runtime/CRASH.md", "docs/device.md", "docs/subspace.md"]
)
def test_pages_that_promise_ways_back_say_where_there_are_none(page):
    assert f"more than {MAX_CHANGES:,} elements" in TEXTS[page]


def test_these_commands_are_installed_and_no_others():
    scripts = {script.name for script in entry_points(group="console_scripts")}
    assert {name for name in scripts if name.startswith("dpu-")} == set(COMMANDS)


def test_the_exit_codes_are_those_of_the_commands():
    row = re.compile(r"^\| (\d+) \| ([^|]*) \| ([^|]*)\|$", re.M)
    table = row.findall(TEXTS["docs/exit-codes.md"])
    listed = re.findall(r"^ *(\d+)  (.*)$", EXIT_CODE_HELP, re.M)
    assert [(code, meaning) for code, meaning, _ in table] == listed
    assert [code for code, _, what_to_do in table if not what_to_do] == ["0"]


def test_a_page_that_includes_a_text_leads_there_without_the_site_too():
    included = r"^```{include} (\S+)\n"
    found = {page: re.findall(included, text, re.M) for page, text in TEXTS.items()}
    assert len([page for page, texts in found.items() if texts]) >= 5
    for page, texts in found.items():
        for text in texts:  # what begins with % is a comment on the site
            assert re.search(rf"^% .*\]\({re.escape(text)}\)", TEXTS[page], re.M), page


def test_the_page_of_places_names_all_that_is_in_a_store(new_run, command, tmp_path):
    run, store = new_run(), tmp_path / "store"
    rounds = [run.add(number) for number in range(4)]
    edge = ("--store", store)
    bundle, patches = tmp_path / "bundle.zip", tmp_path / "patches"
    assert command(COMMANDS["dpu-pack"], rounds[0], "--bundle", "-o", bundle)[0] == 0
    assert command(COMMANDS["dpu-pack"], *rounds[1:], "-o", patches)[0] == 0
    for words in (
        ("init", bundle),
        ("device-key",),
        ("agent", patches, "--once"),
        ("rollback",),
    ):
        code, _, err = command(COMMANDS["dpu-edge"], *edge, *words)
        assert code == 0, err
    names = {f"`{p.name}/`" if p.is_dir() else f"`{p.name}`" for p in store.iterdir()}
    names.discard("`current/`")
    assert {"`state.copy`", "`reverse/`", "`agent.json`", "`outbox/`"} <= names
    assert {name for name in names if name not in TEXTS["docs/places.md"]} == set()


@pytest.mark.parametrize("package", FLOORS)
def test_the_architecture_names_every_floor(package):
    page = TEXTS["docs/architecture.md"]
    floors = {floor for floor in FLOORS[package] if floor != "__main__"}
    assert {
        f for f in floors if f"`{f}`" not in page and f"`{f}/`" not in page
    } == set()


def test_the_readme_can_be_read_in_four_minutes():
    assert len(README.split()) <= 900


def test_the_example_trains_rounds_that_a_device_takes(tmp_path, monkeypatch, capsys):
    (example,) = blocks(README, "python")
    (tmp_path / "example.py").write_text(example)
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(tmp_path / "example.py"), run_name="__main__")
    assert len(capsys.readouterr().out.splitlines()) >= 6, "it is silent while it works"
    rounds = [read_round(tmp_path / f"runs/loop/round_0{n}") for n in range(3)]
    device = Device.install(tmp_path / "device", build_bundle(rounds[0]).data)
    for round_ in rounds[1:]:
        patch = pack_round(round_)
        weights = sum(t.size for t in round_.weights.layout.tensors if len(t.shape) > 1)
        assert sum(patch.counts[name] for name in round_.selection) == int(
            0.02 * weights
        )
        device.update(patch.data)
        assert device.verify() == fingerprint_file(round_.path / "weights.safetensors")


@pytest.mark.parametrize("page", TEXTS)
def test_a_source_file_that_is_named_is_there(page):
    files = {str(p.relative_to(ROOT)) for p in ROOT.glob("[a-z]*/**/*.py")}
    for name in re.findall(r"[`(]((?:\.\./)*[\w/]+\.py)[`)]", TEXTS[page]):
        name = name.lstrip("./")
        assert any(f"/{file}".endswith(f"/{name}") for file in files), name
