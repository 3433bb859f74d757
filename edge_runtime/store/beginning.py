# SPDX-License-Identifier: Apache-2.0
"""How a store begins: what may lie in its folder, and how it is laid out there."""

import re
from collections.abc import Collection, Iterator, Mapping
from hashlib import sha256
from pathlib import Path

from edge_runtime.errors import StoreError, WeightsError
from edge_runtime.formats.identity import identify
from edge_runtime.formats.init_weights import read_init_spec
from edge_runtime.formats.model_folder import (
    CONTRACT_NAME,
    GRAPH_NAME,
    MODEL_FILES,
    MODEL_NAME,
    WEIGHTS_NAME,
)
from edge_runtime.formats.signing import Trust
from edge_runtime.formats.weights import fingerprint_chunks
from edge_runtime.reading import strangers
from edge_runtime.store.contents import KEY_NAME, StoreContents
from edge_runtime.store.state import State
from edge_runtime.text import printable

# What a store writes and may remove; whatever else lies there is somebody's.
_HALF_OR_WHOLE = "[0-9a-f]{32}(?:[0-9a-f]{32})?"
_OWN = {
    ".": re.compile(
        r"init\.unfinished|current\.old\.part"
        r"|(?:current|state\.json|state\.copy|device\.key|init\.unfinished)\.part"
        r"|\..+\.[0-9a-f]{16}\.part"  # as Files.temporary names them
    ),
    "slots": re.compile(rf"{_HALF_OR_WHOLE}|.+\.part"),
    "reverse": re.compile(rf"{_HALF_OR_WHOLE}\.dpu|.+\.part"),
}
OLD_CURRENT = "current.old.part"
# An installation begins with this file, so that what it leaves unfinished is known.
_MARK, _MARK_TEXT = "init.unfinished", b"dpu-edge init was begun here\n"
_LAID_OUT = (MODEL_NAME, "slots", "reverse", "current", "state.copy")


class Beginning(StoreContents):
    """A store before its first commit, and what is its own in the folder."""

    def create(self, model: Mapping[str, bytes], trust: Trust, size: int) -> None:
        """Lay a new store out; it counts as installed after the first commit.

        Args:
            model: The files of ``model/``, by name.
            trust: Whose signatures patches will need.
            size: Bytes that a weight file should have.

        Raises:
            StoreError: Something is there already; nothing of it was touched.
            WeightsError: The init recipe is malformed, or gives another size.
        """
        self.insist_free()
        if self._is_unfinished():
            for name in _LAID_OUT:
                self.files.remove(self.root / name)
        else:
            self.files.replace(self.root / _MARK, _MARK_TEXT, suffix=".part")
        folder = self.model_folder
        # The first commit makes the names of these durable.
        for path in (folder, self.root / "slots", self.root / "reverse"):
            self.files.mkdir(path)
        for name, data in model.items():
            self.files.write(folder / name, [data])
        self.files.sync_folder(folder)
        self.recipe = read_init_spec(folder)  # malformed: the bundle is at fault
        self.layout = self.recipe.layout()
        self._check_size(size)
        init = fingerprint_chunks(self.recipe.chunks())
        identity = identify(self.layout.header, model[GRAPH_NAME], folder)
        contract = sha256(model[CONTRACT_NAME]).hexdigest()
        self.state = State(identity.model, init, trust=trust, contract=contract)

    def insist_free(self) -> None:
        """Insist that a store may be laid out here: nobody's things are in the way.

        An installation that was cut is no obstacle, nor is an empty file system.

        Raises:
            StoreError: A model is installed there, or something else lies there.
        """
        if self._state_path.exists():
            raise StoreError(
                f"{self.root} already holds an installed model; use 'dpu-edge apply' "
                "to update it, or remove the folder to install anew"
            )
        # A key may come with the card, before any model (dpu-fleet provision).
        own, lock = {"lost+found", KEY_NAME}, self.root / "lock"
        if lock.is_file() and not lock.stat().st_size:
            own.add(lock.name)
        own |= {path.name for path in self._own_files() if self._is_begun_mark(path)}
        inside: list[str] = []
        if self._is_unfinished():
            own.update(_LAID_OUT, self._left())
            inside = list(self._put_into())
        if found := ", ".join([*filter(None, [strangers(self.root, own)]), *inside]):
            raise StoreError(
                f"{self.root} is not empty and holds no store: found {found}; give an "
                "empty folder, or one that does not exist"
                + (
                    ". If this store has lost its state.json, copy state.copy to it"
                    if self._copy_path.exists()
                    else ""
                )
            )

    def _is_unfinished(self) -> bool:
        mark = self.root / _MARK
        if not mark.is_file() or mark.stat().st_size != len(_MARK_TEXT):
            return False
        return mark.read_bytes() == _MARK_TEXT

    def _is_begun_mark(self, path: Path) -> bool:
        """Return whether a file is what a cut left of the mark before it had its name.

        Of a name like it, but with something else in it, nobody knows whose it is.
        """
        if _MARK not in path.name or path.suffix != ".part":
            return False
        plain = path.is_file() and not path.is_symlink()
        return plain and path.stat().st_size <= len(_MARK_TEXT)

    def _left(self) -> set[str]:
        """Return names beside the folders that a cut may have left."""
        paths = (path for path in self._own_files() if path.parent == self.root)
        # ``current.part`` leads to a folder, and is none.
        return {
            path.name
            for path in paths
            if path.name == OLD_CURRENT or path.is_symlink() or not path.is_dir()
        }

    def _put_into(self) -> Iterator[str]:
        """Yield, in words, what somebody else put into an unfinished installation."""
        slots, ways = (
            {
                p.name
                for p in (self.root / name).glob("*")
                if _OWN[name].fullmatch(p.name)
            }
            for name in ("slots", "reverse")
        )
        known: dict[str, Collection[str]] = {
            MODEL_NAME: MODEL_FILES,
            "slots": slots,
            "reverse": ways,
            **{f"slots/{name}": (GRAPH_NAME, WEIGHTS_NAME) for name in sorted(slots)},
        }
        if not (self.root / "current").is_symlink():
            known["current"] = (GRAPH_NAME, WEIGHTS_NAME)  # a copy, made with cp -rL
        for name, own in known.items():
            folder = self.root / name
            if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
                yield printable(name)
            elif found := strangers(folder, own):
                yield f"{printable(name)}/ with {found}"

    def _check_size(self, size: int) -> None:
        """Check the size that a recipe asks for, before anything of it is written."""
        stated = self.layout.file_size
        if stated != size:
            raise WeightsError(
                f"the init recipe gives a weight file of {stated} bytes, the patch is "
                f"for one of {size}; make the bundle anew"
            )
        if (free := self.files.free_bytes(self.root)) < stated:
            raise StoreError(
                f"{self.root} has {free} bytes free, a weight file needs {stated}; "
                "free some space and try again"
            )

    def _own_files(self) -> Iterator[Path]:
        """Yield what a store may have written and may come to remove."""
        for folder, names in _OWN.items():
            for path in (self.root / folder).glob("*"):
                if names.fullmatch(path.name):
                    yield path
