# SPDX-License-Identifier: Apache-2.0
"""Other ways to send new weights: each one made and applied the same way.

A tool is a pair of functions and an entry in ``TOOLS``. Applying does equal work in
each: read base and patch, write the target, take its SHA-256, fsync it. None of these
tools is needed by the project; :mod:`tools.bench.measure` runs them.
"""

import hashlib
import importlib.util
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

CHUNK_BYTES = 1 << 20
XDELTA_WINDOW_BYTES = 64 << 20  # its own default


class Kind(StrEnum):
    """What a tool sends."""

    OURS = "ours"
    DELTA = "delta"  # a general tool that knows nothing of weights
    NAIVE = "naive"  # what one writes in ten lines of NumPy
    FULL = "full"  # needs no base, so applying it does less work


Make = Callable[[Path, Path, Path], None]  # base, target, patch
Apply = Callable[[Path, Path, Path], str]  # base, patch, target -> its SHA-256


@dataclass(frozen=True, slots=True)
class Tool:
    """One way to send new weights.

    Attributes:
        key: Its name on the command line and in JSON.
        title: Its name in tables.
        kind: What it sends.
        make: Writes a patch from a base to a target.
        apply: Writes the target, fsyncs it and returns its SHA-256.
        install: How to get it.
        modules: What is imported before the work, timed apart.
        programs: What is started, searched on ``PATH``.
        idle: A command that starts the program and does nothing.
    """

    key: str
    title: str
    kind: Kind
    make: Make = field(repr=False)
    apply: Apply = field(repr=False)
    install: str = ""
    modules: tuple[str, ...] = ()
    programs: tuple[str, ...] = ()
    idle: tuple[str, ...] = ()

    def missing(self) -> list[str]:
        """Return the modules and programs that are not installed."""
        found = importlib.util.find_spec
        absent = [name for name in self.modules if not found(name.partition(".")[0])]
        return absent + [name for name in self.programs if not shutil.which(name)]


# What all of them share --------------------------------------------------------------


class Target:
    """The target on its way to the disk: hashed as it is written."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "wb")
        self._digest = hashlib.sha256()

    def write(self, data: Any) -> int:
        """Write and hash the next bytes."""
        self._digest.update(data)
        return self._file.write(data)

    def finish(self) -> str:
        """Put them on the disk; return their SHA-256."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return self._digest.hexdigest()


def _deliver(data: Any, path: Path) -> str:
    """Write a target that is whole in memory."""
    target = Target(path)
    target.write(data)
    return target.finish()


