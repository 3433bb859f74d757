# SPDX-License-Identifier: Apache-2.0
"""What was decided about each file, remembered over restarts in the status file."""

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import edge_runtime
from edge_runtime.agent.plan import Decision
from edge_runtime.errors import DpuError
from edge_runtime.formats.header import KNOWN_CRITICAL, VERSION
from edge_runtime.limits import VARIABLE
from edge_runtime.store.state import State


@dataclass(slots=True)
class Found:
    """What became of a file, as the status file keeps it.

    Attributes:
        identity: Inode, size and times: another file, or other content, has another.
        verdict: What was decided last.
        reason: Why.
        error: The kind of error for which this very file is refused for good.
    """

    identity: list[int]
    verdict: str = ""
    reason: str = ""
    error: str = ""


class Decisions:
    """The last decision about each file that is in the folder."""

    def __init__(self, status: Mapping[str, Any], log: Callable[..., None]) -> None:
        """Take up what a status file says; ``log`` is told what is decided anew."""
        self._log = log
        self._basis = status.get("basis", [])
        files = status.get("files", {}).items()
        self._files = {name: Found(**facts) for name, facts in files}

    def __iter__(self) -> Iterator[str]:
        """Yield the names of the files that were there at the last look."""
        return iter(self._files)

    def is_refused(self, name: str) -> bool:
        """Return whether this very file is refused for good."""
        return bool(self._files[name].error)

    def follow(self, seen: Mapping[str, list[int]], state: State) -> set[str]:
        """Forget what is gone or was judged by other rules; return what is new.

        Args:
            seen: The files that are there now, with their identities.
            state: Of the store: whom it trusts, and for which model.
        """
        # What a refusal depends on beside the file.
        basis = [edge_runtime.__version__, VERSION, KNOWN_CRITICAL]
        basis += [state.model, state.init]
        basis += [state.trust.threshold, *state.trust.keys]
        basis += [state.key_list.root.sha256] if state.key_list else []
        basis += filter(None, [os.environ.get(VARIABLE)])  # what readers accept at most
        if basis != self._basis:
            self._basis, self._files = basis, {}
        former, self._files, new = self._files, {}, set()
        for name, identity in seen.items():
            found = former.get(name, Found([]))
            if found.identity != identity:
                new.add(name)
                # A file that grows goes on waiting, without another line in the log.
                verdict = found.verdict if found.verdict == Decision.WAITING else ""
                found = Found(identity, verdict, found.reason)
            self._files[name] = found
        return new

    def decide(
        self, name: str, verdict: Decision, reason: str, error: DpuError | None = None
    ) -> None:
        """Note a decision, and log it unless it is the one that was made before.

        Args:
            name: Of the file.
            verdict: What was decided.
            reason: Why.
            error: Why the very file is refused for good, if it is.
        """
        found = self._files[name]
        if (found.verdict, found.reason) == (verdict, reason):
            return
        found.verdict, found.reason = verdict, reason
        facts = {"file": name, "reason": reason}
        if error:
            found.error = facts["error"] = type(error).__name__
        if verdict is not Decision.APPLIED:  # that is told when it happens
            self._log(verdict, **facts)

    def record(self) -> dict[str, object]:
        """Return what the status file keeps."""
        files = {name: asdict(found) for name, found in self._files.items()}
        return {"basis": self._basis, "files": files}
