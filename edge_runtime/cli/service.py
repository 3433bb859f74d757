# SPDX-License-Identifier: Apache-2.0
"""``dpu-edge service``: systemd units for the two halves of a device."""

import os
import pwd
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from edge_runtime.cli.agent import agent
from edge_runtime.cli.sync import sync
from edge_runtime.commandline import say

PRIVATE_PLACES = ("/tmp", "/var/tmp", "/dev/shm")  # a service sees others there
STATE = Path("/var/lib")
# One board, many models: a store and a folder for each, below these.
STORES, FOLDERS, SETTINGS = "dpu-edge", "dpu-edge-sync", "/etc/dpu-edge"
INSTANCE = "%i"  # systemd's word for what follows the @ of a unit's name
_ADDRESS = "${DPU_URL}"  # in the settings of a named unit
_SYNC_S = "3600"


def _store_by_name(
    context: click.Context, _option: click.Parameter, value: str | None
) -> str | None:
    """Let a name say which store it is, unless somebody gave one."""
    if value is None:
        return None
    if value != INSTANCE and not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,63}", value):
        raise click.BadParameter(
            f"found {value!r}, expected letters, digits, '.', '_' and '-', or %i for a "
            "unit of many instances"
        )
    parent = context.parent
    stated = parent and parent.get_parameter_source("store")
    if stated is not ParameterSource.COMMANDLINE:
        context.obj = STATE / STORES / value
    return value


@dataclass(frozen=True, slots=True)
class _Half:
    """One of the two halves, as a unit runs it."""

    kind: str
    store: Path
    folder: Path
    arguments: tuple[str, ...]
    name: str | None
    options: dict[str, Any]

    @property
    def unit(self) -> str:
        """The unit's name; of many instances, up to its @."""
        end = {None: "", INSTANCE: "@"}.get(self.name, f"-{self.name}")
        return f"dpu-edge-{self.kind}{end}"


@click.command(context_settings={"ignore_unknown_options": True})
@click.option(
    "--user",
    help="Who runs it.  [default: root; with --sync: dpu-edge-sync]",
)
@click.option(
    "--name",
    is_eager=True,
    callback=_store_by_name,
    help="Of a model, where a board runs many: store, folder and unit are called so. "
    "%i makes one unit for all of them (dpu-edge-agent@.service).",
)
@click.option(
    "--sync",
    "url",
    metavar="URL",
    help="Print the unit of 'dpu-edge sync' instead. ${DPU_URL} takes the address from "
    "/etc/dpu-edge/NAME.env.",
)
@click.argument("arguments", metavar="[FOLDER] [AGENT OR SYNC OPTIONS]...", nargs=-1)
@click.pass_context
def service(
    context: click.Context,
    user: str | None,
    name: str | None,
    url: str | None,
    arguments: tuple[str, ...],
) -> None:
    """Print a systemd unit that runs 'dpu-edge agent', or 'sync', for this store.

    To be written to /etc/systemd/system/dpu-edge-agent.service, or where its first
    line says. With --name the folder is /var/lib/dpu-edge-sync/NAME unless given.
    """
    user = user or ("dpu-edge-sync" if url else "root")
    if not re.fullmatch(r"[\w.-]+", user, re.ASCII):
        raise click.BadParameter(f"{user!r} is no user's name", param_hint="--user")
    if name and (not arguments or arguments[0].startswith("-")):
        arguments = (str(STATE / FOLDERS / name), *arguments)
    half = _half(context, name, url, arguments)
    metrics = half.options.get("metrics")
    paths = [half.store, half.folder, *filter(None, [metrics])]
    for path in paths:
        _check_unit_path(str(path), name)
    for word in half.arguments:
        _check_word(word)
    values = _values(half, user)
    unit = resources.files("edge_runtime") / f"dpu-edge-{half.kind}.service"
    text = unit.read_text(encoding="utf-8")
    filled = re.sub(r"@([A-Z_]+)@\n?", lambda found: _fill(found, values), text)
    print(filled, end="")
    for warning in _unit_warnings(user, half, paths):
        say(f"warning: {warning}")


def _fill(found: re.Match[str], values: dict[str, str]) -> str:
    """Return a value, and no line for what is empty."""
    value, end = values[found[1]], "\n" if found[0].endswith("\n") else ""
    return value + end if value else ""


