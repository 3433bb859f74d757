# SPDX-License-Identifier: Apache-2.0
"""Installing: into empty folders only, or on top of its own unfinished work."""

import pytest

from edge_runtime import Device
from edge_runtime.errors import DpuError, StoreError, TrialError
from tests.crash import world
from tests.crash.disk import read_tree
from tests.crash.examine import insist
from tests.crash.traced import Failing

INIT = world.weights(0).fingerprint


def tree(folder):
    return read_tree(folder) if folder.exists() else None


@pytest.mark.parametrize(
    "name",
    [
        *("slots/photos/1.jpg", "reverse/gear.txt", "model/plan.txt", "notes.part"),
        *("thesis.txt", "lock/key", ".hidden", "state.copy", "hooks/before-apply.d/10"),
    ],
)
def test_somebodys_folder_is_refused_and_stays_as_it_is(tmp_path, name):
    root = tmp_path / "store"
    (root / name).parent.mkdir(parents=True)
    (root / name).write_text("mine")
    before = tree(root)
    with pytest.raises(StoreError, match="not empty") as refused:
        world.install(root)
    assert name.partition("/")[0] in str(refused.value)
    assert tree(root) == before


def test_a_lock_with_something_in_it_is_not_ours(tmp_path):
    (tmp_path / "lock").write_text("mine")
    with pytest.raises(StoreError, match="lock"):
        world.install(tmp_path)
    assert (tmp_path / "lock").read_text() == "mine"


def test_what_a_message_names_cannot_write_on_the_terminal(tmp_path):
    (tmp_path / "\x1b[2J").write_text("")
    with pytest.raises(StoreError) as refused:
        world.install(tmp_path)
    assert str(refused.value).isprintable()


def test_a_message_names_a_few_of_many(tmp_path):
    for number in range(40):
        (tmp_path / f"photo{number}").write_text("")
    with pytest.raises(StoreError, match="and 35 more") as refused:
        world.install(tmp_path)
    assert len(str(refused.value)) < 400


def test_a_store_that_lost_its_state_is_not_installed_over(tmp_path):
    device = world.install(tmp_path / "store")
    device.update(world.next_patch(device.store.state))
    (tmp_path / "store" / "state.json").unlink()
    before = tree(tmp_path)
    with pytest.raises(StoreError, match=r"state\.copy"):
        world.install(tmp_path / "store")
    assert tree(tmp_path) == before


@pytest.mark.parametrize("names", [(), ("lost+found",)])
def test_an_empty_folder_is_installed_into(tmp_path, names):
    for name in names:
        (tmp_path / name).mkdir()
    insist(world.install(tmp_path), INIT)
    assert all((tmp_path / name).is_dir() for name in names)


def test_a_finished_installation_leaves_no_mark(tmp_path):
    world.install(tmp_path / "store")
    names = sorted(path.name for path in (tmp_path / "store").iterdir())
    assert " ".join(names) == "current lock model reverse slots state.copy state.json"


def test_an_installation_that_failed_is_taken_up_again(tmp_path):
    def refuse(*_, **__):
        raise TrialError("no")

    for _ in range(2):
        with pytest.raises(TrialError):
            world.install(tmp_path / "store", trial=refuse)
        (tmp_path / "store" / "model" / "init.safetensors").write_bytes(b"of another")
    insist(world.install(tmp_path / "store"), INIT)
    assert not (tmp_path / "store" / "model" / "init.safetensors").exists()


def test_an_installation_that_was_cut_anywhere_is_taken_up_again(tmp_path):
    for number in range(1000):
        base = tmp_path / str(number)
        base.mkdir()
        files = Failing(base, number, 5)
        try:
            world.install(base / "store", files)
        except (DpuError, OSError):
            if not (base / "store" / "state.json").exists():
                insist(world.install(base / "store"), INIT)
        assert Device.open(base / "store").verify() == INIT
        if files.left >= 0:
            break
    assert number > 20


def test_an_installation_cut_behind_its_commit_is_taken_up_again(tmp_path):
    """The name of state.json was not durable yet, the mark and 'current' were."""
    root = tmp_path / "store"
    world.install(root)
    (root / "state.json").unlink()
    (root / "init.unfinished").write_bytes(b"dpu-edge init was begun here\n")
    insist(world.install(root), INIT)


def test_things_beside_an_unfinished_installation_are_not_ours(tmp_path):
    def refuse(*_, **__):
        raise TrialError("no")

    with pytest.raises(TrialError):
        world.install(tmp_path, trial=refuse)
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(StoreError, match=r"thesis\.txt"):
        world.install(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_two_installations_at_once_are_one(tmp_path):
    root = tmp_path / "store"

    def trial(*_, **__):
        with pytest.raises(StoreError, match="another process"):
            world.install(root)

    insist(world.install(root, trial=trial), INIT)


def test_an_installed_store_is_not_installed_over(tmp_path):
    world.install(tmp_path / "store")
    with pytest.raises(StoreError, match="already holds"):
        world.install(tmp_path / "store")
    assert Device.open(tmp_path / "store").verify() == INIT


MARK = "dpu-edge init was begun here\n"


@pytest.mark.parametrize(
    "name",
    [
        *("slots/photos", "slots/1.jpg", f"slots/{INIT}/1.jpg", "reverse/gear.txt"),
        *(
            "model/plan.txt",
            "current/1.jpg",
            ".init.unfinished.0123456789abcdef.part/1",
        ),
    ],
)
def test_what_somebody_put_into_an_unfinished_installation_stays(tmp_path, name):
    root = tmp_path / "store"
    (root / name).parent.mkdir(parents=True)
    (root / name).write_text("mine")
    (root / "init.unfinished").write_text(MARK)
    before = tree(root)
    with pytest.raises(StoreError, match="not empty") as refused:
        world.install(root)
    assert name.partition("/")[0] in str(refused.value)
    assert tree(root) == before


@pytest.mark.parametrize("name", ["model", "slots", "reverse"])
def test_a_link_in_an_unfinished_installation_is_somebodys(tmp_path, name):
    root, elsewhere = tmp_path / "store", tmp_path / "elsewhere"
    root.mkdir()
    elsewhere.mkdir()
    (root / name).symlink_to(elsewhere)
    (root / "init.unfinished").write_text(MARK)
    with pytest.raises(StoreError, match=name):
        world.install(root)
    assert (root / name).is_symlink()


def test_a_link_that_had_not_its_name_yet_is_what_a_cut_leaves(tmp_path):
    root = tmp_path / "store"
    (root / "slots" / ("ab" * 32)).mkdir(parents=True)
    (root / "current.part").symlink_to(f"slots/{'ab' * 32}")
    (root / "init.unfinished").write_text(MARK)
    world.install(root)
    assert not (root / "current.part").is_symlink()
    assert (root / "current" / "weights.safetensors").is_file()
