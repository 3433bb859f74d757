# SPDX-License-Identifier: Apache-2.0
"""From every state that a power cut may leave, the next start goes on.

A small part of what ``make test-crash`` explores; of the larger explorations a share of
the states, the same ones each time.
"""

import subprocess
import sys
from functools import partial

import pytest

from edge_runtime.files import Files
from tests.crash import world
from tests.crash.disk import Disk, read_tree, write_tree
from tests.crash.explore import Count, cut_again, cut_power, kill_then_cut, live
from tests.crash.recording import (
    LIFE,
    TROUBLE,
    Recording,
    install,
    rollback,
    rollback_far,
    update,
)
from tests.crash.traced import Careless, Forgetful, Recorder


@pytest.fixture
def record():
    """Record steps on a fresh store, some steps into its life."""
    with world.scratch() as folder:

        def play(*steps, before=(), files=None):
            base = folder / str(len(list(folder.iterdir())))
            base.mkdir()
            states = Recording(base).play(*before).states() if before else [None]
            return Recording(base, files and files(base), states).play(*steps)

        yield play


def test_an_installation_is_whole_or_absent(record):
    count = Count(share=0.2)
    cut_power(record(install), count)
    assert not count.bad
    assert count.states > 100


def test_a_life_without_a_crash_keeps_every_promise(tmp_path):
    live(tmp_path, install, *LIFE, *TROUBLE)


def test_updates_and_rollbacks_survive_a_power_cut_anywhere(record):
    count = Count()
    cut_power(record(update, rollback_far, before=(install, update, update)), count)
    assert not count.bad
    assert count.states > 100


def test_damage_and_what_mends_it_survive_a_power_cut_anywhere(record):
    before = (install, update, update, rollback, Recording.rot_slot)
    count = Count()
    cut_power(record(Recording.come_forward, Recording.rot_state, before=before), count)
    assert not count.bad
    assert count.states > 100


def test_a_second_cut_while_the_next_start_recovers_is_survived(record):
    count = Count(share=0.4)
    cut_again(record(rollback, before=(install, update)), count)
    assert not count.bad
    assert count.states > 20


def test_a_kill_followed_by_a_power_cut_is_survived(record):
    count = Count(share=0.2)
    recording = record(update, before=(install, update))
    kill_then_cut(recording, count, after="rename")
    assert not count.bad


# The proof can fail ----------------------------------------------------------------

BEFORE = (install, update)
STEPS = (update,)


def test_every_sync_of_a_new_slot_is_needed(record):
    """Each place that syncs one, left out, leads to a broken promise.

    Those of a commit and of the tidying up take minutes; mutants.py has them.
    """
    whole = record(*STEPS, before=BEFORE, files=Forgetful)
    assert len(whole.files.sites) == 10
    sites = [site for site in whole.files.sites if site.startswith("stage")]
    assert len(sites) == 3
    for site in sites:
        files = partial(Forgetful, site=site)
        recording = record(*STEPS, before=BEFORE, files=files)
        count = Count(enough=1)
        cut_power(recording, count)
        assert count.bad, f"nobody notices that this sync is missing: {site}"


def test_a_share_of_the_states_is_the_same_share_each_time(record):
    recording = record(install)

    def drawn():
        count, seen = Count(share=0.05), []
        cut_power(recording, count, examined=lambda base, _: seen.append(shape(base)))
        assert count.states == len(seen) > 20
        assert count.passed > 10 * count.states
        return seen

    assert drawn() == drawn()


def shape(base):
    return sorted(str(path.relative_to(base)) for path in base.rglob("*"))


def test_what_a_killed_process_left_in_memory_is_swept_away():
    with world.scratch() as folder:
        ended = subprocess.Popen([sys.executable, "-c", ""])
        ended.wait()
        left = folder.with_name(f"{world.PREFIX}{ended.pid}-left")
        left.mkdir()
        world.sweep()
        assert folder.exists()
        assert not left.exists()


# The model of the disk -------------------------------------------------------------


def after(folder, work, files=Recorder):
    """The trees that a power cut may leave of some work in an empty folder."""
    files = files(folder)
    disk = Disk(read_tree(folder))
    work(files)
    for entry in files.log:
        disk.apply(*entry)
    assert disk.running() == read_tree(folder)
    return set(disk.after_power_cut())


def test_a_file_may_be_torn_until_it_is_synced(tmp_path):
    def work(files):
        files.write(files.base / "f", [b"abcd"])

    torn = {b"", b"ab", b"\0\0\0\0", b"\0\0cd", b"ab\0\0", b"abcd"}
    for files, contents in ((Careless, torn), (Recorder, {b"abcd"})):
        (tmp_path / files.__name__).mkdir()
        trees = after(tmp_path / files.__name__, work, files)
        assert trees == {
            ("d", ()),  # its name is not durable yet
            *(("d", (("f", ("f", content)),)) for content in contents),
        }


def test_names_are_lost_in_any_combination_until_the_folder_is_synced(tmp_path):
    def work(files):
        files.write(tmp_path / "a", [b"1"])
        files.sync_folder(tmp_path)
        files.rename(tmp_path / "a", tmp_path / "b")
        files.mkdir(tmp_path / "c")

    names = {tuple(name for name, _ in tree[1]) for tree in after(tmp_path, work)}
    assert names == {(*m, *c) for m in ("a", "ab", "b") for c in ("", "c")}


def test_a_tree_written_and_read_is_the_same(tmp_path):
    tree = (
        "d",
        (
            ("a", ("f", b"x")),
            ("b", ("d", (("c", ("f", b"x")),))),
            ("l", ("l", "b")),
        ),
    )
    write_tree(tree, tmp_path / "t")
    assert read_tree(tmp_path / "t") == tree
    # Equal files are one file: whoever writes into one of them is found out.
    assert (tmp_path / "t" / "a").samefile(tmp_path / "t" / "b" / "c")
    Files().write(tmp_path / "t" / "a", [b"y"])
    assert (tmp_path / "t" / "b" / "c").read_bytes() == b"x"
