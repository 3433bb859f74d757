# SPDX-License-Identifier: Apache-2.0
"""A disk that remembers what is durable and what a power cut may still take away.

POSIX, taken at its word, and a little less: until a file is synced it may hold what it
held before, nothing, a prefix, blocks of zeros or everything; until a folder is synced
each change of its names may be lost on its own, in any combination, and a rename may
leave both names behind. Syncing a file says nothing of its name, syncing a folder
nothing of the folders above it.

A tree is nested tuples: ``("d", ((name, tree), ...))``, ``("f", bytes)`` and
``("l", text)``, so that trees can be compared and counted. Equal files in a tree count
as two names of one file: whoever writes into one of them changes the other.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

Tree = tuple[str, object]


@dataclass(eq=False)
class File:
    durable: bytes = b""
    content: bytes = b""

    def variants(self):
        """What a power cut may leave of it."""
        half, size = len(self.content) // 2, len(self.content)
        return dict.fromkeys(
            [
                self.durable,
                b"",
                self.content[:half],
                bytes(size),
                bytes(half) + self.content[half:],
                self.content[:half] + bytes(size - half),
                self.content,
            ]
        )


@dataclass(eq=False)
class Link:
    text: str


@dataclass(eq=False)
class Folder:
    durable: dict = field(default_factory=dict)
    names: dict = field(default_factory=dict)
    pending: list = field(default_factory=list)

    def set(self, name, node):
        self.names[name] = node
        self.pending.append(("set", name, node))

    def delete(self, name):
        del self.names[name]
        self.pending.append(("delete", name))

    def move(self, source, target):
        self.names[target] = self.names.pop(source)
        self.pending.append(("move", source, target, self.names[target]))

    def variants(self):
        """The names that a power cut may leave, each set of them once."""
        found = {}
        outcomes = [range(3 if op[0] == "move" else 2) for op in self.pending]
        for choice in itertools.product(*outcomes):
            names = dict(self.durable)
            for (kind, *op), outcome in zip(self.pending, choice, strict=True):
                if not outcome:
                    continue
                if kind == "set":
                    names[op[0]] = op[1]
                elif kind == "delete":
                    names.pop(op[0], None)
                else:
                    names[op[1]] = op[2]
                    if outcome == 2:
                        names.pop(op[0], None)
            found[tuple(sorted((name, id(node)) for name, node in names.items()))] = (
                names
            )
        return found.values()


class Disk:
    """Replays recorded operations; paths are relative to its root, which is durable."""

    def __init__(self, tree: Tree = ("d", ())):
        self.files = []
        self.root = self._load(tree, {})

    def _load(self, tree, known):
        kind, content = tree
        if kind == "l":
            return Link(content)
        if kind == "f":
            if content not in known:
                known[content] = File(content, content)
                self.files.append(known[content])
            return known[content]
        names = {name: self._load(child, known) for name, child in content}
        return Folder(dict(names), names)

    def _find(self, path):
        node = self.root
        for name in path.parts:
            node = node.names[name]
        return node

    def apply(self, kind, path, *rest):
        """Replay one operation."""
        getattr(self, f"_{kind}")(self._find(path.parent), path, *rest)

    def _mkdir(self, parent, path):
        parent.set(path.name, Folder())

    def _create(self, parent, path):
        if path.name in parent.names:
            parent.names[path.name].content = b""  # the same file, emptied
            return
        self.files.append(File())
        parent.set(path.name, self.files[-1])

    _touch = _create

    def _data(self, parent, path, data):
        parent.names[path.name].content += data

    def _rot(self, parent, path, data):
        parent.names[path.name] = parent.durable[path.name] = File(data, data)

    def _sync(self, parent, path):
        node = self._find(path)
        if isinstance(node, File):
            node.durable = node.content
        else:
            node.durable = dict(node.names)
            node.pending.clear()

    def _hardlink(self, parent, path, source):
        parent.set(path.name, self._find(source))

    def _symlink(self, parent, path, text):
        parent.set(path.name, Link(text))

    def _rename(self, parent, path, target):
        if path.parent != target.parent:
            raise ValueError("the model knows renames within one folder only")
        parent.move(path.name, target.name)

    def _unlink(self, parent, path):
        parent.delete(path.name)

    _rmdir = _unlink

    def running(self) -> Tree:
        """What a process sees as long as the power stays on."""
        return _freeze(self.root)

    def after_power_cut(self) -> Iterator[Tree]:
        """Every tree that a power cut may leave now, in the same order each time."""
        dirty = [file for file in self.files if file.durable != file.content]
        for contents in itertools.product(*(file.variants() for file in dirty)):
            chosen = dict(zip(map(id, dirty), contents, strict=True))
            yield from _trees(self.root, chosen)


def _freeze(node) -> Tree:
    if isinstance(node, Link):
        return ("l", node.text)
    if isinstance(node, File):
        return ("f", node.content)
    return ("d", tuple((n, _freeze(c)) for n, c in sorted(node.names.items())))


def _trees(node, contents):
    if isinstance(node, Link):
        yield ("l", node.text)
        return
    if isinstance(node, File):
        yield ("f", contents.get(id(node), node.content))
        return
    for names in node.variants():
        order = sorted(names)
        below = [_trees(names[name], contents) for name in order]
        for combination in itertools.product(*below):
            yield ("d", tuple(zip(order, combination, strict=True)))


def read_tree(path) -> Tree:
    """Read a real folder as a tree."""
    if path.is_symlink():
        return ("l", str(path.readlink()))
    if path.is_file():
        return ("f", path.read_bytes())
    return ("d", tuple((p.name, read_tree(p)) for p in sorted(path.iterdir())))


def write_tree(tree: Tree, path, known=None) -> None:
    """Write a tree to a path that does not exist yet."""
    kind, content = tree
    known = {} if known is None else known
    if kind == "l":
        path.symlink_to(content)
    elif kind == "f" and content in known:
        path.hardlink_to(known[content])
    elif kind == "f":
        path.write_bytes(content)
        known[content] = path
    else:
        path.mkdir()
        for name, child in content:
            write_tree(child, path / name, known)
