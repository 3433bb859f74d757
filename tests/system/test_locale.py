# SPDX-License-Identifier: Apache-2.0
"""No command fails because of the locale: LC_ALL=C without Python's UTF-8 mode."""

import json
import os
import shlex
import subprocess
import sys

import click
import pytest

import edge_runtime.cli.main
import packager.cli.pack
import trainer.cli
from packager.keys import load_private
from trainer.recipe_argument import built_in_recipes

ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
SCRIPTS = {
    "dpu-train": "from trainer.__main__ import main; main()",
    "dpu-pack": "from packager.__main__ import pack; pack()",
    "dpu-patch": "from packager.__main__ import patch; patch()",
    "dpu-edge": "from edge_runtime.__main__ import main; main()",
}
GROUPS = {
    "dpu-train": trainer.cli.main,
    "dpu-patch": packager.cli.pack.patch,
    "dpu-edge": edge_runtime.cli.main.main,
}


def start(line, cwd):
    script, *args = shlex.split(line)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPTS[script], *args],
        cwd=cwd,
        env=os.environ | ASCII,
        capture_output=True,
        check=False,
    )
    assert b"Traceback" not in done.stderr, done.stderr.decode()
    return done


def helps():
    for name, group in GROUPS.items():
        assert isinstance(group, click.Group)
        yield from (f"{name} {command} --help" for command in ("", *group.commands))
    yield "dpu-pack --help"


@pytest.mark.parametrize("line", list(helps()))
def test_every_help_is_printed(line, tmp_path):
    done = start(line, tmp_path)
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_passphrase_is_the_same_bytes_in_every_locale(run, tmp_path, monkeypatch):
    monkeypatch.setenv("DPU_PASSPHRASE", "schlüssel")
    assert start("dpu-patch keygen key.pem --encrypt", tmp_path).returncode == 0
    load_private((tmp_path / "key.pem").read_bytes(), "schlüssel")


# Each line with the exit code that it ends with; in order.
LIFE = """
0 dpu-pack räder/round_00 --bundle
0 dpu-pack round_01 round_02 --sign schlüssel.pem -o gerät/
0 dpu-pack räder/round_02 --from round_00 --json
0 dpu-patch sign --key schlüssel.pem runs/räder/round_00.bundle.zip
0 dpu-patch info gerät/round_01.dpu
0 dpu-patch info gerät/round_01.dpu --md -o gerät/größe.md
0 dpu-patch info gerät/größe.dpu
0 dpu-patch report gerät/größe.dpu
0 dpu-patch report räder
0 dpu-patch report räder --json
0 dpu-patch report räder -o gerät/räder.txt
0 dpu-patch verify gerät/größe.dpu
0 dpu-patch diff runs/räder/round_00/weights.safetensors \
    runs/räder/round_01/weights.safetensors
0 dpu-patch compose gerät/round_01.dpu gerät/round_02.dpu -o gerät/zwölf.dpu \
    --base runs/räder/round_00/weights.safetensors
0 dpu-patch keygen gerät/schlüssel2.pem
3 dpu-patch info gerät/größe.md
2 dpu-patch info gerät/nicht→da.dpu
2 dpu-pack räder/rünft_01
2 dpu-pack räder/rünft_01 --json
0 dpu-edge init runs/räder/round_00.bundle.zip --trust schlüssel.pub.pem
0 dpu-edge apply gerät/round_01.dpu
3 dpu-edge apply gerät/größe.md
7 dpu-edge apply gerät/größe.dpu --store gerät/läden
0 dpu-edge status
0 dpu-edge verify --expect runs/räder/round_01/weights.safetensors
2 dpu-edge verify --expect nicht→da
0 dpu-edge infer --golden
2 dpu-edge infer gerät/größe.md
0 dpu-edge rollback
0 dpu-edge agent gerät --once
0 dpu-edge agent gerät --once --json
2 dpu-edge service gerät
2 dpu-train run nicht→da
2 dpu-train check gerät/rezept.toml
0 dpu-train recipes --copy digits gerät/übung.toml
0 dpu-patch extract gerät/größe.onnx -o gerät/neü
0 dpu-pack --base gerät/größe.onnx --bundle -o gerät/größe.zip
"""


def lines():
    joined = LIFE.replace("\\\n", " ").strip().splitlines()
    return [(int(line.split()[0]), line.split(maxsplit=1)[1]) for line in joined]


def test_names_and_messages_beyond_ascii_stop_no_command(new_run, tmp_path):
    run = new_run("räder")
    for number in range(3):
        run.add(number)
    (tmp_path / "gerät").mkdir()
    (tmp_path / "gerät" / "rezept.toml").write_text(
        '[run]\nname = "räder→"\nrounds = "drölf"\n', encoding="utf-8"
    )
    for number, name in (("model", "graph.onnx"), ("round_00", "weights.safetensors")):
        found = (run.path / number / name).read_bytes()
        place = name.replace("graph", "größe")
        (tmp_path / "gerät" / place).write_bytes(found)
    start("dpu-patch keygen schlüssel.pem", tmp_path)
    os.environ["DPU_STORE"] = "lager für räder"
    try:
        for code, line in lines():
            if "größe.dpu" in line:
                data = (tmp_path / "gerät/round_01.dpu").read_bytes()
                (tmp_path / "gerät/größe.dpu").write_bytes(data)
            done = start(line, tmp_path)
            assert done.returncode == code, (line, done.stdout, done.stderr.decode())
            if "--json" in line and "--once" not in line:
                json.loads(done.stdout or done.stderr)
    finally:
        del os.environ["DPU_STORE"]
    # What is written is the same text as anywhere else.
    assert "größe.dpu" in (tmp_path / "gerät/größe.html").read_text("utf-8")
    assert "räder" in (tmp_path / "gerät/räder.txt").read_text("utf-8")


def test_names_come_out_as_the_bytes_that_they_are(new_run, tmp_path):
    new_run("räder").add(0)
    done = start("dpu-pack räder/round_00", tmp_path)
    assert "wrote runs/räder/round_00.dpu".encode() in done.stderr
    assert " → ".encode() in done.stdout


def test_a_name_that_the_locale_cannot_write_is_said_with_what_to_do(tmp_path):
    recipe = built_in_recipes()["digits"].read_text(encoding="utf-8")
    recipe = recipe.replace("[run]", '[run]\nname = "räder"')
    (tmp_path / "mine.toml").write_text(recipe, encoding="utf-8")
    done = start("dpu-train run mine.toml -q --set train.epochs=1", tmp_path)
    assert done.returncode == 2
    assert b"set LC_ALL=C.UTF-8" in done.stderr
