# SPDX-License-Identifier: Apache-2.0
"""Key lists that arrive in the agent's folder."""

import pytest

from edge_runtime.agent.status import read_status
from edge_runtime.errors import TrustError
from tests.crash import world
from tests.edge_runtime.agent.test_agent import Watch
from tests.edge_runtime.trust import fleet

THIRD = fleet.list_2(
    fleet.list_2(),
    add={"targets": fleet.public("newest")},
    remove={"targets": fleet.public("new")},
)


@pytest.fixture
def watch(tmp_path):
    watch = Watch(tmp_path)
    fleet.device(tmp_path)
    return watch.start()


def decided(watch):
    files = read_status(watch.root)["files"]
    return {name: file["verdict"] for name, file in files.items()}


def version(watch):
    return watch.device.store.state.key_list.root.version


def test_lists_are_taken_in_order_and_before_the_patches_that_need_them(watch):
    watch.put("round_01.dpu", fleet.release(0, 1, "newest"))
    watch.put("3.root.json", THIRD)
    watch.put("2.root.json", fleet.list_2())
    watch.put("1.root.json", fleet.list_1())
    said = watch.look()
    assert [s for s in said if s[0] == "applied"] == [
        ("applied", "2.root.json"),
        ("applied", "3.root.json"),
        ("applied", "round_01.dpu"),
    ]
    assert (version(watch), watch.round) == (3, 1)
    assert decided(watch) == {
        "1.root.json": "passed",
        "2.root.json": "passed",
        "3.root.json": "applied",
        "round_01.dpu": "applied",
    }
    assert watch.look() == []


def test_a_list_waits_for_the_one_before_it(watch):
    watch.put("3.root.json", THIRD)
    assert watch.look() == [("waiting", "3.root.json")]
    assert version(watch) == 1
    watch.put("2.root.json", fleet.list_2())
    watch.look()
    assert version(watch) == 3


def test_a_patch_of_a_revoked_key_that_was_waiting_is_refused(watch):
    watch.put("round_02.dpu", fleet.release(1, 2, "fleet"))
    assert watch.look() == [("waiting", "round_02.dpu")]
    watch.put("2.root.json", fleet.list_2())
    watch.put("round_01.dpu", fleet.release(0, 1, "fleet"))
    watch.look()
    assert watch.round == 0
    assert set(watch.errors) == {"round_01.dpu", "round_02.dpu"}


def test_what_was_refused_is_welcome_once_a_list_names_its_key(watch):
    watch.put("round_01.dpu", fleet.release(0, 1, "new"))
    assert watch.look() == [("refused", "round_01.dpu")]
    watch.put("2.root.json", fleet.list_2())
    assert ("applied", "round_01.dpu") in watch.look()


def test_malicious_mirrors_cannot_keep_a_good_list_away(watch):
    """Whatever else lies in the folder is named once, and left alone after that."""
    stranger = fleet.list_2(fleet.list_1(("thief", "pal")), ("thief", "pal"))
    watch.put("2.ROOT.JSON", stranger)
    watch.put("3.root.json", b"{}")
    watch.put("4.root.json", b"\0" * 2_000_000)
    watch.put("1.root.json", stranger)
    watch.look()
    watch.look()
    assert version(watch) == 1
    assert "2.ROOT.JSON" in watch.errors
    assert watch.look() == []
    watch.put("2.root.json", fleet.list_2())
    watch.look()
    assert version(watch) == 2
    watch.put("3.root.json", THIRD)
    watch.look()
    assert version(watch) == 3


def test_a_list_under_a_wrong_number_is_looked_at_again_when_its_time_has_come(watch):
    """What is refused is refused by a list: under the next one it may be right."""
    more = {"add": {"root": fleet.public("cat")}}
    second = fleet.list_2(signers=("ann", "bob", "cat"), **more)
    watch.put("2.root.json", fleet.list_2(second, ("ann", "bob")))
    assert watch.look() == [("refused", "2.root.json")]
    watch.device.add_list(second)
    watch.look()
    assert version(watch) == 3


def test_half_a_list_waits_for_the_rest(watch):
    data = fleet.list_2()
    watch.put("2.root.json", data[:300])
    assert watch.look() == [("waiting", "2.root.json")]
    watch.put("2.root.json", data)
    assert ("applied", "2.root.json") in watch.look()


def test_a_pinned_device_still_loses_a_stolen_key(watch):
    watch.device.pin()
    watch.put("2.root.json", fleet.list_2())
    watch.look()
    assert version(watch) == 2
    with pytest.raises(TrustError):
        watch.device.update(fleet.release(0, 1, "fleet"))


def test_a_device_that_trusts_nobody_takes_no_list_from_a_folder(tmp_path):
    watch = Watch(tmp_path)
    world.install(watch.root)
    watch.start()
    watch.put("1.root.json", fleet.list_1())
    watch.look()
    assert watch.device.store.state.key_list is None
    watch.put("round_01.dpu", world.patch(0, 1))
    watch.look()
    assert watch.round == 1


def test_single_keys_move_over_by_the_folder(tmp_path):
    watch = Watch(tmp_path)
    fleet.pem_device(tmp_path, "fleet")
    watch.start()
    watch.put("1.root.json", fleet.signed(fleet.list_1(), "fleet"))
    watch.put("2.root.json", fleet.list_2())
    watch.look()
    assert version(watch) == 2


def test_an_expired_list_holds_releases_back_and_says_so(tmp_path):
    times = "2020-01-01T00:00:00Z", "2021-01-01T00:00:00Z"
    watch = Watch(tmp_path)
    fleet.pem_device(tmp_path, "fleet").add_list(
        fleet.signed(fleet.list_1(times=times), "fleet")
    )
    watch.start()
    watch.put("round_01.dpu", fleet.release(0, 1, "fleet"))
    assert watch.look() == [("held", "round_01.dpu")]
    assert "expired 2021-01-01" in watch.reason
    timely = "2020-12-31T00:00:00Z", fleet.UNTIL
    watch.put("2.root.json", fleet.list_2(fleet.list_1(times=times), times=timely))
    watch.look()
    assert watch.round == 0  # by then it is a revoked key's
    watch.put("round_02.dpu", fleet.release(0, 1, "new"))
    watch.look()
    assert watch.round == 1
