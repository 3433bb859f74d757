"""How positions and values become bytes, and back: both directions side by side.

Every decoder reads from :class:`SectionReader` objects in bounded pieces, so that the
memory needed to apply a patch does not depend on its size. FORMAT.md is the normative
description.
"""

from collections.abc import Sequence
from typing import Any, BinaryIO, cast

import numpy as np
import zstandard
from numpy.typing import NDArray

from edge_runtime.errors import PatchFormatError

STORED, ZSTD, CONSTANT = 0, 1, 2
MAX_WINDOW_LOG = 21  # zstd window of 2 MiB: bounds what a device must hold
_READ_BYTES = 1 << 16

_LITERAL_GAPS = 64  # gaps below this are one byte, larger ones a class byte and bits
_LITERAL_BITS = 6
_MAX_CLASS = 50  # so that width plus a shift of 7 fits 64 bits

Positions = NDArray[np.int64]


# Sections: stored, zstd, or one repeated byte ---------------------------------------


def pack_section(raw: bytes, level: int) -> tuple[int, bytes]:
    """Choose the smallest encoding of a section.

    Args:
        raw: The section's bytes.
        level: zstd level, 1 to 22.

    Returns:
        The encoding and the packed bytes.
    """
    if raw and raw == raw[:1] * len(raw):
        return CONSTANT, raw[:1]
    parameters = zstandard.ZstdCompressionParameters.from_level(
        level, source_size=len(raw), window_log=_window_log(len(raw))
    )
    packed = zstandard.ZstdCompressor(compression_params=parameters).compress(raw)
    return (ZSTD, packed) if len(packed) < len(raw) else (STORED, raw)


def _window_log(size: int) -> int:
    return min(MAX_WINDOW_LOG, max(10, (size - 1).bit_length()))


class _Slice:
    """A part of an open file, as a source that a zstd reader can read from."""

    def __init__(self, file: BinaryIO, start: int, stop: int) -> None:
        self._file, self._next, self.start, self.stop = file, start, start, stop

    def at(self, offset: int, size: int) -> bytes:
        self._file.seek(offset)
        return self._file.read(max(0, min(size, self.stop - offset)))

    def read(self, size: int) -> bytes:
        data = self.at(self._next, size)
        self._next += len(data)
        return data


