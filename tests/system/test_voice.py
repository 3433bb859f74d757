# SPDX-License-Identifier: Apache-2.0
"""One voice for all errors: click's sound like ours, and each says what comes next."""

import re

import click
import pytest

import edge_runtime.cli.main
import packager.cli.fleet
import packager.cli.pack
import trainer.cli
from edge_runtime.commandline import CONTEXT
from edge_runtime.formats.kinds import Kind
from edge_runtime.parameters import FileOf

SCRIPTS = {
    "dpu-train": trainer.cli.main,
    "dpu-pack": packager.cli.pack.pack,
    "dpu-patch": packager.cli.pack.patch,
    "dpu-fleet": packager.cli.fleet.fleet,
    "dpu-edge": edge_runtime.cli.main.main,
}


def commands(command, name):
    """Every command below one, with the words that call it."""
    yield name, command
    for word, below in getattr(command, "commands", {}).items():
        yield from commands(below, f"{name} {word}")


EVERY = dict(
    pair for name, command in SCRIPTS.items() for pair in commands(command, name)
)


@pytest.fixture
def type_in(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DPU_STORE", raising=False)

    def start(line):
        name, *args = line.split()
        return command(SCRIPTS[name], *args)

    return start


@pytest.mark.parametrize(
    ("line", "first"),
    [
        ("dpu-edge aply x", "error: no such command 'aply'; did you mean 'apply'?"),
        ("dpu-edge apply", "error: missing argument 'PATCH...'"),
        ("dpu-edge status", "error: missing option '--store'; or set DPU_STORE"),
        ("dpu-edge status --no", "error: no such option '--no'"),
        (
            "dpu-edge --store s apply My.File",
            "error: invalid value for 'PATCH...': file 'My.File' does not exist",
        ),
        (
            "dpu-pack --level 99 A",
            "error: invalid value for '--level': 99 is not in the range 1<=x<=22",
        ),
        ("dpu-pack", "error: give rounds, or --base and --target"),
        ("dpu-patch info", "error: missing argument 'PATCH|BUNDLE'"),
        ("dpu-train check", "error: name a RECIPE, or give both --model and --data"),
        ("dpu-train run .", "error: . is a folder; name a recipe, a TOML file"),
        (
            "dpu-edge --store s bench --seconds -1",
            "error: invalid value for '--seconds': -1.0 is not in the range",
        ),
        ("dpu-train run Absent", "error: Absent is neither a file nor a built-in"),
    ],
)
def test_every_wrong_use_begins_alike_and_ends_with_2(type_in, line, first):
    code, out, err = type_in(line)
    assert (code, out) == (2, "")
    assert err.startswith(first)


@pytest.mark.parametrize(
    ("line", "usage"),
    [
        (
            "dpu-edge apply",
            r"usage: .+ apply \[OPTIONS\] PATCH\.\.\.\nhelp:  .+ apply",
        ),
        ("dpu-pack", r"usage: .+ \[OPTIONS\] \[ROUND\]\.\.\.\nhelp:  .+ --help"),
    ],
)
def test_wrong_use_says_how_to_use_it(type_in, line, usage):
    assert re.search(usage, type_in(line)[2])


def test_a_command_without_arguments_shows_its_help(type_in):
    for line in ("dpu-edge", "dpu-patch", "dpu-train"):
        code, out, err = type_in(line)
        assert (code, out) == (2, "")
        assert err.startswith("Usage: ")
        assert "Exit codes" in err


@pytest.mark.parametrize("name", EVERY)
def test_help_shows_no_signs_that_are_meant_for_the_program(name):
    command = EVERY[name]
    # click keeps the first context's words for help, so let them be ours.
    context = click.Context(command, info_name=name, **CONTEXT)
    assert "\\" not in command.get_help(context)


@pytest.mark.parametrize("name", EVERY)
def test_every_option_says_what_it_is_for(name):
    options = [p for p in EVERY[name].params if isinstance(p, click.Option)]
    assert [o.opts for o in options if not (o.hidden or o.help)] == []


@pytest.mark.parametrize("name", EVERY)
def test_an_option_for_public_keys_does_not_ask_for_the_private_file(name):
    for option in EVERY[name].params:
        kinds = option.type.kinds if isinstance(option.type, FileOf) else ()
        if Kind.PUBLIC_KEY in kinds and Kind.PRIVATE_KEY not in kinds:
            assert "KEY.pem" not in option.metavar, option.opts


@pytest.mark.parametrize(
    ("name", "option"),
    [
        *((f"dpu-edge {name}", "--cert-key") for name in ("init", "sync", "repair")),
        *(("dpu-patch sign", "--sign"), ("dpu-patch trust sign", "--sign")),
        *(("dpu-fleet pause", "--sign"), ("dpu-fleet rotate", "--sign")),
        *(("dpu-fleet prune", "--db"), ("dpu-edge agent", "--every")),
    ],
)
def test_what_other_commands_call_an_option_it_is_called_here_too(name, option):
    assert option in {word for p in EVERY[name].params for word in p.opts}


def test_colour_is_for_terminals_alone(type_in):
    assert "\x1b" not in type_in("dpu-pack absent")[2]
