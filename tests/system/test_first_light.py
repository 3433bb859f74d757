# SPDX-License-Identifier: Apache-2.0
"""Train, pack, apply, verify, infer: the console scripts, end to end, on digits."""

import hashlib
import json
import subprocess
import sys

import pytest

SCRIPTS = {
    "dpu-train": "from trainer.cli import main; main()",
    "dpu-pack": "from packager.cli.pack import pack; pack()",
    "dpu-edge": "from edge_runtime.cli.main import main; main()",
}


def start(cwd, script, *args):
    return subprocess.run(
        [sys.executable, "-c", SCRIPTS[script], *map(str, args)],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )


def run(cwd, script, *args):
    done = start(cwd, script, *args)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A trained run of four short rounds, and where it was trained."""
    cwd = tmp_path_factory.mktemp("first_light")
    quick = ("run.rounds=4", "train.epochs=6", "data.growth=200", "model.hidden=[32]")
    run(cwd, "dpu-train", "run", "digits", *(f"--set={text}" for text in quick))
    return cwd


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_every_round_reaches_the_device_bit_for_bit(folder):
    runs = folder / "runs" / "digits"
    store = ("--store", folder / "device")
    run(folder, "dpu-pack", "round_00", "--bundle")
    run(folder, "dpu-edge", *store, "init", runs / "round_00.bundle.zip")
    outcomes = []
    for number in range(1, 4):
        name = f"round_{number:02d}"
        packed = json.loads(run(folder, "dpu-pack", name, "--json"))["packed"][0]
        outcomes.append(packed["written"])
        if packed["written"]:
            run(folder, "dpu-edge", *store, "apply", runs / f"{name}.dpu")
        assert (runs / f"{name}.dpu").exists() == packed["written"]
        local = folder / "device" / "current" / "weights.safetensors"
        assert sha256(local) == sha256(runs / name / "weights.safetensors")
    assert any(outcomes)
    answers = json.loads(run(folder, "dpu-edge", *store, "infer", "--golden", "--json"))
    assert len(answers["samples"]) == 64


def test_a_patch_is_small(folder):
    runs = folder / "runs" / "digits"
    run(folder, "dpu-pack", "digits/round_00", "-o", folder / "small.dpu")
    full = (runs / "round_00" / "weights.safetensors").stat().st_size
    assert (folder / "small.dpu").stat().st_size < full / 8


def test_training_again_continues_the_same_run(folder):
    args = ("--set=run.rounds=5", "--set=train.epochs=6", "--set=data.growth=200")
    before = sha256(folder / "runs" / "digits" / "round_03" / "weights.safetensors")
    run(folder, "dpu-train", "run", "digits", *args, "--set=model.hidden=[32]", "-q")
    assert (folder / "runs" / "digits" / "round_04" / "round.json").exists()
    after = sha256(folder / "runs" / "digits" / "round_03" / "weights.safetensors")
    assert after == before


def test_an_unknown_round_names_the_nearest(folder):
    done = start(folder, "dpu-pack", "rounds_01")
    assert done.returncode == 2
    assert "round_01" in done.stderr