class SectionReader:
    """Reads one section of an open patch, in bounded pieces."""

    def __init__(
        self, file: BinaryIO, offset: int, encoding: int, packed: int, raw: int
    ) -> None:
        """Prepare to read.

        Args:
            file: The open patch; several readers share it and seek before each read.
            offset: Where the packed bytes begin.
            encoding: ``STORED``, ``ZSTD`` or ``CONSTANT``.
            packed: Packed size in bytes.
            raw: Unpacked size in bytes.

        Raises:
            PatchFormatError: The sizes contradict the encoding, or the zstd frame
                does not fill the section exactly.
        """
        self._packed = _Slice(file, offset, offset + packed)
        self._left = raw
        self._encoding = encoding
        self._zstd: zstandard.ZstdDecompressionReader | None = None
        if encoding == ZSTD:
            self._check_frame(raw)
            self._zstd = zstandard.ZstdDecompressor(
                max_window_size=1 << MAX_WINDOW_LOG
            ).stream_reader(cast(BinaryIO, self._packed), read_size=_READ_BYTES)
        elif packed != (1 if encoding == CONSTANT else raw) or encoding > CONSTANT:
            raise PatchFormatError(
                f"a section of encoding {encoding} has {packed} packed and {raw} raw "
                "bytes, which cannot be; the patch was not made by dpu-pack"
            )

    def take(self, count: int) -> bytes:
        """Return exactly the next ``count`` bytes.

        Raises:
            PatchFormatError: The section ends before, or does not decompress.
        """
        if count > self._left:
            raise PatchFormatError("a section of the patch ends too early")
        self._left -= count
        if self._encoding == CONSTANT:
            return self._packed.at(self._packed.start, 1) * count
        if self._zstd is None:
            data = self._packed.read(count)
        else:
            try:
                data = self._zstd.read(count)
            except zstandard.ZstdError as err:
                raise PatchFormatError(f"a section does not decompress: {err}") from err
        if len(data) < count:
            raise PatchFormatError("a section of the patch ends too early")
        return data

    def finish(self) -> None:
        """Insist that nothing is left.

        Raises:
            PatchFormatError: Bytes are left over.
        """
        if self._left:
            raise PatchFormatError(f"a section has {self._left} bytes too many")

    def _check_frame(self, raw: int) -> None:
        """Walk the blocks of the frame: one frame, its size stated, nothing behind.

        python-zstandard ignores ``max_output_size`` when a frame states its size, and
        accepts trailing bytes; so neither is left to it.
        """
        packed = self._packed
        head = packed.at(packed.start, 18)  # the longest frame header
        try:
            frame = zstandard.get_frame_parameters(head)
            offset = packed.start + zstandard.frame_header_size(head)
        except zstandard.ZstdError as err:
            raise PatchFormatError(f"a section is not a zstd frame: {err}") from err
        if frame.content_size != raw or frame.window_size > 1 << MAX_WINDOW_LOG:
            raise PatchFormatError(
                f"a zstd section states {frame.content_size} bytes and a window of "
                f"{frame.window_size}; expected {raw} and at most {1 << MAX_WINDOW_LOG}"
            )
        last = False
        while not last and offset + 3 <= packed.stop:
            block = int.from_bytes(packed.at(offset, 3), "little")
            last, kind, size = bool(block & 1), block >> 1 & 3, block >> 3
            offset += 3 + (1 if kind == 1 else size)  # kind 1: one byte, repeated
        offset += 4 if frame.has_checksum else 0
        if not last or offset != packed.stop or frame.dict_id:
            raise PatchFormatError("a zstd frame does not fill its section exactly")


# Unsigned integers of variable length ------------------------------------------------


