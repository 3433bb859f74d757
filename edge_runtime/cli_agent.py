"""``dpu-edge agent`` and ``dpu-edge service``."""

import json
import os
import re
import select
import shlex
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge_runtime.command import SCHEMA, say
from edge_runtime.errors import BackendError, StoreError
from edge_runtime.notify import Notifier
from edge_runtime.report import STATUS_NAME, Report, now

if TYPE_CHECKING:
    from edge_runtime.agent import Agent

_path = click.Path(dir_okay=False, path_type=Path)


@click.command()
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.option("--once", is_flag=True, help="Look once, for cron and timers.")
@click.option(
    "--interval",
    type=click.FloatRange(0.1),
    default=10.0,
    show_default=True,
    help="Seconds between two looks.",
)
@click.option("--remove-applied", is_flag=True, help="Remove patches that are done.")
@click.option("--status", type=_path, help="Status file, if not STORE/agent.json.")
@click.option("--metrics", type=_path, help="Write Prometheus metrics to this file.")
@click.option("--json", "as_json", is_flag=True, help="JSON lines on standard output.")
@click.pass_context
def agent(  # noqa: PLR0913 - one for each option
    context: click.Context,
    folder: Path,
    *,
    once: bool,
    interval: float,
    remove_applied: bool,
    status: Path | None,
    metrics: Path | None,
    as_json: bool,
) -> None:
    """Keep the model at the newest release that patches in FOLDER lead to.

    Says one line a decision on standard error, and nothing while nothing changes.
    Refused patches are logged and are no failure of this command.
    """
    from edge_runtime.agent import Agent
    from edge_runtime.cli import store_root

    root, notify = store_root(context), Notifier(os.environ)
    log = _log_json if as_json else _log
    report = Report(log, status or root / STATUS_NAME, metrics)
    tidy, ping = remove_applied, notify.ping
    with Agent(root, folder, report, remove=tidy, ping=ping) as watcher:
        if once:
            watcher.look()
        else:
            _watch(watcher, log, interval, notify)


def _watch(
    agent: "Agent", log: Callable[..., None], interval_s: float, notify: Notifier
) -> None:
    """Look again and again until SIGTERM or SIGINT; neither interrupts an update."""
    with _stop_signals(agent) as wake:
        log("started", round=agent.state.active_slot.round)
        notify.tell("READY=1")
        while not agent.stopping:
            # It was reported; the agent tries again.
            with suppress(StoreError, BackendError, OSError):
                agent.look()
            notify.tell(f"STATUS=at round {agent.state.active_slot.round}")
            until = time.monotonic() + interval_s
            while not agent.stopping and (left := until - time.monotonic()) > 0:
                notify.ping()
                select.select([wake], [], [], min(left, notify.ping_s or left))
        notify.tell("STOPPING=1")
        log("stopped", round=agent.state.active_slot.round)


@contextmanager
def _stop_signals(agent: "Agent") -> Iterator[socket.socket]:
    """Let signals stop the agent, and wake who waits for the socket."""

    def stop(*_: object) -> None:
        agent.stopping = True

    wake, alarm = socket.socketpair()
    alarm.setblocking(False)
    with wake, alarm:
        signal.set_wakeup_fd(alarm.fileno())
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, stop)
        yield wake
        signal.set_wakeup_fd(-1)


def _log_json(event: str, **facts: Any) -> None:
    record = {"schema": SCHEMA, "at": now(), "event": event} | facts
    print(json.dumps(record), flush=True)


def _log(event: str, **facts: Any) -> None:
    pairs = {"at": now(), "event": event} | facts
    say(" ".join(f"{key}={_logfmt(str(value))}" for key, value in pairs.items()))


def _logfmt(value: str) -> str:
    is_plain = re.fullmatch(r"[\w.:/+-]+", value, re.ASCII)
    return value if is_plain else json.dumps(value)


@click.command(context_settings={"ignore_unknown_options": True})
@click.option("--user", default="root", show_default=True, help="Who runs the agent.")
@click.argument("arguments", metavar="FOLDER [AGENT OPTIONS]...", nargs=-1)
@click.pass_context
def service(context: click.Context, user: str, arguments: tuple[str, ...]) -> None:
    """Print a systemd unit that runs 'dpu-edge agent' for this store.

    To be written to /etc/systemd/system/dpu-edge-agent.service.
    """
    from edge_runtime.cli import store_root

    root = store_root(context)
    options = agent.make_context("agent", list(arguments), parent=context).params
    paths = {n: value for n, value in options.items() if isinstance(value, Path)}
    for path in (root, *paths.values()):
        if not re.fullmatch(r"/[\w ./:=@+,-]*", str(path)):
            raise click.UsageError(
                f"a unit needs absolute paths of letters, digits and ' ./:=@+,-', "
                f"not {str(path)!r}"
            )
    if options["once"]:
        raise click.UsageError("a service runs on; --once is for cron and timers")
    folder = paths.pop("folder")
    writable = [root, *(path.parent for path in paths.values())]
    writable += [folder] if options["remove_applied"] else []
    command = [sys.executable, "-m", "edge_runtime", "--store", str(root), "agent"]
    values = {
        "USER": user,
        "STORE": str(root),
        "COMMAND": shlex.join([*command, *arguments]),
        "MOUNTS": shlex.join([str(root), str(folder)]),
        "WRITABLE": shlex.join(map(str, dict.fromkeys(writable))),
    }
    unit = Path(__file__).with_name("dpu-edge-agent.service").read_text()
    print(re.sub(r"@([A-Z]+)@", lambda found: values[found[1]], unit), end="")
