# SPDX-License-Identifier: Apache-2.0
"""The examples run as they stand, and devices take what they write."""

import subprocess
import sys
from pathlib import Path

from edge_runtime import Device
from packager.build import pack_round
from packager.bundles.from_round import build_bundle
from packager.rounds.folder import read_round

EXAMPLES = Path(__file__).parents[2] / "examples"


def start(*command, cwd, code=0):
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stderr
    return done.stderr if code else done.stdout


def update_a_device(run, store):
    """Install the first round, apply the others; the device, and the patches' sizes."""
    first, *others = [read_round(path) for path in sorted(run.glob("round_*"))]
    device = Device.install(store, build_bundle(first).data)
    sizes = []
    for round_ in others:
        if patch := pack_round(round_):
            device.update(patch.data)
            sizes.append(len(patch.data))
        assert device.verify() == round_.record.target
    return device, sizes


def test_the_loop_of_ones_own_trains_rounds_for_a_device(tmp_path):
    out = start(EXAMPLES / "own_loop.py", "--epochs", "2", cwd=tmp_path)
    assert out.count("right") == 3
    _, sizes = update_a_device(tmp_path / "runs" / "own_loop", tmp_path / "device")
    assert len(sizes) == 2


def test_the_loop_trains_for_an_epoch_at_least_or_leaves_no_run(tmp_path):
    loop = EXAMPLES / "own_loop.py"
    err = start(loop, "--epochs", "0", cwd=tmp_path, code=2)
    assert "found --epochs 0, expected 1 or more" in err
    assert not list(tmp_path.iterdir())


def test_own_model_and_data_by_a_recipe(tmp_path):
    for name in ("own_model.py", "own_model.toml"):
        (tmp_path / name).write_text((EXAMPLES / name).read_text())
    quick = ("--set", "train.epochs=3", "--quiet")
    start("-m", "trainer", "run", "own_model.toml", *quick, cwd=tmp_path)
    run = tmp_path / "runs" / "own_model"
    device, _ = update_a_device(run, tmp_path / "device")
    classes = device.store.contract.classes
    assert list(classes) == ["still", "walking", "running"]


def test_a_trainer_of_ones_own_needs_neither_ours_nor_torch(tmp_path):
    source = EXAMPLES / "own_trainer.py"
    forbidden = "import sys; sys.modules |= dict.fromkeys(['torch', 'trainer']); "
    code = (
        f"{forbidden} import runpy; runpy.run_path({str(source)!r}, None, '__main__')"
    )
    run = tmp_path / "runs" / "numpy"
    for name in (".model", ".round_00"):  # of a start that was cut off
        (run / name).mkdir(parents=True)
        (run / name / "half").write_text("")
    out = start("-c", code, cwd=tmp_path)
    assert out.count("right") == 3
    assert not list(run.rglob("half")) + list(run.glob(".*"))
    _, sizes = update_a_device(run, tmp_path / "device")
    full = (run / "round_00" / "weights.safetensors").stat().st_size
    assert len(sizes) == 2
    assert max(sizes) < full / 5
    err = start(source, cwd=tmp_path, code=2)  # a second time: it spoils nothing
    assert "runs/numpy is there already" in err