def encode_varint(value: int) -> bytes:
    """Encode a non-negative integer as LEB128."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def decode_varint(section: SectionReader | BinaryIO) -> int:
    """Decode one LEB128 integer below 2**63, in its shortest form.

    Raises:
        PatchFormatError: Too long, not shortest, or cut off.
    """
    take = section.take if isinstance(section, SectionReader) else section.read
    value = 0
    for shift in range(0, 63, 7):
        byte = take(1)
        if not byte:
            break
        value |= (byte[0] & 127) << shift
        if byte[0] < 128:
            if byte[0] == 0 and shift:
                break
            return value
    raise PatchFormatError("a number in the patch is malformed or cut off")


# Positions: gaps, one byte each, and the low bits of large ones ----------------------


def encode_positions(tensors: Sequence[Positions]) -> tuple[bytes, bytes]:
    """Encode sorted positions, tensor by tensor.

    A gap is the number of unchanged elements before a changed one. Below 64 it is its
    own byte. Otherwise the byte is 64 + c for a gap in [64 * 2**c, 64 * 2**(c + 1)),
    and its low 6 + c bits go, least significant first, into a bit stream. One byte a
    position lets zstd see how masks cluster; the low bits are noise and stay as they
    are.

    Args:
        tensors: For each tensor its strictly increasing positions.

    Returns:
        The gap bytes and the bit stream.
    """
    if not tensors:
        return b"", b""
    gaps = np.concatenate([np.diff(p, prepend=-1) - 1 for p in tensors])
    large = gaps >= _LITERAL_GAPS
    # frexp gives the bit length exactly for integers below 2**53.
    classes = np.frexp(gaps[large].astype(np.float64))[1] - 1 - _LITERAL_BITS
    out = gaps.astype(np.uint8)
    out[large] = _LITERAL_GAPS + classes
    return out.tobytes(), _encode_bits(gaps[large], classes + _LITERAL_BITS)


def _encode_bits(values: NDArray[Any], widths: NDArray[Any]) -> bytes:
    starts = np.cumsum(widths) - widths
    owner = np.repeat(np.arange(len(values)), widths)
    shift = np.arange(len(owner)) - starts[owner]
    bits = (values[owner] >> shift) & 1
    return np.packbits(bits.astype(np.uint8), bitorder="little").tobytes()


class PositionDecoder:
    """Decodes what :func:`encode_positions` wrote, in bounded pieces."""

    def __init__(self, gaps: SectionReader, bits: SectionReader) -> None:
        self._gaps, self._bits = gaps, bits
        self._byte, self._bit = b"", 0  # the byte that is only partly used

    def take(self, count: int, previous: int) -> Positions:
        """Return the next ``count`` positions of one tensor.

        Args:
            count: How many; all of them belong to the same tensor.
            previous: The position before the first one, -1 at a tensor's start.

        Raises:
            PatchFormatError: A section ends early or a class is out of range.
        """
        gaps = np.frombuffer(self._gaps.take(count), np.uint8).astype(np.int64)
        large = np.flatnonzero(gaps >= _LITERAL_GAPS)
        if large.size:
            classes = gaps[large] - _LITERAL_GAPS
            if classes.max() > _MAX_CLASS:
                raise PatchFormatError("a gap class in the patch is out of range")
            widths = classes + _LITERAL_BITS
            gaps[large] = (1 << widths) + self._take_bits(widths)
        positions: Positions = np.cumsum(gaps + 1) + previous
        # No gap reaches 2**57, so a sum that wraps around is seen as a negative one.
        if positions.min(initial=previous + 1) <= previous:
            raise PatchFormatError("positions in the patch overflow")
        return positions

    def _take_bits(self, widths: NDArray[np.int64]) -> NDArray[np.int64]:
        stops = self._bit + np.cumsum(widths)
        need = int(stops[-1] + 7) // 8
        data = self._byte + self._bits.take(need - len(self._byte))
        padded = np.frombuffer(data + bytes(8), np.uint8)
        # An unaligned 64-bit word at every byte: one gather instead of a bit loop.
        words: NDArray[np.uint64] = np.ndarray(
            (need,), "<u8", padded.data, strides=(1,)
        )
        starts = stops - widths
        found = words[starts >> 3] >> (starts & 7).astype(np.uint64)
        self._bit = int(stops[-1]) & 7
        self._byte = data[-1:] if self._bit else b""
        low: Positions = (found & ((1 << widths) - 1).astype(np.uint64)).astype(
            np.int64
        )
        return low

    def finish(self) -> None:
        """Insist that both sections are used up and the last bits are zero.

        Raises:
            PatchFormatError: Something is left over.
        """
        self._gaps.finish()
        self._bits.finish()
        if self._byte and self._byte[0] >> self._bit:
            raise PatchFormatError("the patch has bits left over")


# Values: one section for each byte of an element -------------------------------------


def encode_planes(values: NDArray[Any]) -> list[bytes]:
    """Split elements into byte planes, least significant first.

    Sign and exponent bytes compress well once they stand alone; mantissa bytes are
    noise and end up stored.
    """
    size = values.dtype.itemsize
    columns = np.ascontiguousarray(values).view(np.uint8).reshape(-1, size)
    return [columns[:, plane].tobytes() for plane in range(size)]


def decode_planes(planes: Sequence[SectionReader], count: int) -> NDArray[Any]:
    """Return the next ``count`` elements as unsigned integers.

    Args:
        planes: One section for each byte, least significant first.
        count: How many elements.

    Raises:
        PatchFormatError: A section ends early.
    """
    columns = np.empty((count, len(planes)), np.uint8)
    for plane, section in enumerate(planes):
        columns[:, plane] = np.frombuffer(section.take(count), np.uint8)
    return columns.view(f"<u{len(planes)}").reshape(-1)
