# SPDX-License-Identifier: Apache-2.0
"""A fuzzer's bytes, read as edits of a good file, so that it gets deep into the rules.

What a checksum covers is mended afterwards: a reader that stops there would see nothing
of what comes behind.
"""

import copy

VALUES = (
    *(None, True, False, "", "a", "\0", "../../etc", "0" * 64, "\ud800", "\x1b[2J"),
    *(-1, 0, 1, 7, 2**31, 2**53, 2**64, 10**30, 0.5, 1e308, float("nan")),
    *([], {}, [[]], [None], {"": None}, [0] * 40, {"a": {"a": {}}}, ["f4", 3]),
    *("F32", "float32", "uniform", "file", "loaded", "2026-01-01T00:00:00Z", "round"),
)


class Edits:
    """Reads decisions from bytes; when they are used up, it decides for nothing."""

    def __init__(self, data):
        self._data = iter(data)

    def pick(self, count):
        """Return a number below ``count``."""
        value = next(self._data, 0)
        if count > 256:
            value = value << 8 | next(self._data, 0)
        return value % count

    def rest(self):
        """Return the bytes that are left."""
        return bytes(self._data)

    def value(self):
        """Return something that a field should not be, or should."""
        return copy.deepcopy(VALUES[self.pick(len(VALUES))])

    def record(self, record):
        """Return a record with some of its fields, anywhere in it, changed."""
        record = copy.deepcopy(record)
        for _ in range(1 + self.pick(4)):
            self._change(record)
        return record

    def _change(self, record):
        node = record
        while isinstance(node, dict | list) and node:
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            key = keys[self.pick(len(keys))]
            inner = node[key]
            if isinstance(inner, dict | list) and inner and self.pick(4):
                node = inner
                continue
            self._at(node, key)
            return

    def _at(self, node, key):
        how = self.pick(5)
        if how == 0:
            del node[key]
        elif how == 1 and isinstance(node, dict):
            node[str(self.value())] = node[key]
        elif how == 2 and isinstance(node, list):
            node.extend([node[key]] * (1 + self.pick(50)))
        elif how == 3 and type(node[key]) is int:
            node[key] += self.pick(3) - 1 << self.pick(64)
        else:
            node[key] = self.value()

    def bytes(self, data):
        """Return bytes of which some are others, and the end perhaps is cut."""
        out = bytearray(data)
        for _ in range(1 + self.pick(4)):
            if out:
                out[self.pick(len(out))] = self.pick(256)
        return bytes(
            out[: len(out) - self.pick(len(out) + 1) if not self.pick(8) else None]
        )
