"""What the README shows works as it stands there."""

import re
import runpy
import shlex
from importlib.metadata import entry_points
from pathlib import Path

import click
import pytest

import edge_runtime.cli.main
import packager.cli.pack
import trainer.cli
from edge_runtime import Device, fingerprint_file
from edge_runtime.commandline import EXIT_CODE_HELP
from packager.build import pack_round
from packager.bundles.from_round import build_bundle
from packager.rounds.folder import read_round

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
ON_THE_DEVICE = "".join(
    (ROOT / "edge_runtime" / name).read_text() for name in ("README.md", "TRUST.md")
)
COMMANDS = {
    "dpu-edge": edge_runtime.cli.main.main,
    "dpu-pack": packager.cli.pack.pack,
    "dpu-patch": packager.cli.pack.patch,
    "dpu-train": trainer.cli.main,
}


def test_the_example_trains_rounds_that_a_device_takes(tmp_path, monkeypatch):
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (tmp_path / "example.py").write_text(example)
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(tmp_path / "example.py"), run_name="__main__")
    rounds = [read_round(tmp_path / f"runs/mine/round_0{n}") for n in range(3)]
    device = Device.install(tmp_path / "device", build_bundle(rounds[0]).data)
    for round_ in rounds[1:]:
        patch = pack_round(round_)
        weights = sum(t.size for t in round_.weights.layout.tensors if len(t.shape) > 1)
        assert sum(patch.counts[name] for name in round_.selection) == int(
            0.02 * weights
        )
        device.update(patch.data)
        assert device.verify() == fingerprint_file(round_.path / "weights.safetensors")


def test_these_commands_are_installed_and_no_others():
    scripts = {script.name for script in entry_points(group="console_scripts")}
    assert {name for name in scripts if name.startswith("dpu-")} == set(COMMANDS)


@pytest.mark.parametrize(
    "line", sorted(set(re.findall(r"^dpu-.*$", README + ON_THE_DEVICE, re.M)))
)
def test_every_command_that_is_shown_exists(line):
    words = shlex.split(line, comments=True)
    command = COMMANDS[words[0]]
    while isinstance(command, click.Group):
        command = command.commands[next(w for w in words[1:] if w in command.commands)]
    words = words[: words.index(">")] if ">" in words else words
    known = {option for p in command.params for option in p.opts}
    assert {word for word in words if word.startswith("--")} <= known


def test_the_exit_codes_are_those_of_the_commands():
    table = dict(re.findall(r"^\| (\d+) \| (.*) \|$", README, re.M))
    assert table == dict(re.findall(r"^ *(\d+)  (.*)$", EXIT_CODE_HELP, re.M))
