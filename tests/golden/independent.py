"""A second decoder of patches, written from FORMAT.md alone, for clarity not speed.

Sections of it are in brackets. Not checked: model, release counter, signatures proper.
"""

import hashlib
import json
import math
import zlib
from struct import unpack_from

from zstandard import ZstdDecompressor, ZstdError, get_frame_parameters

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
        _must(shift < 63 and (byte > 0 or shift == 0), "varint")
        return value | byte << shift

    def number(self, fineness: int, low: "_Bits") -> int:
        s = self.bits(8)
        w = max((s >> fineness) - 1, 0)
        _must(w <= 32, "symbol too large")
        return ((s - (w << fineness)) << w) + low.bits(w)


def _sections(patch: bytes, base: bytes) -> dict[int, _Bits]:
    """Checks the file; returns what every section holds, by kind [File]."""
    _must(patch[:10] == b"\x89DPU\r\n\x1a\n\1\0" and len(patch) > 177, "magic, version")
    h, critical = unpack_from("<HH", patch, 10)
    _must(critical == 0 and 176 <= h <= min(4096, len(patch) - 2), "header")
    _must(zlib.crc32(patch[: h - 4]) == unpack_from("<I", patch, h - 4)[0], "CRC-32")
    start = h + 2 + unpack_from("<H", patch, h)[0]
    block, body = patch[h + 2 : start], patch[start:]
    _must(start <= min(h + 2 + 4096, len(patch)), "size of the signature block")
    _must(unpack_from("<QQ", patch, 124) == (len(base), len(body)), "sizes")
    ids = [block[i : i + 8] for i in range(0, len(block) - 4, 72)]
    _must(len(block) % 72 == 4 * bool(ids) and ids == sorted(set(ids)), "signatures")
    _must(not ids or zlib.crc32(block[:-4]).to_bytes(4, "little") == block[-4:], "CRC")
    _must(hashlib.sha256(body).digest() == patch[140:172], "SHA-256 of the body")
    _must(hashlib.sha256(base).digest() == patch[60:92], "another parent")
    rest, limit = _Bits(body), 8 * len(base) + (1 << 20)  # [Body]
    table = [(rest.bits(8), rest.bits(8), rest.varint()) for _ in range(rest.bits(8))]
    kinds, parts = [kind for kind, _, _ in table], {}
    _must(kinds == sorted(set(kinds)) and len(kinds) <= 64, "order of kinds")
    for kind, encoding, size in table:
        data = rest.bits(8 * size).to_bytes(size, "little")
        if encoding:
            _must(encoding == 1 and data[:4] == b"\x28\xb5\x2f\xfd", "encoding")
            try:
                frame = get_frame_parameters(data)
                _must(frame.content_size <= limit and data[4] & 3 == 0, "frame header")
                _must(frame.window_size <= 1 << 18, "window above 256 KiB")
                data = ZstdDecompressor().decompress(data, allow_extra_data=False)
            except ZstdError as error:
                raise ValueError(f"zstd: {error}") from error
        _must(data != b"", "empty section")
        parts[kind] = _Bits(data)
    _must(rest.at == 8 * len(body), "bytes behind the last section")
    return parts


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


def _element(old: bytes, form: list[int], m: int | None, streams: list[_Bits]) -> bytes:
    """Returns the next travelling element [0x40 to 0xBF values]."""
    (d, p, unit, fine), (symbols, low, rest, *planes) = form, streams
    shift, line = d + 8 * p, 8 * len(old) - d - 8 * p
    _must(0 <= line <= 32 and (line > 0 or (unit, fine) == (1, 0)), "form")
    new = sum(plane.bits(8) << (d + 8 * j) for j, plane in enumerate(planes))
    if line == 0:
        return new.to_bytes(len(old), "little")
    half, h = 1 << (line - 1), int.from_bytes(old, "little") >> shift
    q = (number := symbols.number(fine, low)) >> 1 ^ -(number & 1)
    if m is None:  # an integer
        return (new + ((h + q) % (2 * half) << shift)).to_bytes(len(old), "little")
    m -= shift  # [The line]
    _must(m >= 0 and 1 <= unit < 1 << (line - 1 - m), "unit")
    e = max(h % half >> m, 1)
    f = h % half - ((e - 1) << m)
    big = f >> (unit - e) if e <= unit else f + ((e - unit) << m)
    n = ((big if h < half else -big - 1) + q + half) % (2 * half) - half
    big = n if n >= 0 else -n - 1  # [Back]
    r = m + 1 - big.bit_length() if big else ((max(unit - m, 1) << m) - 1).bit_length()
    r = min(max(r, 0), unit - 1)
    o = (big << r) + rest.bits(r) + ((unit - 1 - r) << m if big else 0)
    return (new + ((o % half + half * (n < 0)) << shift)).to_bytes(len(old), "little")


def apply(base: bytes, patch: bytes) -> bytes:
    """Returns what a patch makes of its parent; ValueError if FORMAT.md forbids it."""
    parts = _sections(patch, base)
    counts, forms, index, low = used = [parts.pop(k, _Bits()) for k in range(1, 5)]
    _must(len(counts.data) <= 1 << 20, "counts above 1 MiB")
    tensors, groups, target = [], {}, bytearray(base)
    data_at = 8 + unpack_from("<Q", base)[0]
    for t in json.loads(base[8:data_at]).values():  # [0x01 counts]
        n, c, (at, stop) = math.prod(t["shape"]), counts.varint(), t["data_offsets"]
        _must(c <= n, "count")
        size = (stop - at) // max(n, 1)
        kind = (32 + 32 * size.bit_length() + 16 * (2 * c > n)) * (c > 0)
        tensors.append((kind, n, c, size, data_at + at, MANTISSA.get(t["dtype"])))
    kinds = sorted({t[0] for t in tensors} - {0})
    gaps = forms.varint() if kinds else 0  # [0x02 forms]
    for k in kinds:
        form = [forms.varint() for _ in range(4)]
        _must(max(gaps, form[3]) <= 7 and form[1] <= 8, "fineness or planes")
        own = [parts.pop(k + j, _Bits()) for j in (0, 1, 2, *range(8, 8 + form[1]))]
        groups[k], used = (form, own), used + own
    _must(not parts, "unknown kind")
    for kind, n, c, size, start, m in tensors:
        for i in _positions(n, c, gaps, index, low):
            at = slice(start + i * size, start + (i + 1) * size)
            target[at] = _element(base[at], groups[kind][0], m, groups[kind][1])
    left = [(part, 8 * len(part.data) - part.at) for part in used]
    _must(all(w < 8 and part.bits(w) == 0 for part, w in left), "section too long")
    _must(hashlib.sha256(target).digest() == patch[92:124], "fingerprint of the target")
    return bytes(target)
