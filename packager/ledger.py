# SPDX-License-Identifier: Apache-2.0
"""The ledger of a run's releases: ``runs/NAME/releases.jsonl``.

One JSON object a line, the oldest first: release counter, target, parent, who signed
it, file, SHA-256, when, where to. A release counter belongs to its target, and on
devices it only ever grows; the ledger knows which ones are given out, so that the next
one is right by itself, also after a release that went back to an older round.

A line is on the disk before its file gets its name: a counter that may have left the
house is never given to other weights. So a last line that was cut off belongs to a file
that was never written, and is taken away. Where the ledger is missing, or lacks files
that lie beside the rounds, their headers tell the same.
"""

import hashlib
import io
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from errno import EACCES, EPERM, EROFS
from io import FileIO
from pathlib import Path

from edge_runtime.errors import DpuError, RoundError
from edge_runtime.files import Files, lock_file
from edge_runtime.formats.json_file import parse_record
from edge_runtime.formats.model_folder import MODEL_NAME
from edge_runtime.formats.weights import fingerprint_file
from edge_runtime.reading import read_bounded
from edge_runtime.times import MAX_SECONDS, utc
from packager.build import write_file
from packager.packed_file import keep_signed, read_facts
from packager.release import (
    Release,
    as_text,
    decode_release,
    encode_release,
    not_readable,
    release_of,
)

LEDGER_NAME = "releases.jsonl"
HERE = "."  # where to: the run's own folder
PATTERNS = ("*.dpu", "*.bundle.zip")
_READ_ONLY = (EACCES, EPERM, EROFS)


class Ledger:
    """What is known of a run's releases, and the way to make another one.

    Attributes:
        path: The file.
        listed: Its releases, oldest first.
        found: Files beside the rounds that it does not have.
        notes: What a person should hear.
    """

    def __init__(self, run: Path, file: FileIO | None = None) -> None:
        """Read a ledger; use :func:`read_ledger` or :func:`open_ledger` to get one.

        Raises:
            RoundError: A line of it is malformed.
            OSError: It cannot be read.
        """
        self.run, self.path, self._file = run, run / LEDGER_NAME, file
        self.notes: list[str] = []
        self._end = 0  # of the last whole line
        self.listed = list(self._lines())
        self.found = sorted(self._unlisted(), key=lambda release: release.counter)

    @property
    def releases(self) -> list[Release]:
        """All that is known, by counter."""
        return sorted([*self.found, *self.listed], key=lambda r: (r.counter, r.at))

    def released(self, model: str) -> list[Release]:
        """Return what was released of a model; what else lies there does not count."""
        return [release for release in self.releases if release.model == model]

    def counter_of(self, model: str, target: str) -> int | None:
        """Return the newest counter of some weights; None where there is none."""
        counters = (r.counter for r in self.released(model) if r.target == target)
        return max(counters, default=None)

    # Writing ------------------------------------------------------------------------

    def publish(self, data: bytes, path: Path, *, force: bool = False) -> bool:
        """Write a finished file, and a line about it before that.

        Args:
            data: The bytes of a patch or bundle.
            path: Where to.
            force: Replace what is there, whatever it is.

        Returns:
            Whether it was written; a signed file that is the same otherwise is kept.

        Raises:
            DpuError: As :func:`packager.packed_file.keep_signed`.
            OSError: The disk refuses.
            VerificationError: The disk gives other bytes than were written.
        """
        data, note = _kept(data, path, force=force)
        self.notes += [note] if note else []
        if not data:
            return False
        before, folder = self._end, path.absolute().parent
        here = folder.resolve() == self.run.resolve()
        release = release_of(
            read_facts(data),
            file=as_text(path.name),
            to=HERE if here else as_text(folder),
            size=len(data),
            sha256=hashlib.sha256(data).hexdigest(),
            at=utc(),
        )
        if here:
            Files().forget(path)  # what a killed packer left
        try:
            write_file(data, path, lambda: self.record(release))
        except BaseException:
            self._truncate(before)  # there is no such file, so no such release
            raise
        return True

    def is_cut(self, release: Release) -> bool:
        """Return whether a release's packer was killed before its file had its name."""
        path = self.run / release.file
        lacks = release.to == HERE and not os.path.lexists(path)
        return lacks and bool(Files().left_of(path))

    def record(self, release: Release) -> None:
        """Append a line, after those for files that the ledger lacks; durably."""
        same = [r for r in self.listed if (r.file, r.to) == (release.file, release.to)]
        if same and same[-1].sha256 == release.sha256:
            return
        if self._file is None:
            self.notes.append(
                f"{self.path} cannot be written: this release is not recorded, so keep "
                f"its counter, {release.counter}, in mind"
            )
            return
        found = [r for r in self.found if (r.file, r.to) != (release.file, release.to)]
        lines = b"".join(map(encode_release, [*found, release]))
        self._truncate(self._end)
        self._file.seek(self._end)
        try:
            rest = memoryview(lines)
            while rest:
                rest = rest[self._file.write(rest) :]
            Files().sync(self._file.fileno())
            Files().sync_folder(self.run)  # the file's temporary name too
        except OSError as err:
            self._truncate(self._end)
            err.filename = err.filename or str(self.path)
            raise
        self._end += len(lines)
        self.listed += [*found, release]
        self.found = []

    def _truncate(self, size: int) -> None:
        if self._file is not None:
            self._file.truncate(size)

    # Reading ------------------------------------------------------------------------

    def _lines(self) -> Iterator[Release]:
        try:
            name = str(self.path)
            _insist_file(self.path)
            data = read_bounded(self.path, "ledger_bytes", name, RoundError)
        except FileNotFoundError:
            return
        for number, line in enumerate(io.BytesIO(data), 1):  # one by one: in no memory
            if not line.endswith(b"\n"):
                break
            what = f"{self.path}, line {number},"
            try:
                record = parse_record(line[:-1], "record_bytes", what, RoundError)
            except RoundError as err:
                raise not_readable(err) from err
            yield decode_release(record)
            self._end += len(line)
        if self._end < len(data):
            self.notes.append(
                f"the last line of {self.path} was cut off, before its file was "
                "written; it is left out"
            )

    def _unlisted(self) -> Iterator[Release]:
        """Yield what lies beside the rounds and is not in the ledger as it is now."""
        listed = {
            (r.file, r.counter, r.target, r.parent, r.signers) for r in self.listed
        }
        for pattern in PATTERNS:
            for path in sorted(self.run.glob(pattern)):
                try:
                    facts, name = read_facts(path), as_text(path.name)
                    header = facts.header
                    key = name, header.counter, header.target, header.parent
                    if (*key, facts.signers) not in listed:
                        yield release_of(
                            facts,
                            file=name,
                            to=HERE,
                            size=path.stat().st_size,
                            sha256=fingerprint_file(path),
                            # Any, on a disk: archives write the year 1.
                            at=utc(min(max(path.stat().st_mtime, 0), MAX_SECONDS)),
                        )
                except (DpuError, OSError) as err:
                    self.notes.append(f"{path} is not counted: {err}")


