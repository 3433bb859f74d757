# SPDX-License-Identifier: Apache-2.0
import json
import resource
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import trainer
from trainer.cli import main
from trainer.config import load_config

torch.set_num_threads(1)

BUILT_IN = Path(trainer.__file__).parent / "recipes"

QUICK = [
    f"--set={change}"
    for change in (
        "run.rounds=2",
        "data.initial=60",
        "data.growth=20",
        "data.validation=50",
        "model.hidden=[16]",
        "update.ratio=0.05",
        "train.epochs=2",
    )
]


@pytest.fixture
def command(monkeypatch, capsys):
    """Run dpu-train: ``command("run", "digits") -> (code, stdout, stderr)``."""

    def start(*args):
        monkeypatch.setattr(sys, "argv", ["dpu-train", *map(str, args)])
        with pytest.raises(SystemExit) as done:
            main()
        return done.value.code, *capsys.readouterr()

    return start


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A first run: folder of the runs, and what it printed."""
    runs = tmp_path_factory.mktemp("runs")
    args = ["run", "digits", "--runs", str(runs), *QUICK]
    return runs, CliRunner().invoke(main, args)


@pytest.fixture
def runs(first):
    return first[0]


def test_run_writes_rounds_and_prints_a_table(first):
    runs, result = first
    assert result.exit_code == 0
    header, *rows = result.stdout.splitlines()
    assert header.split() == ["round", "outcome", "changed", "val", "test"]
    assert [row.split()[0] for row in rows] == ["round_00", "round_01"]
    assert (runs / "digits" / "round_01" / "round.json").exists()
    assert "round_01" in result.stderr  # progress
    assert "\n  dpu-pack" in result.stderr


def test_run_goes_on_quietly_and_prints_json(command, runs, monkeypatch):
    monkeypatch.setenv("DPU_RUNS", str(runs))
    more = [*QUICK, "--set=run.rounds=3"]
    code, out, err = command("run", "digits", "--json", "-q", *more)
    assert (code, err) == (0, "")
    record = json.loads(out)
    assert record["schema"] == 1
    assert record["run"] == str(runs / "digits")
    assert [r["round"] for r in record["rounds"]] == [0, 1, 2]


def test_run_refuses_another_recipe_under_the_same_name(command, runs):
    args = ("run", "digits_cnn", "--name", "digits", "--runs", runs)
    code, out, err = command(*args)
    assert (code, out) == (2, "")
    assert "[model] name was 'mlp', is now 'small_cnn'" in err
    assert "choose another run.name (--name)" in err


def test_problems_of_a_recipe_are_listed_and_exit_with_2(command, tmp_path):
    args = ("check", "digits", "--set", "train.lr=-1", "--set", "train.epoch=3")
    code, out, err = command(*args, "--json")
    assert (code, out) == (2, "")
    record = json.loads(err)
    assert record["error"] == "ConfigError"
    assert record["exit_code"] == 2
    assert len(record["problems"]) == 2


def test_an_unknown_recipe_gets_a_suggestion(command):
    code, _, err = command("run", "digit")
    assert code == 2
    assert "did you mean digits?" in err


def test_training_that_diverges_exits_with_9(command, tmp_path):
    diverge = ["--set=train.optimizer=sgd", "--set=train.lr=1e30"]
    code, _, err = command("run", "digits", "--runs", tmp_path, *QUICK, *diverge)
    assert code == 9
    assert "lower train.lr" in err


def test_run_takes_your_own_network_and_data_without_a_recipe(
    command, tmp_path, monkeypatch
):
    (tmp_path / "mine.py").write_text(Path("tests/trainer/own.py").read_text())
    monkeypatch.chdir(tmp_path)
    sizes = ["data.initial=100", "data.growth=20", "data.validation=60"]
    args = [f"--set={s}" for s in (*sizes, "run.rounds=2", "train.epochs=1")]
    own = ("--model", "mine:small", "--data", "mine:tensors")
    code, out, _ = command("run", *own, *args, "--set=update.ratio=0.3")
    assert code == 0
    assert "round_01" in out
    assert (tmp_path / "runs" / "own" / "round_01" / "round.json").exists()
    code, _, err = command("run", "--model", "mine:small")
    assert code == 2
    assert "give both --model and --data" in err


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Write a module ``mine`` that can be imported: ``module(text)``."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    yield (tmp_path / "mine.py").write_text
    sys.modules.pop("mine", None)


@pytest.fixture
def mine(module, command):
    """Run with functions of a module ``mine``: ``mine(text, "--model", "mine:f")``."""

    def start(text, *args):
        module(text)
        return command("run", "digits", *QUICK[:4], *QUICK[5:], *args)

    return start


FORWARD = """
from torch import nn
class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 10)
    def forward(self, inputs):
        return self.layer(inputs).nothing  # line 8
