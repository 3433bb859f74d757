# SPDX-License-Identifier: Apache-2.0
"""Do agent, sync and their folder do their work, and are reports sent?"""

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edge_runtime.doctor.finding import Finding, Findings, Health
from edge_runtime.doctor.stored import grave_for, is_held
from edge_runtime.errors import DpuError
from edge_runtime.live.outbox import Outbox, read_told
from edge_runtime.store.store import Store
from edge_runtime.sync.plan import SyncResult
from edge_runtime.sync.story import QUIET_S, Known, age, span, tell
from edge_runtime.sync.sync import FAILED

SILENT_S = 2 * 86_400  # without an answer of the channel's server


def agent(root: Path, status: Mapping[str, Any]) -> Findings:
    """Look at what the agent says of itself."""
    if not status:
        todo = "'dpu-edge agent FOLDER', or 'dpu-edge service' for a unit"
        yield Finding("agent", Health.NOTE, "none has ever looked here", todo)
        return
    quiet = time.time() - status["last_success"]
    if status["failing"]:
        yield Finding("agent", Health.WRONG, status["failing"])
        return
    try:
        runs = is_held(root / "agent.lock")
    except OSError as err:
        yield Finding("agent", Health.WRONG, str(err), "remove what is there")
        return
    words = {
        True: "it runs",
        False: "none runs now",
        None: "whether it runs only its own user sees",
    }
    if quiet > QUIET_S and not runs:
        problem = f"{words[runs]}, and none has looked for {span(quiet)}"
        yield Finding("agent", Health.WRONG, problem, "start its unit")
    else:
        known = f"{words[runs]}; all was well {age(quiet)}"
        yield Finding("agent", Health.OK, known)


def folder(root: Path, path: Path | None) -> Findings:
    """Look whether the agent's folder can be read."""
    try:
        if path is not None:
            os.scandir(path).close()
    except OSError as err:
        todo = "mount or make it, or give the folder that the agent looks at"
        yield Finding("folder", grave_for(root), str(err), todo)


def sync(store: Store, status: Mapping[str, Any], known: Known) -> Findings:
    """Look at what the network side knows of the newest release."""
    story = tell(store, status, known)
    if known.problem:
        todo = "remove the file if nobody can mend it: a floor goes with it"
        yield Finding("sync", Health.WRONG, known.problem, todo)
    elif known.state is None:
        yield Finding("sync", Health.NOTE, story["reason"])
    elif known.state.result == FAILED:
        yield Finding(
            "sync", Health.WRONG, f"the last look failed: {known.state.reason}"
        )
    elif known.state.checked and (story["age_s"] or 0) > SILENT_S:
        words = f"the server last answered {age(story['age_s'])}"
        yield Finding("sync", Health.WRONG, words, "is its unit running?")
    elif known.state.result == SyncResult.STALE:
        todo = "has its publisher published lately, and is this device's clock right?"
        yield Finding("sync", Health.WRONG, known.state.reason, todo)
    elif known.state.result in (SyncResult.NO_ROOM, SyncResult.NO_WAY):
        yield Finding("sync", Health.WRONG, story["summary"])
    else:
        yield Finding("sync", Health.OK, story["summary"])


def reports(root: Path, path: Path | None) -> Findings:
    """Look for reports that nobody fetches; they hold no update back."""
    try:
        sent = read_told(path).sent if path else ()
        waiting = [r for r in Outbox(root).waiting() if r.n not in sent]
        oldest = min((r.path.stat().st_mtime for r in waiting), default=time.time())
    except (DpuError, OSError) as err:
        yield Finding("reports", Health.NOTE, str(err))
        return
    if time.time() - oldest > SILENT_S:
        words = f"{len(waiting)} wait to be sent, the oldest was made "
        todo = "is sync started with --report, and does the last look say why not?"
        yield Finding("reports", Health.NOTE, words + age(time.time() - oldest), todo)