def read_ledger(run: Path) -> Ledger:
    """Read what is known of a run's releases, and change nothing.

    Raises:
        RoundError: A line of the ledger is malformed.
        OSError: It cannot be read.
    """
    return Ledger(run)


def publish_file(
    data: bytes,
    path: Path,
    *,
    force: bool = False,
    say: Callable[[str], None] = lambda _words: None,
) -> bool:
    """Write a finished file that no round stands for.

    It is recorded where it goes into a run's folder; anywhere else nobody would look.

    Args:
        data: The bytes of a patch or bundle.
        path: Where to.
        force: Replace what is there, whatever it is.
        say: Told what a person should hear.

    Returns:
        As :meth:`Ledger.publish`.

    Raises:
        DpuError: As :func:`packager.packed_file.keep_signed`.
        OSError: The disk refuses.
    """
    run = path.absolute().parent
    if not (run / MODEL_NAME).is_dir():
        data, note = _kept(data, path, force=force)
        if note:
            say(note)
        if data:
            write_file(data, path)
        return bool(data)
    with open_ledger(run, say) as ledger, telling(ledger, say):
        return ledger.publish(data, path, force=force)


def _kept(data: bytes, path: Path, *, force: bool) -> tuple[bytes, str]:
    data, signers = keep_signed(data, path, force=force)
    what = "their signatures are kept" if data else "it is left as it is"
    note = (
        f"{path} is this very file, signed by {signers}: {what} (--force gives the "
        "signatures up)"
    )
    return data, note if signers else ""


@contextmanager
def open_ledger(
    run: Path, waiting: Callable[[str], None] = lambda _words: None
) -> Iterator[Ledger]:
    """Open a run's ledger to make releases; other packers wait until it is closed.

    Where the run's folder cannot be written it is read, and a note says so as soon as
    a release cannot be recorded.

    Args:
        run: The run's folder.
        waiting: Told if another packer is at work.

    Raises:
        RoundError: A line of the ledger is malformed.
        OSError: It cannot be read, or the file system has no locks.
    """
    path = run / LEDGER_NAME
    try:
        file = _open_locked(path, waiting)
    except OSError as err:
        if err.errno not in _READ_ONLY:
            raise
        yield read_ledger(run)
        return
    with file:
        try:
            yield Ledger(run, file)
        finally:
            if not file.seek(0, os.SEEK_END):
                path.unlink()  # nothing was released: no trace of it either


@contextmanager
def telling(ledger: Ledger, say: Callable[[str], None]) -> Iterator[None]:
    """Tell a ledger's notes in the end, each once, however that ends."""
    try:
        yield
    finally:
        for note in dict.fromkeys(ledger.notes):
            say(note)


def _insist_file(path: Path) -> None:
    """Insist on a file, where there is something: a pipe would wait for ever."""
    if path.exists() and not path.is_file():
        raise RoundError(
            f"{path} is no ordinary file; move it away: the ledger is made again from "
            "the patches beside the rounds"
        )


def _open_locked(path: Path, waiting: Callable[[str], None]) -> FileIO:
    _insist_file(path)
    while True:
        with ExitStack() as stack:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            file = stack.enter_context(open(handle, "r+b", buffering=0))
            _lock(file, path, waiting)
            # Whoever held it before may have taken an empty file away.
            if _is_named(file, path):
                stack.pop_all()
                return file


def _lock(file: FileIO, path: Path, waiting: Callable[[str], None]) -> None:
    try:
        lock_file(file, path)
    except BlockingIOError:
        waiting(f"another program makes releases of {path.parent}; waiting for it")
        lock_file(file, path, wait=True)


def _is_named(file: FileIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
