# SPDX-License-Identifier: Apache-2.0
"""``dpu-edge agent`` and ``dpu-edge service``."""

import json
import os
import pwd
import re
import shlex
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge_runtime.agent.status import forget_left, ping, sd_notify
from edge_runtime.commandline import SCHEMA, say
from edge_runtime.store.state import utc

if TYPE_CHECKING:
    from edge_runtime.agent.agent import Agent

PRIVATE_PLACES = ("/tmp", "/var/tmp", "/dev/shm")  # a service sees others there
LONGEST_SLEEP_S = 1.0  # a signal waits no longer, and systemd's watchdog neither


@click.command()
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.option("--once", is_flag=True, help="Look once, for cron and timers.")
@click.option(
    "--interval",
    type=click.FloatRange(0.1),
    default=10.0,
    help="Seconds between two looks.",
)
@click.option(
    "--metrics",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write Prometheus metrics to this file.",
)
@click.option("--json", "as_json", is_flag=True, help="JSON lines on standard output.")
@click.pass_obj
def agent(
    root: Path,
    folder: Path,
    *,
    once: bool,
    interval: float,
    metrics: Path | None,
    as_json: bool,
) -> None:
    """Keep the model at the newest release that patches in FOLDER lead to.

    Says one line a decision on standard error, and nothing while nothing changes.
    Refused patches are logged and are no failure of this command.
    """
    from edge_runtime.agent.agent import Agent
    from edge_runtime.store.store import exclusive_lock
    from edge_runtime.update.device import Device

    log: Callable[..., None] = _log_json if as_json else _log
    device = Device.open(root)  # else a lock would be left where there is no store
    if name := device.store.summary().get("name"):
        log = partial(log, name=name)  # several models may share one journal
    problem = f"another agent is at work for {root}; stop it first"
    with exclusive_lock(open(root / "agent.lock", "ab"), problem):
        forget_left(root, metrics)
        watcher = Agent(partial(Device.open, root), folder, log, metrics=metrics)
        if once:
            watcher.look()
        else:
            _watch(watcher, log, interval)


def _stop_on_signals(agent: "Agent") -> None:
    """Let SIGTERM and SIGINT stop the agent after the update that it is in."""

    def stop(*_: object) -> None:
        agent.stopping = True

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)


def _watch(agent: "Agent", log: Callable[..., None], interval_s: float) -> None:
    """Look again and again until SIGTERM or SIGINT; neither interrupts an update."""
    _stop_on_signals(agent)
    from edge_runtime.agent.agent import FAILURES

    log("started", round=agent.state.active_slot.round)
    sd_notify("READY=1")
    while not agent.stopping:
        # It was reported; the agent tries again.
        with suppress(*FAILURES):
            agent.look()
        sd_notify(f"STATUS=at round {agent.state.active_slot.round}")
        until = time.monotonic() + interval_s
        while not agent.stopping and (left := until - time.monotonic()) > 0:
            ping()
            time.sleep(min(left, LONGEST_SLEEP_S))
    sd_notify("STOPPING=1")
    log("stopped", round=agent.state.active_slot.round)


def _log_json(event: str, **facts: Any) -> None:
    record = {"schema": SCHEMA, "at": utc(), "event": event} | facts
    print(json.dumps(record), flush=True)


def _log(event: str, **facts: Any) -> None:
    pairs = {"at": utc(), "event": event} | facts
    say(" ".join(f"{key}={_logfmt(str(value))}" for key, value in pairs.items()))


def _logfmt(value: str) -> str:
    is_plain = re.fullmatch(r"[\w.:/+-]+", value, re.ASCII)
    return value if is_plain else json.dumps(value)


@click.command(context_settings={"ignore_unknown_options": True})
@click.option("--user", default="root", help="Who runs the agent.")
@click.argument("arguments", metavar="FOLDER [AGENT OPTIONS]...", nargs=-1)
@click.pass_context
def service(context: click.Context, user: str, arguments: tuple[str, ...]) -> None:
    """Print a systemd unit that runs 'dpu-edge agent' for this store.

    To be written to /etc/systemd/system/dpu-edge-agent.service.
    """
    root: Path = context.obj
    options = agent.make_context("agent", list(arguments), parent=context).params
    if options["once"]:
        raise click.UsageError("a service runs on; --once is for cron and timers")
    if not re.fullmatch(r"[\w.-]+", user, re.ASCII):
        raise click.BadParameter(f"{user!r} is no user's name", param_hint="--user")
    folder, metrics = options["folder"], options["metrics"]
    paths = [root, folder, *filter(None, [metrics])]
    for path in paths:
        _check_unit_path(str(path))
    writable = [str(root), *([str(metrics.parent)] if metrics else [])]
    if "/run" in writable:  # the unit makes it read-only, and that would win
        raise click.UsageError("units may write to folders in /run, not to /run itself")
    from edge_runtime.update.programs import own_command

    command = own_command("edge_runtime.__main__", "--store", str(root), "agent")
    values = {
        "USER": user,
        "STORE": str(root),
        # A unit knows % and $ as signs of its own.
        "COMMAND": re.sub("[%$]", r"\g<0>\g<0>", shlex.join([*command, *arguments])),
        "MOUNTS": shlex.join([str(root), str(folder)]),
        "WRITABLE": shlex.join(writable),
    }
    unit = resources.files("edge_runtime") / "dpu-edge-agent.service"
    text = unit.read_text(encoding="utf-8")
    print(re.sub(r"@([A-Z]+)@", lambda found: values[found[1]], text), end="")
    for warning in _unit_warnings(user, root, paths):
        say(f"warning: {warning}")


def _check_unit_path(path: str) -> None:
    if not re.fullmatch(r"/[\w ./:=@+,-]*", path):
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


def _unit_warnings(user: str, root: Path, paths: list[Path]) -> Iterator[str]:
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
    if not Path(root / "state.json").exists():
        yield (
            f"nothing is installed in {root} here: run 'dpu-edge --store {root} init "
            "BUNDLE' before the service is started"
        )
    try:
        pwd.getpwuid(int(user)) if user.isdecimal() else pwd.getpwnam(user)
    except (KeyError, OverflowError):
        yield (
            f"this machine has no user {user}: make one (useradd --system {user}), or "
            "give another --user"
        )