def _half(
    context: click.Context,
    name: str | None,
    url: str | None,
    arguments: tuple[str, ...],
) -> _Half:
    root: Path = context.obj
    if url is None:
        options = agent.make_context("agent", list(arguments), parent=context).params
        if options["once"]:
            raise click.UsageError("a service runs on; --once is for cron and timers")
        return _Half("agent", root, options["folder"], arguments, name, options)
    if not arguments:
        raise click.UsageError("missing argument FOLDER, or a --name that gives it")
    words = [url, *arguments]
    options = sync.make_context("sync", list(words), parent=context).params
    for option in ("ca", "cert", "key", "tuf_root"):
        if options[option]:
            _check_unit_path(str(options[option]), name)
    if "://" not in (report := options["report"].removeprefix("file://")) and report:
        _check_unit_path(report.removeprefix("@"), name)
    if url == _ADDRESS and name is None:
        raise click.UsageError(f"{_ADDRESS} needs --name: it says which settings")
    # A unit's process stands in /: what is relative here would be elsewhere.
    if "://" not in url and not url.startswith("/") and url != _ADDRESS:
        raise click.UsageError(f"a unit needs an absolute path or URL, not {url!r}")
    if name is None and not any(w.partition("=")[0] == "--every" for w in words):
        words += ["--every", _SYNC_S]
    return _Half("sync", root, options["folder"], tuple(words), name, options)


def _values(half: _Half, user: str) -> dict[str, str]:
    from edge_runtime.update.programs import own_command

    store, words = str(half.store), half.arguments
    command = own_command("edge_runtime.__main__", "--store", store, half.kind)
    metrics = half.options.get("metrics")
    writable = [store, *([str(metrics.parent)] if metrics else [])]
    if "/run" in writable:  # the unit makes it read-only, and that would win
        raise click.UsageError("units may write to folders in /run, not to /run itself")
    setting = (
        f"Environment=DPU_EVERY={_SYNC_S}\nEnvironmentFile=-{SETTINGS}/{half.name}.env"
    )
    return {
        "UNIT": half.unit + (INSTANCE if half.name == INSTANCE else ""),
        "USER": user,
        "STORE": store,
        "STORE_QUOTED": shlex.quote(store),
        "SECRET": shlex.quote(f"-{store}/device.key"),
        "COMMAND": _escaped([*command, *words], half.name),
        "MOUNTS": shlex.join([store, str(half.folder)]),
        "WRITABLE": shlex.join(writable),
        "WRITABLE_LINE": _writable_lines(half),
        "ENVIRONMENT": setting if half.name else "",
    }


def _writable_lines(half: _Half) -> str:
    """Return what the network side may write: its folder, and one for reports."""
    is_own = half.name and half.folder == STATE / FOLDERS / half.name
    state = f"StateDirectory={FOLDERS}/{half.name}\nStateDirectoryMode=0755"
    report = half.options.get("report", "").removeprefix("file://")
    paths = [
        *([] if is_own else [str(half.folder)]),
        *[report] * report.startswith("/"),
    ]
    line = f"ReadWritePaths={shlex.join(paths)}"
    return "\n".join([*[state] * bool(is_own), *[line] * bool(paths)])


def _escaped(words: list[str], name: str | None) -> str:
    """Return a command as a unit writes it: % and $ are signs of its own there."""
    found = []
    for word in words:
        text = re.sub("[%$]", r"\g<0>\g<0>", word)
        if name == INSTANCE:  # what names an instance stays a sign
            text = text.replace("%%i", INSTANCE)
        found.append(word if word == _ADDRESS else shlex.quote(text))
    return " ".join(found)


def _check_word(word: str) -> None:
    if not word.isprintable() or re.search(r"[\\'\"]", word):
        raise click.UsageError(
            f"a unit needs words without quotes and backslashes, in one line, not "
            f"{word!r}"
        )


def _check_unit_path(path: str, name: str | None = None) -> None:
    plain_path = path.replace(INSTANCE, "i") if name == INSTANCE else path
    if not re.fullmatch(r"/[\w ./:=@+,-]*", plain_path):
        raise click.UsageError(
            f"a unit needs absolute paths of letters, digits and ' ./:=@+,-', "
            f"not {path!r}"
        )
    # systemd leaves such a line out, and the agent could not write to its store then.
    plain = os.path.normpath("/" + path.lstrip("/"))
    if path != plain:
        raise click.UsageError(
            f"systemd ignores paths with '..' or '//': write {path!r} as it really is, "
            f"for example {os.path.realpath(path)!r}"
        )


def _unit_warnings(user: str, half: _Half, paths: list[Path]) -> Iterator[str]:
    """Yield why the unit would not work on this machine; it may be for another one."""
    for path in paths:
        for place in PRIVATE_PLACES:
            if any(
                Path(p).is_relative_to(place) for p in (path, os.path.realpath(path))
            ):
                yield (
                    f"{path} is below {place}, of which a service has an empty one of "
                    "its own (PrivateTmp): move it, for example to /var/lib"
                )
    root = half.store
    if half.name != INSTANCE and not Path(root / "state.json").exists():
        yield (
            f"nothing is installed in {root} here: run 'dpu-edge --store "
            f"{shlex.quote(str(root))} init BUNDLE' before the service is started"
        )
    try:
        pwd.getpwuid(int(user)) if user.isdecimal() else pwd.getpwnam(user)
    except (KeyError, OverflowError):
        yield (
            f"this machine has no user {user}: make one (useradd --system {user}), or "
            "give another --user"
        )
