"""``dpu-edge agent`` and ``dpu-edge service``."""

import json
import os
import re
import select
import signal
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge_runtime.command import SCHEMA, say

if TYPE_CHECKING:
    from edge_runtime.agent import Agent
    from edge_runtime.notify import Notifier

UNIT_NAME = "dpu-edge-agent.service"
_path = click.Path(dir_okay=False, path_type=Path)


class _Address(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    name = "address"

    def convert(self, value: Any, *_: Any) -> tuple[str, int]:
        host, colon, port = str(value).rpartition(":")
        if not (host and colon and port.isdecimal()):
            self.fail(f"{value!r} is not HOST:PORT, such as 127.0.0.1:9108")
        return host, int(port)


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
@click.option(
    "--listen", metavar="HOST:PORT", type=_Address(), help="Serve metrics by HTTP."
)
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
    listen: tuple[str, int] | None,
    as_json: bool,
) -> None:
    """Keep the model at the newest release that patches in FOLDER lead to.

    Says one line a decision on standard error, and nothing while nothing changes.
    Refused patches are logged and are no failure of this command.
    """
    from edge_runtime.agent import Agent
    from edge_runtime.cli import store_root
    from edge_runtime.metrics import serve_metrics
    from edge_runtime.notify import Notifier
    from edge_runtime.report import STATUS_NAME, Report

    root, notify = store_root(context), Notifier(os.environ)
    report = Report(
        _log_json if as_json else _log, status or root / STATUS_NAME, metrics
    )
    with Agent(
        root, folder, report, remove=remove_applied, ping=notify.ping
    ) as watcher:
        if once:
            watcher.look()
            return
        if listen:
            serve_metrics(*listen, lambda: report.metrics_text)
        _watch(watcher, interval, notify)


def _watch(agent: "Agent", interval_s: float, notify: "Notifier") -> None:
    """Look again and again until SIGTERM or SIGINT; neither interrupts an update."""
    from edge_runtime.errors import StoreError

    with _stop_signals(agent) as wake:
        notify.tell("READY=1")
        agent.report.note("started", round=agent.state.active_slot.round)
        while not agent.stopping:
            # A failure is reported, and tried again.
            with suppress(StoreError, OSError):
                if agent.look():
                    notify.tell(f"STATUS=round {agent.state.active_slot.round}")
            until = time.monotonic() + interval_s
            while not agent.stopping and (left := until - time.monotonic()) > 0:
                notify.ping()
                select.select([wake], [], [], min(left, notify.ping_s or left))
        notify.tell("STOPPING=1")
        agent.report.note("stopped", round=agent.state.active_slot.round)


@contextmanager
def _stop_signals(agent: "Agent") -> Iterator[socket.socket]:
    """Let signals stop the agent, and wake who waits for the socket."""
    wake, alarm = socket.socketpair()
    alarm.setblocking(False)
    with wake, alarm:
        former = signal.set_wakeup_fd(alarm.fileno())
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: setattr(agent, "stopping", True))
        try:
            yield wake
        finally:
            signal.set_wakeup_fd(former)


def _log_json(event: str, **facts: Any) -> None:
    from edge_runtime.report import now

    record = {"schema": SCHEMA, "at": now(), "event": event} | facts
    print(json.dumps(record), flush=True)


def _log(event: str, **facts: Any) -> None:
    from edge_runtime.report import now

    pairs = {"at": now(), "event": event} | facts
    say(" ".join(f"{key}={_logfmt(str(value))}" for key, value in pairs.items()))


def _logfmt(value: str) -> str:
    plain = re.fullmatch(r"[\w.:/+-]+", value, re.ASCII)
    return value if plain else json.dumps(value)


# The service --------------------------------------------------------------------------


@click.command(context_settings={"ignore_unknown_options": True})
@click.option("--user", default="root", show_default=True, help="Who runs the agent.")
@click.argument("arguments", metavar="FOLDER [AGENT OPTIONS]...", nargs=-1)
@click.pass_context
def service(context: click.Context, user: str, arguments: tuple[str, ...]) -> None:
    """Print a systemd unit that runs 'dpu-edge agent' for this store.

    To install it as dpu-edge-agent.service:

    dpu-edge --store STORE service --user pi FOLDER | sudo tee
    /etc/systemd/system/dpu-edge-agent.service; sudo systemctl enable --now
    dpu-edge-agent
    """
    from edge_runtime.cli import store_root

    options = agent.make_context("agent", list(arguments), parent=context).params
    if options["once"]:
        raise click.UsageError("--once is for cron and timers, not for a service")
    paths = {k: v.absolute() for k, v in options.items() if isinstance(v, Path)}
    root, folder = store_root(context).absolute(), paths["folder"]
    writable = [root, *(paths[k].parent for k in ("status", "metrics") if k in paths)]
    writable += [folder] if options["remove_applied"] else []
    command = [sys.executable, "-m", "edge_runtime", "--store", str(root), "agent"]
    command += _agent_words(options | paths)
    values = {
        "USER": user,
        "STORE": str(root).replace("%", "%%"),
        "COMMAND": " ".join(_unit_word(word).replace("$", "$$") for word in command),
        "MOUNTS": _unit_words([root, folder]),
        "WRITABLE": _unit_words(writable),
        "PRIVATE_NETWORK": "no" if options["listen"] else "yes",
        "FAMILIES": "AF_UNIX AF_INET AF_INET6" if options["listen"] else "AF_UNIX",
    }
    unit = Path(__file__).with_name(UNIT_NAME).read_text()
    print(re.sub(r"@([A-Z_]+)@", lambda found: values[found[1]], unit), end="")


def _agent_words(options: dict[str, Any]) -> Iterator[str]:
    """Yield the arguments that give these options to the agent."""
    for parameter in agent.params:
        value = options.get(parameter.name or "")
        if value in (None, False):
            continue
        if isinstance(parameter, click.Option):
            yield parameter.opts[0]
        if value is not True:
            yield ":".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _unit_words(paths: Sequence[Path]) -> str:
    return " ".join(dict.fromkeys(_unit_word(str(path)) for path in paths))


def _unit_word(word: str) -> str:
    """Quote a word for a unit file; there, a percent sign has a meaning of its own."""
    word = word.replace("\\", "\\\\").replace("%", "%%").replace('"', '\\"')
    return word if re.fullmatch(r"[\w%./:=@+,-]+", word) else f'"{word}"'