def network():
    return Own()
"""
ROWS = """
import torch
class Rows:
    def __len__(self):
        return 300
    def __getitem__(self, index):
        return torch.zeros(2), [0, 1][index]  # line 7
def data():
    return Rows(), Rows(), ["a", "b"]
"""


@pytest.mark.parametrize(
    ("text", "option", "place", "reason"),
    [
        ("def network():\n    return 1 / 0", "--model", "line 2, in network", "Zero"),
        ("x = absent", "--model", "line 1, in <module>", "NameError"),
        (FORWARD, "--model", "line 8, in forward", "AttributeError"),
        ("def data():\n    open('/no/file')", "--data", "line 2, in data", "/no/file"),
        (ROWS, "--data", "line 7, in __getitem__", "IndexError"),
    ],
)
def test_what_your_code_raises_is_told_with_your_file_and_line(
    mine, tmp_path, text, option, place, reason
):
    code, out, err = mine(
        text, option, f"mine:{option[2:].replace('model', 'network')}"
    )
    assert (code, out) == (9, "")
    first = err.splitlines()[0]
    assert first.startswith(f"error: {tmp_path}/mine.py, {place}: ")
    assert reason in first
    assert "bug" not in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("text", "option", "problem"),
    [
        ("def network(:", "--model", "mine.py, line 1: invalid syntax"),
        ("import sys; sys.exit(0)", "--model", "ends the program while it is imported"),
        ("import no_such", "--model", "No module named 'no_such'"),
        ("def data(): return 1, 2, 3", "--data", "cannot be taken as samples"),
        (
            "import torch\nhalf = torch.zeros(9, 2, 3), torch.zeros(9)\n"
            "def data(): return half, half, 'a', {'mean': [1, 2, 3], 'std': [1]}",
            "--data",
            "mean has 3 values and std 1",
        ),
    ],
)
def test_what_your_code_lacks_is_wrong_use(mine, text, option, problem):
    code, out, err = mine(
        text, option, f"mine:{option[2:].replace('model', 'network')}"
    )
    assert (code, out) == (2, "")
    assert problem in err


def test_torchvision_beside_another_torch_is_imported_through_ours(mine):
    text = "from trainer.data.vision import torchvision\nfrom torch import nn\n"
    text += "def network(shape, classes):\n"
    text += "    return nn.Sequential(nn.Flatten(), nn.Linear(64, classes))"
    assert mine(text, "--model", "mine:network")[0] == 0


def test_torchvision_that_does_not_load_is_told_with_the_way_round_it(mine):
    text = "def network():\n    raise RuntimeError('%s')"
    why = "operator torchvision::nms does not exist"
    code, _, err = mine(text % why, "--model", "mine:network")
    assert code == 9
    assert "from trainer.data.vision import torchvision" in err


def test_run_keeps_to_a_budget_with_the_real_packager(command, tmp_path):
    args = ("run", "digits", "--runs", tmp_path, "--json", *QUICK)
    code, out, _ = command(*args, "--set=update.budget=900B")
    assert code == 0
    first = json.loads(out)["rounds"][0]
    assert 0.95 * 900 <= first["metrics"]["patch_bytes"] <= 900


def test_recipes_lists_all_and_copies_one(command, tmp_path):
    code, out, _ = command("recipes")
    assert code == 0
    names = [line.split()[0] for line in out.splitlines()]
    assert names == sorted(path.stem for path in Path("trainer/recipes").iterdir())
    target = tmp_path / "mine.toml"
    assert command("recipes", "--copy", "digits", target)[0] == 0
    assert target.read_bytes() == Path("trainer/recipes/digits.toml").read_bytes()
    code, _, err = command("recipes", "--copy", "digits", target)
    assert code == 2
    assert "exists" in err
    code, _, err = command("recipes", "--copy", "digits", f"{tmp_path}/new/")
    assert (code, "expected the name of a file" in err) == (2, True)


def test_a_recipe_that_the_disk_has_no_room_for_is_named(command, tmp_path):
    target = tmp_path / "mine.toml"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50, before[1]))
    try:
        code, _, err = command("recipes", "--copy", "digits", target)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (code, err) == (10, f"error: {target}: File too large\n")
    assert not target.exists()


def test_the_next_command_can_be_pasted_where_names_have_spaces(
    command, runs, tmp_path
):
    moved = shutil.copytree(runs, tmp_path / "my runs")
    err = command("run", "digits", "--runs", moved, *QUICK)[2]
    first = err.partition("in this order:\n")[2].splitlines()[0]
    words = shlex.split(first)
    assert words[:3] == ["dpu-pack", "--runs", str(moved)]
    assert words[3].startswith("digits/round_")


def test_what_init_writes_trains_and_the_next_steps_work_as_they_are_typed(
    command, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    assert command("init", "new")[0] == 0
    assert 'name = "new"' in (tmp_path / "new" / "recipe.toml").read_text()
    quick = ("--set=run.rounds=3", "--set=train.epochs=2")
    code, _, err = command("run", "new/recipe.toml", *quick)
    assert code == 0, err
    bin_ = Path(sys.executable).parent
    steps = err.partition("in this order:\n")[2].splitlines()
    assert [shlex.split(step)[0] for step in steps][::2] == ["dpu-pack", "dpu-edge"]
    for step in steps:
        name, *args = shlex.split(step)
        subprocess.run([bin_ / name, *args], check=True, capture_output=True)
    record = json.loads(
        subprocess.run(
            [bin_ / "dpu-edge", "--store", "device", "infer", "--golden", "--json"],
            check=True,
            capture_output=True,
        ).stdout
    )
    assert record["labels"] == 64
    assert record["right"] > 32
    newest = [line.split()[0] for line in steps[-1].split("/") if "dpu" in line][-1]
    assert record["round"] == int(newest.removeprefix("round_").removesuffix(".dpu"))


def test_init_overwrites_nothing(command, tmp_path):
    (tmp_path / "mine.py").write_text("kept")
    code, _, err = command("init", tmp_path)
    assert (code, "mine.py exists" in err) == (2, True)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.py"]
    assert (tmp_path / "mine.py").read_text() == "kept"


def test_a_run_that_cannot_be_packed_is_not_told_to_be(command, tmp_path):
    args = ("--runs", tmp_path, *QUICK, "--set=update.chain=paper")
    err = command("run", "digits", *args)[2]
    assert "dpu-pack" not in err
    assert f"dpu-patch report --runs {tmp_path} digits" in err


def test_curves_for_tensorboard_hold_every_epoch_and_round(command, tmp_path):
    event_file = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    args = ("--runs", tmp_path / "runs", "--tensorboard", tmp_path / "logs", *QUICK)
    code, out, _ = command("run", "digits", "--json", *args)
    assert code == 0
    found = event_file.EventAccumulator(str(tmp_path / "logs" / "digits"))
    found.Reload()
    steps = [e.step for p in ("full", "sparse") for e in found.Scalars(f"loss/{p}")]
    assert sorted(steps) == list(range(1, 9))  # 2 rounds of 2 x 2 epochs
    rounds = [r["metrics"]["test_accuracy"] for r in json.loads(out)["rounds"]]
    written = [event.value for event in found.Scalars("round/test_accuracy")]
    assert written == pytest.approx(rounds)


def test_ctrl_c_is_an_interruption_whatever_a_library_makes_of_it(
    command, tmp_path, monkeypatch
):
    (tmp_path / "stubborn.py").write_text(
        "import os, signal, time\n"
        "def network():\n"
        "    try:\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "        time.sleep(9)\n"
        "    except KeyboardInterrupt:\n"
        "        raise RuntimeError('this model cannot be traced') from None\n"
    )
    monkeypatch.chdir(tmp_path)
    before = signal.getsignal(signal.SIGINT)
    code, _, err = command("run", "digits", *QUICK[:4], "--model", "stubborn:network")
    assert (code, err.strip()) == (130, "error: interrupted")
    assert signal.getsignal(signal.SIGINT) is before


def test_check_prints_every_key_as_set_takes_it(command):
    code, out, _ = command("check", "mnist_mlp")
    assert code == 0
    assert "update.lambda = 0.5" in out
    assert 'data.validation_from = "train"' in out
    lines = [line for line in out.splitlines() if not line.startswith("#")]
    changes = [f"--set={line}" for line in lines]
    assert command("check", "digits", *changes)[1] == out


@pytest.mark.parametrize("recipe", ["digits", "mine"])
def test_what_check_prints_is_a_recipe_for_the_same(module, command, tmp_path, recipe):
    module("def network(**options): ...")
    own = tmp_path / "mine.toml"
    own.write_text(
        '[run]\nrounds = 2\n[data]\nset = "digits"\ninitial = 100\ngrowth = 0\n'
        'root = "a \\"b\\" \\\\ c"\n[train]\nepochs = 1\n'
        '[model]\nfactory = "mine:network"\nflags = [true, "x"]\nat = {of = 1}\n'
    )
    out = command("check", own if recipe == "mine" else recipe)[1]
    printed = tmp_path / "printed.toml"
    printed.write_text(out)
    before = load_config(own if recipe == "mine" else BUILT_IN / f"{recipe}.toml")
    assert load_config(printed) == before


def test_check_says_what_defaults_stand_for(command):
    lines = command("check", "digits", "--set=update.ratio=0.02")[1].splitlines()
    assert "update.first_ratio = 0.0  # default: ratio, here 0.02" in lines
    assert 'update.first_budget = ""  # default: budget' in lines
    assert 'update.budget = ""  # default: none' in lines
    assert 'update.tensors = ""  # default: none, the dense part alone' in lines
    floor = "# run.accuracy_floor, default: halfway between chance and round_00's share"
    assert floor in lines
    assert any(line.startswith("# run.bound, default: halfway") for line in lines)
    assert "update.ratio = 0.02" in lines


OWN = """
def network(shape, classes, *, width=3):
    raise RuntimeError
