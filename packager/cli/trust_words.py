# SPDX-License-Identifier: Apache-2.0
"""Key lists for ``dpu-patch trust``: read from files, and put into words."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_runtime.commandline import Answer

if TYPE_CHECKING:
    from edge_runtime.formats.signing import Trust
    from edge_runtime.trust import SignedRoot


def describe_list(path: Path, data: bytes, before: "SignedRoot | None") -> Answer:
    """Say what is in a list, who signed it, and who has to sign it yet."""
    from edge_runtime.formats.signing import key_id
    from edge_runtime.trust import read_root
    from edge_runtime.trust.rules import missing

    given = read_root(data)
    root = given.root
    wanted = {"own": root.keys} | ({"former": before.root.keys} if before else {})
    record: dict[str, Any] = {
        "file": str(path),
        "version": root.version,
        "issued": root.issued or None,
        "expires": root.expires,
        "roots": list(root.keys.ids),
        "root_threshold": root.keys.threshold,
        "releases": list(root.releases.ids),
        "release_threshold": root.releases.threshold,
        "signatures": {
            whose: {
                "signed_by": [key_id(key) for key in given.signers(keys)],
                "missing": missing(given, keys),
            }
            for whose, keys in wanted.items()
        },
    }
    lines = [
        f"{path}: key list {root.version}, expires {root.expires}",
        f"  next list  {_words(root.keys)}",
        f"  releases   {_words(root.releases)}",
    ]
    for whose, found in record["signatures"].items():
        names = ", ".join(found["signed_by"]) or "nobody"
        list_ = root.version if whose == "own" else root.version - 1
        need = f"; needs {found['missing']} more" if found["missing"] else ""
        lines.append(f"  signed     by {names} of list {list_}'s root keys{need}")
    return record, "\n".join(lines)


def _words(trust: "Trust") -> str:
    return f"{trust.threshold} of {', '.join(trust.ids)}"


def list_before(path: Path) -> "SignedRoot | None":
    """Read the list before this one, where it lies beside it."""
    version = read_list(path).root.version
    beside = path.with_name(f"{version - 1}.root.json")
    return read_list(beside) if beside.is_file() else None


def read_list(path: Path) -> "SignedRoot":
    """Read a key list; an error begins with the name of its file."""
    from edge_runtime.errors import prefix_errors
    from edge_runtime.trust import load_list, read_root

    with prefix_errors(path):
        return read_root(load_list(path))


def key_ids(keys: Sequence[str]) -> str:
    """Return the ids of some keys, for people."""
    from edge_runtime.formats.signing import key_id

    return ", ".join(key_id(key) for key in keys)