def _settle(path: Path) -> str:
    """Hash and fsync a target that a program has written."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        os.fsync(file.fileno())
    return digest.hexdigest()


def _run(*command: str | Path) -> None:
    """Run a program.

    Raises:
        CalledProcessError: It failed; what it said is on standard error.
    """
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


# Ours --------------------------------------------------------------------------------


def _make_ours(base: Path, target: Path, patch: Path) -> None:
    # Unlike the others it applies what it made and compares, before writing it.
    from edge_runtime.formats.weights import read_weights
    from packager.build import build_patch, header_for

    old, new = read_weights(base), read_weights(target)
    header = header_for(old, new, model="00" * 32, round_=1, counter=1)
    patch.write_bytes(build_patch(old, new, header))


def _apply_ours(base: Path, patch: Path, target: Path) -> str:
    from edge_runtime.files import Files
    from edge_runtime.formats.apply import apply_chunks
    from edge_runtime.formats.layout import read_layout
    from edge_runtime.formats.patch import open_patch
    from edge_runtime.formats.weights import read_chunks

    with open(base, "rb") as file:
        layout = read_layout(file)
    with open_patch(patch) as opened:
        opened.check(layout)
        chunks = apply_chunks(read_chunks(base), layout, opened)
        Files().write(target, chunks)  # fsynced
        # apply_chunks has hashed what it gave and compared it with the header.
        return opened.header.target


# The whole file ----------------------------------------------------------------------


def _make_full(level: int) -> Make:
    def make(_base: Path, target: Path, patch: Path) -> None:
        import zstandard

        compressor = zstandard.ZstdCompressor(level=level, write_checksum=True)
        patch.write_bytes(compressor.compress(target.read_bytes()))

    return make


def _apply_full(_base: Path, patch: Path, target: Path) -> str:
    import zstandard

    out = Target(target)
    with open(patch, "rb") as file:
        for chunk in zstandard.ZstdDecompressor().read_to_iter(file):
            out.write(chunk)
    return out.finish()


# Sparse and XOR, the obvious ways ----------------------------------------------------


def _words(path: Path) -> Any:
    """Return a file as uint32; a rest of up to three bytes is padded with zeros."""
    import numpy as np

    data = path.read_bytes()
    return np.frombuffer(data + bytes(-len(data) % 4), "<u4")


def _make_sparse(base: Path, target: Path, patch: Path) -> None:
    import numpy as np
    import zstandard

    old, new = _words(base), _words(target)
    at = np.flatnonzero(old != new)
    raw = len(at).to_bytes(8, "little") + at.astype("<u4").tobytes() + new[at].tobytes()
    packed = zstandard.ZstdCompressor(level=19, write_checksum=True).compress(raw)
    patch.write_bytes(packed)


def _apply_sparse(base: Path, patch: Path, target: Path) -> str:
    import numpy as np
    import zstandard

    raw = zstandard.ZstdDecompressor().decompress(patch.read_bytes())
    count = int.from_bytes(raw[:8], "little")
    at, values = np.frombuffer(raw, "<u4", offset=8).reshape(2, count)
    words = _words(base).copy()
    words[at] = values
    return _deliver(words.view(np.uint8)[: base.stat().st_size], target)


def _make_xor(base: Path, target: Path, patch: Path) -> None:
    import zstandard

    compressor = zstandard.ZstdCompressor(level=19, write_checksum=True)
    patch.write_bytes(compressor.compress((_words(base) ^ _words(target)).tobytes()))


def _apply_xor(base: Path, patch: Path, target: Path) -> str:
    import numpy as np
    import zstandard

    raw = zstandard.ZstdDecompressor().decompress(patch.read_bytes())
    words = _words(base) ^ np.frombuffer(raw, "<u4")
    return _deliver(words.view(np.uint8)[: base.stat().st_size], target)


# Programs ----------------------------------------------------------------------------


def _make_zstd_from(base: Path, target: Path, patch: Path) -> None:
    _run("zstd", "-q", "-f", "-19", f"--patch-from={base}", target, "-o", patch)


def _apply_zstd_from(base: Path, patch: Path, target: Path) -> str:
    window = "--memory=2048MB"  # or bases above 128 MiB are refused
    _run("zstd", "-q", "-f", "-d", window, f"--patch-from={base}", patch, "-o", target)
    return _settle(target)


def _make_bsdiff(base: Path, target: Path, patch: Path) -> None:
    _run("bsdiff", base, target, patch)


def _apply_bspatch(base: Path, patch: Path, target: Path) -> str:
    _run("bspatch", base, target, patch)
    return _settle(target)


def _make_xdelta(base: Path, target: Path, patch: Path) -> None:
    window = str(max(base.stat().st_size, XDELTA_WINDOW_BYTES))
    _run("xdelta3", "-e", "-9", "-f", "-B", window, "-s", base, target, patch)


def _apply_xdelta(base: Path, patch: Path, target: Path) -> str:
    window = str(max(base.stat().st_size, XDELTA_WINDOW_BYTES))
    _run("xdelta3", "-d", "-f", "-B", window, "-s", base, patch, target)
    return _settle(target)


# Python packages ---------------------------------------------------------------------


def _make_bsdiff4(base: Path, target: Path, patch: Path) -> None:
    import bsdiff4

    patch.write_bytes(bsdiff4.diff(base.read_bytes(), target.read_bytes()))


def _apply_bsdiff4(base: Path, patch: Path, target: Path) -> str:
    import bsdiff4

    return _deliver(bsdiff4.patch(base.read_bytes(), patch.read_bytes()), target)


def _make_hdiffpatch(config: str) -> Make:
    def make(base: Path, target: Path, patch: Path) -> None:
        import hdiffpatch

        best = getattr(hdiffpatch, config).best_compression()
        old, new = base.read_bytes(), target.read_bytes()
        patch.write_bytes(hdiffpatch.diff(old, new, best, validate=False))

    return make


def _apply_hdiffpatch(base: Path, patch: Path, target: Path) -> str:
    import hdiffpatch

    return _deliver(hdiffpatch.apply(base.read_bytes(), patch.read_bytes()), target)


def _make_detools(algorithm: str, patch_type: str, compression: str) -> Make:
    def make(base: Path, target: Path, patch: Path) -> None:
        import detools

        detools.create_patch_filenames(
            str(base),
            str(target),
            str(patch),
            compression=compression,
            algorithm=algorithm,
            patch_type=patch_type,
        )

    return make


def _apply_detools(base: Path, patch: Path, target: Path) -> str:
    import detools

    out = Target(target)
    with open(base, "rb") as old, open(patch, "rb") as file:
        detools.apply_patch(old, file, out)
    return out.finish()


# The table ---------------------------------------------------------------------------

_ZSTD = ("zstandard",)
_ARRAYS = ("numpy", "zstandard")
_DETOOLS = (
    ("bsdiff", "sequential", "lzma"),
    ("bsdiff", "sequential", "zstd"),
    ("hdiffpatch", "hdiffpatch", "lzma"),
    ("hdiffpatch", "hdiffpatch", "zstd"),
)


def _tools() -> Iterator[Tool]:
    with_runtime = "with dpu-edge"
    yield Tool(
        "ours", "dpu patch", Kind.OURS, _make_ours, _apply_ours, with_runtime,
        ("edge_runtime.formats.apply", "edge_runtime.files"),
    )  # fmt: skip
    for level in (3, 19):
        yield Tool(
            f"full-zstd-{level}", f"full weights, zstd -{level}", Kind.FULL,
            _make_full(level), _apply_full, with_runtime, _ZSTD,
        )  # fmt: skip
    yield Tool(
        "zstd-patch-from", "zstd -19 --patch-from", Kind.DELTA,
        _make_zstd_from, _apply_zstd_from, "apt install zstd",
        programs=("zstd",), idle=("zstd", "--version"),
    )  # fmt: skip
    yield Tool(
        "bsdiff4", "bsdiff4 (Python)", Kind.DELTA, _make_bsdiff4, _apply_bsdiff4,
        "pip install bsdiff4", ("bsdiff4",),
    )  # fmt: skip
    yield Tool(
        "bsdiff", "bsdiff (Debian)", Kind.DELTA, _make_bsdiff, _apply_bspatch,
        "apt install bsdiff", programs=("bsdiff", "bspatch"), idle=("bspatch",),
    )  # fmt: skip
    yield Tool(
        "xdelta3", "xdelta3 -9", Kind.DELTA, _make_xdelta, _apply_xdelta,
        "apt install xdelta3", programs=("xdelta3",), idle=("xdelta3", "-V"),
    )  # fmt: skip
    for name, config in (("zstd", "ZStdConfig"), ("lzma2", "Lzma2Config")):
        yield Tool(
            f"hdiffpatch-{name}", f"HDiffPatch, {name}", Kind.DELTA,
            _make_hdiffpatch(config), _apply_hdiffpatch,
            "pip install hdiffpatch", ("hdiffpatch",),
        )  # fmt: skip
    for algorithm, patch_type, compression in _DETOOLS:
        yield Tool(
            f"detools-{algorithm}-{compression}",
            f"detools {algorithm}, {compression}", Kind.DELTA,
            _make_detools(algorithm, patch_type, compression), _apply_detools,
            "pip install detools", ("detools",),
        )  # fmt: skip
    yield Tool(
        "sparse", "naive sparse (u32, f32), zstd -19", Kind.NAIVE,
        _make_sparse, _apply_sparse, with_runtime, _ARRAYS,
    )  # fmt: skip
    yield Tool(
        "xor", "XOR of the file, zstd -19", Kind.NAIVE,
        _make_xor, _apply_xor, with_runtime, _ARRAYS,
    )  # fmt: skip


TOOLS = {tool.key: tool for tool in _tools()}
