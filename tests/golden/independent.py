"""A second decoder of patches, written from FORMAT.md alone, for clarity not speed.

Its sections are cited in brackets. Not checked, as patch and parent alone do not show
it: the model (needs the graph file), release counters, whether signatures are right.
"""

import hashlib
import json
import math
import zlib
from struct import unpack_from

import zstandard

MANTISSA = {"F64": 52, "F32": 23, "F16": 10, "BF16": 7, "F8_E5M2": 2, "F8_E4M3": 3}


def _must(ok: bool, rule: str) -> None:
    if not ok:
        raise ValueError(rule)


class _Bits:
    """Reads bits, the least significant first, and what is made of them [Numbers]."""

    def __init__(self, data: bytes = b"") -> None:
        self.data, self.at = data, 0  # the position is in bits

    def bits(self, w: int) -> int:
        first, shift, self.at = self.at // 8, self.at % 8, self.at + w
        _must(self.at <= 8 * len(self.data), "cut short")
        piece = self.data[first : (self.at + 7) // 8]
        return int.from_bytes(piece, "little") >> shift & ((1 << w) - 1)

    def varint(self) -> int:
        value = shift = 0
        while (byte := self.bits(8)) & 0x80:
            value, shift = value | (byte & 0x7F) << shift, shift + 7
            _must(shift < 63, "varint too long")
        _must(byte > 0 or shift == 0, "varint not in its shortest form")
        return value | byte << shift

    def number(self, fineness: int, low: "_Bits") -> int:
        s = self.bits(8)
        w = max((s >> fineness) - 1, 0)
        _must(w <= 32, "symbol too large")
        return ((s - (w << fineness)) << w) + low.bits(w)


def _body(patch: bytes, base: bytes) -> bytes:
    """Checks all that stands before the body [Header, Signature block]."""
    _must(patch[:8] == bytes.fromhex("894450550D0A1A0A"), "magic")
    _must(len(patch) >= 178 and patch[8:10] == b"\1\0", "version or size")
    h, critical = unpack_from("<HH", patch, 10)
    _must(176 <= h <= 4096 and len(patch) >= h + 2, "header size")
    _must(zlib.crc32(patch[: h - 4]) == unpack_from("<I", patch, h - 4)[0], "CRC-32")
    start = h + 2 + unpack_from("<H", patch, h)[0]
    block, body = patch[h + 2 : start], patch[start:]
    _must(critical == 0 and start <= h + 2 + 4096, "critical bit or signature block")
    _must(unpack_from("<QQ", patch, 124) == (len(base), len(body)), "sizes")
    if start > h + 2:
        _must(len(block) == start - h - 2 >= 76 and len(block) % 72 == 4, "signatures")
        ids = [block[i : i + 8] for i in range(0, len(block) - 4, 72)]
        _must(ids == sorted(set(ids)), "order of key ids")
        _must(
            zlib.crc32(block[:-4]).to_bytes(4, "little") == block[-4:], "block CRC-32"
        )
    _must(hashlib.sha256(body).digest() == patch[140:172], "SHA-256 of the body")
    _must(hashlib.sha256(base).digest() == patch[60:92], "another parent")
    return body


def _unpack(packed: bytes, limit: int) -> bytes:
    """Unpacks one zstd frame [Body]."""
    try:
        frame = zstandard.get_frame_parameters(packed)
        _must(packed[:4] == b"\x28\xb5\x2f\xfd" and packed[4] & 3 == 0, "kind of frame")
        _must(
            frame.content_size <= limit and frame.window_size <= 1 << 18, "frame size"
        )
        stream = zstandard.ZstdDecompressor().decompressobj()
        data = stream.decompress(packed)
    except zstandard.ZstdError as error:
        raise ValueError(f"zstd: {error}") from error
    _must(stream.eof and not stream.unused_data, "not exactly one frame")
    return data


def _positions(n: int, c: int, f: int, index: _Bits, low: _Bits) -> list[int]:
    """Reads which elements of one tensor travel [0x03 index, 0x04 index bits]."""
    if n < 4 * c < 3 * n:
        bitmap = index.bits((n + 7) // 8 * 8)
        _must(bitmap >> n == 0 and bitmap.bit_count() == c, "bitmap")
        return [i for i, bit in enumerate(reversed(f"{bitmap:b}")) if bit == "1"]
    stay, listed = 4 * c >= 3 * n, [-1]
    for _ in range(n - c if stay else c):
        listed.append(listed[-1] + 1 + index.number(f, low))
        _must(listed[-1] < n, "position beyond the tensor")
    return sorted(set(range(n)) - set(listed)) if stay else listed[1:]


def _step(h: int, half: int, m: int | None, unit: int, q: int, rest: _Bits) -> int:
    """Moves h, below 2 * half, by q on the line; m is None for integers [The line]."""
    if m is None:
        return (h + q) % (2 * half)
    e = max(h % half >> m, 1)
    f = h % half - ((e - 1) << m)
    big = f >> (unit - e) if e <= unit else f + ((e - unit) << m)
    new = ((big if h < half else -big - 1) + q + half) % (2 * half) - half
    big = new if new >= 0 else -new - 1  # [Back]
    if big:
        r = min(max(m + 1 - big.bit_length(), 0), unit - 1)
        o = (big << r) + rest.bits(r) + ((unit - 1 - r) << m)
    else:
        o = rest.bits(min(unit - 1, ((max(unit - m, 1) << m) - 1).bit_length()))
    return (half if new < 0 else 0) + o % half


def apply(base: bytes, patch: bytes) -> bytes:
    """Returns what a patch makes of its parent; ValueError if FORMAT.md forbids it."""
    body = _Bits(_body(patch, base))
    table = [(body.bits(8), body.bits(8), body.varint()) for _ in range(body.bits(8))]
    kinds = [kind for kind, _, _ in table]
    _must(kinds == sorted(set(kinds)) and len(kinds) <= 64, "order of kinds")  # [Body]
    parts: dict[int, _Bits] = {}
    for kind, encoding, size in table:
        packed = body.bits(8 * size).to_bytes(size, "little")
        _must(encoding <= 1 and size > 0, "encoding or empty section")
        limit = (1 << 20) + (8 * len(base) if kind > 1 else 0)
        parts[kind] = _Bits(_unpack(packed, limit) if encoding else packed)
        _must(0 < len(parts[kind].data) <= limit, "size of a section")

    def pop(kind: int) -> _Bits:
        return parts.pop(kind, _Bits())

    _must(body.at == 8 * len(body.data), "bytes behind the last section")
    counts, forms, index, index_low = (used := [pop(k) for k in range(1, 5)])
    data_at = 8 + unpack_from("<Q", base)[0]
    tensors, groups, target = [], {}, bytearray(base)
    for t in json.loads(base[8:data_at]).values():  # [0x01 counts]
        n, c, (begin, end) = math.prod(t["shape"]), counts.varint(), t["data_offsets"]
        _must(c <= n, "count")
        size = (end - begin) // max(n, 1)
        kind = 32 + 32 * size.bit_length() + 16 * (2 * c > n)
        tensors.append((n, c, size, kind, data_at + begin, MANTISSA.get(t["dtype"])))
    gaps = forms.varint() if any(t[1] for t in tensors) else 0  # [0x02 forms]
    for k in sorted({kind for _, c, _, kind, _, _ in tensors if c}):
        d, p, u, f = form = [forms.varint() for _ in range(4)]
        _must(max(gaps, f) <= 7 and p <= 8, "fineness or planes")
        streams = [pop(j) for j in (k, k + 1, k + 2, *range(k + 8, k + 8 + p))]
        groups[k] = (form, streams)
        used += streams
    for n, c, size, kind, start, m in tensors:
        where = _positions(n, c, gaps, index, index_low)
        if c:
            (d, p, u, f), (symbols, low, rest, *planes) = groups[kind]
            shift, line = d + 8 * p, 8 * size - d - 8 * p
            _must(0 <= line <= 32 and (line > 0 or (u, f) == (1, 0)), "form")
            if line and m is not None:
                m -= shift
                _must(m >= 0 and 1 <= u < 1 << (line - 1 - m), "unit")
        for at in range(0) if not c else (start + i * size for i in where):
            new = sum(plane.bits(8) << (d + 8 * j) for j, plane in enumerate(planes))
            if line:
                h = int.from_bytes(base[at : at + size], "little") >> shift
                number = symbols.number(f, low)
                q = -(number + 1) // 2 if number % 2 else number // 2
                new += _step(h, 1 << (line - 1), m, u, q, rest) << shift
            target[at : at + size] = new.to_bytes(size, "little")
    _must(not parts, "section of unknown kind")
    for part in used:
        left = 8 * len(part.data) - part.at
        _must(left < 8 and part.bits(left) == 0, "section longer than what is read")
    _must(hashlib.sha256(target).digest() == patch[92:124], "fingerprint of the target")
    return bytes(target)
