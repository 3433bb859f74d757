# SPDX-License-Identifier: Apache-2.0
"""One section of a patch: stored as it is, or one zstd frame; both directions.

Readers hand out its bytes in pieces, so that the memory needed to apply a patch does
not depend on its size. FORMAT.md is the normative description.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from threading import local
from typing import BinaryIO, cast

import zstandard

from edge_runtime.errors import PatchFormatError
from edge_runtime.formats.spool import Spool

STORED, ZSTD = 0, 1
MAX_WINDOW_LOG = 18  # zstd window of 256 KiB: bounds what a device must hold a section
_BLOCK_BYTES = 1 << 17  # of zstd; longer runs are split by it anyway
_SEARCH_BYTES = 1 << 20  # sections up to this size are compressed in several ways
READ_BYTES = 1 << 16
_MAGIC = b"\x28\xb5\x2f\xfd"  # a skippable frame begins with another
LEVEL = 19  # of zstd, 1 to 22: a patch is packed once and sent often
# Each block of a frame is looked at. Ours have kilobytes; small tensors' have less.
MAX_BLOCKS, BYTES_A_BLOCK = 1 << 16, 128


@dataclass(frozen=True, slots=True)
class Section:
    """One entry of the section table.

    Attributes:
        kind: What it holds, one of ``KINDS``.
        encoding: ``STORED`` or ``ZSTD``.
        packed_size: Bytes in the file.
        raw_size: Bytes once unpacked.
        offset: Where the packed bytes begin, from the start of the file.
    """

    kind: int
    encoding: int
    packed_size: int
    raw_size: int
    offset: int


Parts = Sequence[bytes] | Spool
_Way = Callable[[], bytes]


def pack_section(
    parts: Parts, level: int, pool: Executor | None = None
) -> tuple[int, bytes]:
    """Choose the smallest encoding of a section.

    Args:
        parts: Its content; a new zstd block may begin with a part, so that parts of
            different statistics do not share one Huffman table.
        level: zstd level, 1 to 22.
        pool: Threads to compress in; none: one way after the other.

    Returns:
        The encoding and the packed bytes.
    """
    raw = as_spool(parts)
    small = raw.size <= _SEARCH_BYTES

    def ways(stops: Sequence[int], matches: Sequence[int]) -> list[_Way]:
        found = [partial(_compress, raw, stops, match, level) for match in matches]
        return [pool.submit(way).result for way in found] if pool else [*found]

    # Matches among symbols are mostly chance: how short a one may be matters.
    tried = ways([raw.size], (3, 4, 5, 7) if small else (3,))
    tried += ways(_blocks(raw), (3, 4, 5, 7) if small else (7,))
    packed = min((way() for way in tried), key=len)
    if len(packed) < raw.size:
        return ZSTD, packed
    return STORED, b"".join(raw.pieces())


def as_spool(parts: Parts) -> Spool:
    """Return parts as one piece."""
    if isinstance(parts, Spool):
        return parts
    spool = Spool()
    for part in parts:
        spool.write(part)
        spool.stops.append(spool.size)
    return spool


def _compress(raw: Spool, stops: Sequence[int], min_match: int, level: int) -> bytes:
    """Compress a section; a block of zstd ends at each stop."""
    parameters = zstandard.ZstdCompressionParameters.from_level(
        level,
        source_size=raw.size,
        window_log=min(MAX_WINDOW_LOG, max(10, (raw.size - 1).bit_length())),
        min_match=min_match,
    )
    out = zstandard.ZstdCompressor(compression_params=parameters).compressobj(raw.size)
    packed = list[bytes]()
    for start, stop in pairwise([0, *stops]):
        packed += map(out.compress, raw.pieces(start, stop))
        if stop < raw.size:
            packed.append(out.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK))
    return b"".join([*packed, out.flush()])


def _blocks(raw: Spool) -> list[int]:
    """Say where blocks end if one Huffman table serves neighbouring parts together."""
    stops = list[int]()
    start, size = 0, -1  # of the last block; its size where that is known
    for begin, stop in pairwise([0, *raw.stops]):
        if begin == stop:
            continue
        alone = -1
        if stops and begin - start < _BLOCK_BYTES:
            size = size if size >= 0 else quick_size(raw.read(start, begin))
            alone = quick_size(raw.read(begin, stop))
            joined = quick_size(raw.read(start, stop))
            if joined <= size + alone:
                stops[-1], size = stop, joined
                continue
        stops.append(stop)
        start, size = begin, alone
    return stops


def quick_size(raw: bytes | bytearray) -> int:
    """Return about how many bytes ``raw`` takes in a frame: the same on any machine.

    Used to choose between encodings, where floating-point estimates could differ from
    one processor to the next and with them the bytes of the patch.
    """
    if not hasattr(_LOCAL, "quick"):
        _LOCAL.quick = zstandard.ZstdCompressor(compression_params=_QUICK)
    return len(_LOCAL.quick.compress(raw)) - _FRAME_BYTES


_FRAME_BYTES = 6  # that a block in a running frame does not need again
_QUICK = zstandard.ZstdCompressionParameters.from_level(1, min_match=7)
_LOCAL = local()  # a compressor belongs to one thread


class _Slice:
    """A part of an open file, as a source that a zstd reader can read from."""

    def __init__(self, file: BinaryIO, start: int, size: int) -> None:
        self._file, self._next, self._stop = file, start, start + size

    def read(self, size: int) -> bytes:
        self._file.seek(self._next)
        data = self._file.read(min(size, self._stop - self._next))
        self._next += len(data)
        return data


class SectionReader:
    """Reads one section of an open patch, in bounded pieces."""

    def __init__(self, file: BinaryIO, section: Section) -> None:
        """Prepare to read.

        Args:
            file: The open patch; several readers share it and seek before each read.
            section: What to read, as :class:`Body` checked it.
        """
        self._left = section.raw_size
        packed = cast(BinaryIO, _Slice(file, section.offset, section.packed_size))
        self._source: BinaryIO | zstandard.ZstdDecompressionReader = packed
        if section.encoding == ZSTD:
            self._source = zstandard.ZstdDecompressor(
                max_window_size=1 << MAX_WINDOW_LOG
            ).stream_reader(packed, read_size=READ_BYTES)

    @property
    def is_empty(self) -> bool:
        """Whether nothing is left to read."""
        return not self._left

    def take(self, count: int) -> bytes:
        """Return exactly the next ``count`` bytes.

        Raises:
            PatchFormatError: The section ends before, or does not decompress.
        """
        if count > self._left:
            raise PatchFormatError("a section of the patch ends too early")
        self._left -= count
        try:
            data = self._source.read(count)
        except zstandard.ZstdError as err:
            raise PatchFormatError(f"a section does not decompress: {err}") from err
        if len(data) < count:
            raise PatchFormatError("a section of the patch ends too early")
        return data

    def take_most(self, count: int) -> bytes:
        """Return the next ``count`` bytes, or those that are left, at least one.

        Raises:
            PatchFormatError: Nothing is left, or it does not decompress.
        """
        return self.take(max(1, min(count, self._left)))

    def finish(self) -> None:
        """Insist that nothing is left.

        Raises:
            PatchFormatError: Bytes are left over.
        """
        if self._left:
            raise PatchFormatError(f"a section has {self._left} bytes too many")


def frame_size(file: BinaryIO, start: int, packed: int) -> int:
    """Return the unpacked size of a section, which must be exactly one zstd frame.

    python-zstandard ignores ``max_output_size`` when a frame states its size, and
    accepts trailing bytes; so neither is left to it.
    """
    stop = start + packed
    file.seek(start)
    head = file.read(min(18, packed))  # the longest frame header
    if not head.startswith(_MAGIC):
        raise PatchFormatError(
            f"a section is not a zstd frame: it begins with {head[:4].hex(' ')}, "
            f"expected {_MAGIC.hex(' ')}"
        )
    try:
        frame = zstandard.get_frame_parameters(head)
        offset = start + zstandard.frame_header_size(head)
    except zstandard.ZstdError as err:
        raise PatchFormatError(f"a section is not a zstd frame: {err}") from err
    # A frame that states no size states 2**64 - 1 here.
    if not 0 < frame.content_size < 1 << 63 or frame.window_size > 1 << MAX_WINDOW_LOG:
        raise PatchFormatError(
            f"a zstd section states {frame.content_size} bytes and a window of "
            f"{frame.window_size}; at most {1 << MAX_WINDOW_LOG} is allowed"
        )
    last, blocks = False, MAX_BLOCKS + packed // BYTES_A_BLOCK
    while not last and offset + 3 <= stop:
        blocks -= 1
        if blocks < 0:
            raise PatchFormatError(
                f"a zstd section of {packed} bytes has too many blocks, which say "
                "next to nothing; pack it again"
            )
        file.seek(offset)
        block = int.from_bytes(file.read(3), "little")
        last, kind, size = bool(block & 1), block >> 1 & 3, block >> 3
        offset += 3 + (1 if kind == 1 else size)  # kind 1: one byte, repeated
    offset += 4 if frame.has_checksum else 0
    if not last or offset != stop or head[4] & 3:  # which flags a dictionary id
        raise PatchFormatError("a zstd frame does not fill its section exactly")
    return frame.content_size
