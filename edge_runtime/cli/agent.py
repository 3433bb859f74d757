# SPDX-License-Identifier: Apache-2.0
"""``dpu-edge agent``: keep a model at the newest release in a folder."""

import json
import re
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge_runtime.commandline import SCHEMA, progress, say
from edge_runtime.parameters import NewFile, Seconds
from edge_runtime.times import utc

if TYPE_CHECKING:
    from edge_runtime.agent.agent import Agent

LONGEST_SLEEP_S = 1.0  # a signal waits no longer, and systemd's watchdog neither


@click.command()
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.option("--once", is_flag=True, help="Look once, for cron and timers.")
@click.option(
    "--interval",
    "--every",
    "interval",
    metavar="SPAN",
    type=Seconds(0.1),
    default="10s",
    help="Time between two looks, such as 1m or 60 (seconds).",
)
@click.option(
    "--metrics",
    type=NewFile(),
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
    from edge_runtime.agent.status import PingingFiles, forget_left
    from edge_runtime.files import Files
    from edge_runtime.store.store import exclusive_lock
    from edge_runtime.update.device import Device

    log: Callable[..., None] = _log_json if as_json else _log
    device = Device.open(root)  # else a lock would be left where there is no store
    if name := device.store.summary().get("name"):
        log = partial(log, name=name)  # several models may share one journal
    problem = f"another agent is at work for {root}; stop it first"
    with exclusive_lock(Files().open_lock(root / "agent.lock"), problem):
        forget_left(root, metrics)
        watcher = Agent(
            partial(Device.open, root, files=PingingFiles()),
            folder,
            log,
            metrics=metrics,
        )
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
    from edge_runtime.agent.status import ping, sd_notify

    _stop_on_signals(agent)
    log("started", round=agent.state.active_slot.round)
    sd_notify("READY=1")
    while not agent.stopping:
        # Whatever it was, it was reported, and the agent tries again.
        with suppress(Exception):
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
    progress(json.dumps(record))


def _log(event: str, **facts: Any) -> None:
    pairs = {"at": utc(), "event": event} | facts
    say(" ".join(f"{key}={_logfmt(str(value))}" for key, value in pairs.items()))


def _logfmt(value: str) -> str:
    is_plain = re.fullmatch(r"[\w.:/+-]+", value, re.ASCII)
    return value if is_plain else json.dumps(value)
