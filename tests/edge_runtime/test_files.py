# SPDX-License-Identifier: Apache-2.0
"""A file is replaced in one way: whole, unaimed, and as private as before."""

import ast
import errno
import os
import stat
from pathlib import Path

import pytest

from edge_runtime.files import Files, naming

ROOT = Path(__file__).parents[2]


@pytest.fixture
def target(tmp_path):
    return tmp_path / "agent.json"


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_a_replaced_file_holds_the_new_content_and_nothing_is_left_beside(target):
    for data in (b"old", b"new"):
        Files().replace(target, data)
    assert target.read_bytes() == b"new"
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "full"), f"[Errno {errno.ENOSPC}] full: 'w'"),
        (OSError(errno.ENOSPC, "full", "v"), f"[Errno {errno.ENOSPC}] full: 'v'"),
        (OSError("v and w are one file"), "v and w are one file"),
    ],
    ids=["full", "named", "words"],
)
def test_a_system_error_is_given_a_name_and_loses_no_words(error, said):
    with pytest.raises(OSError) as caught, naming("w"):
        raise error
    assert str(caught.value) == said


def test_the_name_that_is_written_first_cannot_be_foreseen(target):
    names = {Files().temporary(target, ".new").name for _ in range(100)}
    assert len(names) == 100
    assert all(name.startswith(".agent.json.") for name in names)
    long = target.with_name("x" * 250)
    Files().replace(long, b"a name as long as any")
    assert long.exists()


class Foreseen(Files):
    """Has a name that somebody guessed, and put a link there."""

    def __init__(self, aim):
        self.aim = aim

    def unlink(self, path):
        super().unlink(path)
        if path.suffix == ".new" and not path.is_symlink():
            path.symlink_to(self.aim)


@pytest.mark.parametrize("there", [True, False])
def test_a_link_under_the_name_that_is_written_is_never_followed(
    target, tmp_path, there
):
    aim = tmp_path / "passwd"
    if there:
        aim.write_bytes(b"root")
    with pytest.raises(FileExistsError):
        Foreseen(aim).replace(target, b"attack")
    assert aim.read_bytes() == b"root" if there else not aim.exists()
    assert not target.exists()


def test_a_link_of_the_files_own_name_is_replaced_and_not_followed(target, tmp_path):
    aim = tmp_path / "passwd"
    aim.write_bytes(b"root")
    target.symlink_to(aim)
    Files().replace(target, b"mine")
    assert (aim.read_bytes(), target.read_bytes()) == (b"root", b"mine")


@pytest.mark.parametrize("kind", ["fifo", "folder", "link to a device"])
def test_what_is_no_ordinary_file_is_left_alone(target, kind):
    make = {
        "fifo": lambda: os.mkfifo(target),
        "folder": target.mkdir,
        "link to a device": lambda: target.symlink_to("/dev/null"),
    }
    make[kind]()
    before = target.lstat().st_mode
    with pytest.raises(OSError, match="no ordinary file; choose another name"):
        Files().replace(target, b"x")
    assert target.lstat().st_mode == before
    assert list(target.parent.iterdir()) == [target]


def test_a_new_file_is_as_the_umask_says_and_a_private_one_stays_private(target):
    former = os.umask(0o022)
    try:
        Files().replace(target, b"new")
        assert mode(target) == 0o644
        target.chmod(0o600)
        Files().replace(target, b"secret")
        assert mode(target) == 0o600
        Files().replace(target, b"secret", mode=0o640)
        assert mode(target) == 0o640
    finally:
        os.umask(former)


def test_who_may_not_write_a_folder_can_hold_no_lock_in_it(target):
    target.write_bytes(b"")
    target.chmod(0o644)  # as earlier runtimes made it
    for name in (target, target.with_name("new")):
        Files().open_lock(name).close()
        assert mode(name) == 0o600
    target.parent.chmod(0o775)
    former = os.umask(0o002)
    try:
        Files().open_lock(target.with_name("shared")).close()
    finally:
        os.umask(former)
    assert mode(target.with_name("shared")) == 0o660


def test_what_fails_leaves_the_old_file_and_nothing_beside_it(target, monkeypatch):
    Files().replace(target, b"old")
    monkeypatch.setattr(Files, "rename", lambda *_: (_ for _ in ()).throw(OSError(28)))
    with pytest.raises(OSError, match="28"):
        Files().replace(target, b"new")
    assert [path.read_bytes() for path in target.parent.iterdir()] == [b"old"]


@pytest.mark.parametrize("durable", [True, False])
def test_content_and_name_are_synced_where_they_must_last(target, monkeypatch, durable):
    synced = []
    monkeypatch.setattr(Files, "sync", lambda _, handle: synced.append(handle))
    Files().replace(target, b"new", durable=durable)
    assert len(synced) == 2 * durable


def test_what_killed_processes_left_of_a_file_is_removed_and_nothing_else(target):
    left = [Files().temporary(target, ".new") for _ in range(3)]
    others = [target, target.with_name(".agent.json.new"), target.with_name(".b.1.new")]
    for path in (*left, *others):
        path.write_bytes(b"")
    Files().forget(target)
    assert sorted(target.parent.iterdir()) == sorted(others)


def test_no_other_code_of_the_project_renames_a_file_over_another():
    """Whatever ``os`` or ``Path`` have for it is called in files.py."""
    found = set()
    for package in ("edge_runtime", "packager", "trainer", "tools"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call) and renames(node):
                    found.add((path.name, ast.unparse(node)))
    assert found == {
        ("files.py", "source.replace(target)"),
        ("once.py", "part.rename(folder)"),  # a round's folder, where none may be
        ("staged.py", "new.rename(path)"),  # a folder of shards, the same
        ("staged.py", "self.path.rename(path)"),  # where nothing is, without links
    }


def renames(call):
    """Whether a call takes one argument and is named as a path's method for that."""
    method = call.func
    return (
        isinstance(method, ast.Attribute)
        and method.attr in ("rename", "replace")
        and (len(call.args) == 1 or ast.unparse(method.value) == "os")
        and not call.keywords
    )
