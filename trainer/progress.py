# SPDX-License-Identifier: Apache-2.0
"""Progress on standard error: a bar on a terminal, else one line a round."""

import math
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

from edge_runtime.commandline import say
from edge_runtime.formats.model_folder import SHARES, round_name

if TYPE_CHECKING:
    from trainer.folder.record import RoundRecord
    from trainer.rounds.round import Progress

WIDTH = 24  # of the bar
WINDOW = 40  # epochs whose pace the estimate follows: later rounds are longer
CLEAR = "\r\x1b[K"


class Bar:
    """One line of a terminal that says how far a run is and how long it still takes."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._seen: deque[tuple[float, int]] = deque(maxlen=WINDOW)

    def note(self, text: str) -> None:
        """Say what is done before the first epoch ends; there is no estimate yet."""
        print(f"{CLEAR}{text}", end="", file=self._stream, flush=True)

    def show(self, progress: "Progress") -> None:
        """Show an epoch that has ended, or a round."""
        total = progress.rounds * progress.epochs
        done = progress.round * progress.epochs + progress.epoch
        self._seen.append((time.monotonic(), done))
        filled = WIDTH * done // total
        bar = "#" * filled + "-" * (WIDTH - filled)
        self.note(
            f"[{bar}] {100 * done // total:3} %  {round_name(progress.round)} "
            f"{progress.phase:<7}{self._left(total - done)}"
        )

    def _left(self, epochs: int) -> str:
        """Estimate the time left from the last epochs; resumed ones do not count."""
        (start, first), (now, last) = self._seen[0], self._seen[-1]
        if last <= first or not epochs:
            return ""
        seconds = round(epochs * (now - start) / (last - first))
        return f"about {seconds // 60}:{seconds % 60:02d} left"


@contextmanager
def shown_progress(*, quiet: bool) -> Iterator[Callable[["Progress"], None]]:
    """Show progress on standard error; nothing if quiet."""
    if quiet or not sys.stderr.isatty():
        yield lambda p: None if quiet or not p.record else say(round_line(p.record))
        return
    bar = Bar(sys.stderr)
    bar.note("loading torch, data and network ...")
    try:
        yield bar.show
    finally:
        print(file=sys.stderr)


def round_line(record: "RoundRecord") -> str:
    """Return a round in one line."""
    metrics, name = record.metrics, record.metric
    outcome = str(record.outcome) + (" (re-init)" if record.reinitialised else "")
    values = (
        _shown(metrics.get(f"{half}_{name}", math.nan), name)
        for half in ("val", "test")
    )
    waiting = metrics.get("waiting_bytes")
    note = f"  a better one waits: its patch has {waiting:,} bytes" if waiting else ""
    return (
        f"{round_name(record.round)}  {outcome:<17} {metrics['changed']:>9} "
        + " ".join(f"{value:>7}" for value in values)
        + note
    )


def _shown(value: float, metric: str) -> str:
    return f"{value:.2%}" if metric in SHARES else f"{value:.5g}"


def round_table(records: "list[RoundRecord]") -> Iterator[str]:
    """Yield rounds as lines of a table."""
    name = records[0].metric if records else "accuracy"
    what = "" if name == "accuracy" else f"  {name}, {records[0].better} is better"
    yield f"{'round':<9} {'outcome':<17} {'changed':>9} {'val':>7} {'test':>7}{what}"
    yield from map(round_line, records)
