# SPDX-License-Identifier: Apache-2.0
"""A second decoder, from FORMAT.md [section] alone; no model, counter, signatures."""

import json
import math
import zlib
from hashlib import sha256
from itertools import count
from struct import pack, unpack, unpack_from

from zstandard import ZstdDecompressor, get_frame_parameters

MANTISSA = {"F64": 52, "F32": 23, "F16": 10, "BF16": 7, "F8_E5M2": 2, "F8_E4M3": 3}


def _must(ok: bool, rule: str) -> None:
    if not ok:
        raise ValueError(rule)


class _Bits:  # what is left of a section [Numbers]
    def __init__(self, data: bytes = b"") -> None:
        self.left, self.size = int.from_bytes(data, "little"), 8 * len(data)

    def bits(self, w: int) -> int:
        _must(w <= self.size, "cut short")
        found = self.left % (1 << w)
        self.left, self.size = self.left >> w, self.size - w
        return found

    def varint(self) -> int:
        value = shift = 0
        while (byte := self.bits(8)) & 0x80:
            value, shift = value | (byte & 0x7F) << shift, shift + 7
        _must(shift < 63 and (byte > 0 or shift == 0), "varint")
        return value | byte << shift

    def number(self, f: int, low: "_Bits", unary: "_Bits") -> int:
        s = next(i for i in count() if unary.bits(1)) if f > 7 else self.bits(8)
        w = f - 8 if f > 7 else max((s >> f) - 1, 0)
        high = s << w if f > 7 else (s - (w << f)) << w
        _must(w <= 32 and high < 1 << 40, "number too large")
        return high + low.bits(w)

    def bitmap(self, size: int) -> list[int]:
        bitmap = self.bits((size + 7) // 8 * 8)
        _must(bitmap >> size == 0, "bits behind a bitmap")
        return [i for i in range(size) if bitmap >> i & 1]


def _sections(patch: bytes, base: bytes) -> dict[int, _Bits]:  # by kind [File]
    _must(patch[:10] == b"\x89DPU\r\n\x1a\n\1\0" and len(patch) > 177, "magic, version")
    h, critical = unpack_from("<HH", patch, 10)
    _must(critical < 4 and 176 <= h <= min(4096, len(patch) - 2), "header")
    _must(zlib.crc32(patch[: h - 4]) == unpack_from("<I", patch, h - 4)[0], "CRC-32")
    start = h + 2 + unpack_from("<H", patch, h)[0]
    block, body = patch[h + 2 : start], patch[start:]
    _must(start <= min(h + 4098, len(patch)), "size of the signature block")
    _must(unpack_from("<QQ", patch, 124) == (len(base), len(body)), "sizes")
    ids = [block[i : i + 8] for i in range(0, len(block) - 4, 72)]
    _must(len(block) % 72 == 4 * bool(ids) and ids == sorted(set(ids)), "signatures")
    _must(not ids or zlib.crc32(block[:-4]).to_bytes(4, "little") == block[-4:], "CRC")
    _must(sha256(body).digest() == patch[140:172], "SHA-256 of the body")
    _must(sha256(base).digest() == patch[60:92], "another parent")
    rest = _Bits(body)  # [Body]
    table = [(rest.bits(8), rest.bits(8), rest.varint()) for _ in range(rest.bits(8))]
    kinds, parts = [kind for kind, _, _ in table], {}
    _must(kinds == sorted(set(kinds)) and len(kinds) <= 64, "order of kinds")
    for kind, encoding, size in table:
        data = rest.bits(8 * size).to_bytes(size, "little")
        if encoding:
            _must(encoding == (kind != 7) and data[:4] == b"(\xb5/\xfd", "encoding")
            window = get_frame_parameters(data).window_size
            _must(window <= 1 << 18 and data[4] & 3 == 0, "frame header")
            data = ZstdDecompressor().decompress(data, allow_extra_data=False)
        _must(len(data) in range(4, 2**20 + 1, 4) if kind == 6 else data != b"", "size")
        parts[kind] = _Bits(data)
    _must(rest.size == 0, "bytes behind the last section")
    _must((8 in parts) + 2 * (9 in parts) == critical, "features")
    if time := parts.pop(8, None):
        _must(time.varint() <= 253402300799 and time.size == 0, "when it was signed")
    return parts


def _signs(seed: int, tap: int, n: int) -> list[int]:  # a stream [0x09 subspaces]
    key, words, full = sha256(b"%d\0subspace %d" % (seed, tap)).digest(), [], 2**64 - 1
    for block in range(1, n // 256 + 2):
        a, b, c, d, (k, j) = block, 0, 0, 0, unpack_from("<QQ", key)
        for _ in range(10):
            p, q = 0xD2E7470EE14C6C93 * a, 0xCA5A826395121157 * c
            a, b, c, d = q >> 64 ^ b ^ k, q & full, p >> 64 ^ d ^ j, p & full
            k, j = k + 0x9E3779B97F4A7C15 & full, j + 0xBB67AE8584CAA73B & full
        words += [a, b, c, d]
    return [1 - 2 * (words[i // 64] >> i % 64 & 1) for i in range(n)]


def _moved(old: bytes, dtype: str, step: float) -> bytes:
    if dtype == "I8":
        (single,) = unpack("<f", pack("<f", unpack("<b", old)[0] + step))
        return pack("<b", min(max(round(single), -127), 127)) if step else old
    kind = "<e" if dtype == "F16" else "<f"
    (wide,) = unpack(kind, old if dtype == "F16" else old.rjust(4, b"\0"))
    _must(math.isfinite(wide), "not finite")
    if step == 0:
        return old
    # Of two float32 a double holds more than enough to be rounded once more.
    single = pack("<f", wide + step)  # which refuses what is too large
    if dtype == "F16":
        return pack("<e", *unpack("<f", single))
    if dtype == "F32":
        return single
    bits = int.from_bytes(single, "little")
    bits = bits + 0x7FFF + (bits >> 16 & 1) >> 16
    _must(bits >> 7 & 0xFF < 0xFF, "not finite")
    return bits.to_bytes(2, "little")


def _subspaces(section: _Bits, tensors: list, target: bytearray) -> None:
    _must(0 < (terms := section.varint()) <= 64 and section.size <= 8 << 20, "terms")
    every = 0
    for _ in range(terms):
        seed, d = section.varint(), 64 * section.varint()
        b, taps = section.bits(8), section.bits(8)
        every += d
        _must(d > 0 and every <= 1 << 22 and 0 < b < 9 and 0 < taps < 5, "term")
        moved = section.bitmap(len(tensors))
        scales = [unpack("<f", pack("<HH", 0, section.bits(16)))[0] for _ in moved]
        _must(moved != [] and all(2**-100 <= s <= 2**100 for s in scales), "scales")
        u = [2 * section.bits(b) - (1 << b) + 1 for _ in range(d)]
        total = sum((math.prod(tensors[j][1]) + 63) // 64 * 64 for j in moved)
        signs, i = [_signs(seed, t, total) for t in range(taps)], 0
        for j, scale in zip(moved, scales, strict=True):
            _, shape, _, size, start, dtype = tensors[j]
            _must(dtype in ("F32", "BF16", "F16", "I8"), "type")
            for k in range(math.prod(shape)):
                at, block = slice(start + k * size, start + (k + 1) * size), i // d + 1
                m = sum(signs[t][i] * u[(i + t * block) % d] for t in range(taps))
                target[at] = _moved(target[at], dtype, m * scale)
                i += 1
            i = (i + 63) // 64 * 64
    _must(section.size == 0, "left")


def _positions(shape: list, c: int, f: int, parts: list[_Bits], grid: int) -> list[int]:
    n, row = math.prod(shape), math.prod(shape[1:])  # [0x03 index ... 0x07 unary]
    index, low, columns, unary = parts
    counted, stay, listed = [*range(n)], 4 * c >= 3 * n, [-1]
    if n < 4 * c < 3 * n:
        _must(len(found := index.bitmap(n)) == c, "bitmap")
        return found
    if grid and len(shape) > 1 and 0 < 4 * c <= n and row <= 65536:
        used, depth = set(columns.bitmap(shape[1])), row // shape[1]
        counted = [i for i in counted if i % row // depth in used]
    for _ in range(n - c if stay else c):
        listed.append(listed[-1] + 1 + index.number(f, low, unary))
        _must(listed[-1] < len(counted), "position beyond the tensor")
    found = [counted[i] for i in listed[1:]]
    return sorted({*counted} - {*found}) if stay else found


def _element(old: bytes, m: int | None, form: list, streams: list[_Bits]) -> int:
    (d, p, unit, fine), (symbols, low, rest, *planes) = form, streams
    shift, line = d + 8 * p, 8 * len(old) - d - 8 * p  # [0x40 to 0xBF values]
    _must(0 <= line <= 32 and (line > 0 or (unit, fine) == (1, 0)), "form")
    new = sum(plane.bits(8) << (d + 8 * j) for j, plane in enumerate(planes))
    if line == 0:
        return new
    half, h = 1 << (line - 1), int.from_bytes(old, "little") >> shift
    q = (number := symbols.number(fine, low, low)) >> 1 ^ -(number & 1)
    _must(number < 2 * half, "step too large")
    if m is None:  # an integer
        return new + ((h + q) % (2 * half) << shift)
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
    return new + ((o % half + half * (n < 0)) << shift)


def apply(base: bytes, patch: bytes) -> bytes:
    """Returns what a patch makes of its parent; raises where FORMAT.md forbids it."""
    parts = _sections(patch, base)
    counts, forms, *index = used = [parts.pop(k, _Bits()) for k in (1, 2, 3, 4, 5, 7)]
    tensors, groups, sizes = [], {}, [section.size for section in used]
    target, data_at = bytearray(base), 8 + unpack_from("<Q", base)[0]
    for t in json.loads(base[8:data_at]).values():  # [0x01 counts]
        c, (at, stop) = counts.varint(), t["data_offsets"]
        # Numbers smaller than a byte: a row of bytes [Weight file].
        shape = [stop - at] if t["dtype"].startswith(("F4", "F6_")) else t["shape"]
        n = math.prod(shape)
        _must(c <= n and sizes[0] <= 8 << 20, "count")
        size = (stop - at) // max(n, 1)
        kind = (32 + 32 * size.bit_length() + 16 * (2 * c > n)) * (c > 0)
        tensors.append((kind, shape, c, size, data_at + at, t["dtype"]))
    if 9 in parts:
        _subspaces(parts.pop(9), tensors, target)
    moved = bytes(target)
    kinds = sorted({t[0] for t in tensors} - {0})
    gaps = forms.varint() if kinds else 0  # [0x02 forms]
    for k in kinds:
        form = [forms.varint() for _ in range(4)]
        _must(gaps <= 40 and form[3] <= 7 and form[1] <= 8, "fineness or planes")
        _must(form[2] == 1 or any(t[0] == k and t[5] in MANTISSA for t in tensors), "U")
        own = [parts.pop(k + j, _Bits()) for j in (0, 1, 2, *range(8, 8 + form[1]))]
        groups[k], used = (form, own), used + own
    for kind, shape, c, size, start, dtype in tensors:
        for i in _positions(shape, c, gaps, index, sizes[4]):
            at = slice(start + i * size, start + (i + 1) * size)
            new = _element(moved[at], MANTISSA.get(dtype), *groups[kind])
            target[at] = new.to_bytes(size, "little")
    _must(parts.keys() <= {6} and all(p.size < 8 and p.left == 0 for p in used), "left")
    _must(sha256(target).digest() == patch[92:124], "fingerprint of the target")
    return bytes(target)