def data():
    raise RuntimeError
def loss(outputs, targets):
    raise RuntimeError
"""


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (("--model", "nosuch:network"), "No module named 'nosuch'"),
        (("--data", "nosuch:data"), "No module named 'nosuch'"),
        (("--model", "mine:netwrok"), "no function 'netwrok'; did you mean network?"),
        (("--data", "mine:loss"), "mine:loss takes (outputs, targets)"),
        (("--set", "model.widht=3"), "mine:network takes (shape, classes, *, width=3)"),
        (("--set", "train.loss=mine:los"), "no function 'los'; did you mean loss?"),
        (
            ("--set", "train.metric=mine:no", "--set=train.better=lower"),
            "function 'no'",
        ),
    ],
)
def test_check_looks_at_your_functions_beside_all_other_keys(
    module, command, change, problem
):
    functions = ("--model", "mine:network", "--data", "mine:data")
    module(OWN)
    changes = (*functions, *change, "--set=update.ratio=-1")
    code, out, err = command("check", "digits", *changes)
    assert (code, out) == (2, "")
    assert problem in err
    assert "[update] ratio should be above 0" in err


def test_check_calls_none_of_your_functions_and_says_so(module, command):
    module(OWN)
    own = ("--model", "mine:network", "--data", "mine:data")
    code, out, err = command("check", *own, "--set=train.loss=mine:loss")
    assert code == 0
    assert 'model.factory = "mine:network"' in out
    assert err.startswith("mine:data was not called")
    assert command("check", *own, "--json")[2] == ""


def test_a_module_that_raises_is_a_problem_with_its_file_and_line(module, command):
    module("x = absent")
    code, _, err = command("check", "digits", "--model", "mine:network")
    assert code == 2
    assert "mine.py, line 1, in <module>: NameError" in err


@pytest.mark.parametrize(
    ("name", "words"),
    [("columns.dpu", "is a patch, expected a recipe"), ("columns.base", "weight file")],
)
def test_a_file_that_is_no_recipe_is_named_by_what_it_is(command, name, words):
    code, _, err = command("check", Path("tests/golden/v1", name))
    assert code == 2
    assert words in err
    assert "expected a recipe (TOML)" in err
    assert "codec" not in err


def test_a_recipe_that_is_no_toml_is_told_where(command, tmp_path):
    (tmp_path / "odd.toml").write_text("[run\n")
    code, _, err = command("check", tmp_path / "odd.toml")
    assert code == 2
    assert "odd.toml is not a TOML file: " in err
    assert "line 1" in err


def test_help_does_not_wait_for_torch():
    script = (
        "import sys\nfrom trainer.cli import main\n"
        "try:\n    main(['run', '--help'])\n"
        "except SystemExit as end:\n    assert end.code == 0\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert "Exit codes" in done.stdout


def test_every_public_name_can_be_imported():
    for name in trainer.__all__:
        assert getattr(trainer, name).__name__ == name
    assert dir(trainer) == trainer.__all__
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = trainer.nothing
