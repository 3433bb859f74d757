# SPDX-License-Identifier: Apache-2.0
"""Places: what a folder and an object store have in common, and how they are named."""

import json
import os
import sys

import pytest
from obstore.store import MemoryStore

from edge_runtime.errors import AddressError, StoreError, SyncError
from packager.cli.fleet import fleet
from packager.fleet.address import open_place
from packager.fleet.object_place import ObjectPlace
from packager.fleet.place import LOCK_NAME, FolderPlace


@pytest.fixture(params=["folder", "memory"])
def place(request, tmp_path):
    if request.param == "folder":
        return FolderPlace(tmp_path / "fleet")
    return ObjectPlace(MemoryStore(), "memory://fleet")


def test_a_name_is_given_once(place):
    assert place.create("patches/a.dpu", b"a")
    assert not place.create("patches/a.dpu", b"a")
    with pytest.raises(StoreError, match="something else than its name says"):
        place.create("patches/a.dpu", b"b")
    assert place.read("patches/a.dpu")[0] == b"a"


def test_a_stale_tag_replaces_nothing(place):
    assert place.swap("x.head", b"1", None)
    assert not place.swap("x.head", b"2", None)
    old = place.read("x.head")[1]
    assert place.swap("x.head", b"2", old)
    assert not place.swap("x.head", b"3", old)
    assert place.read("x.head")[0] == b"2"


def test_a_listing_has_what_lies_below_a_folder_at_any_depth(place):
    for path in ("keys/1.root.json", "keys/old/0.root.json", "keysmith", "x.head"):
        place.create(path, path.encode())
    assert list(place.names("keys/")) == [
        ("keys/1.root.json", 16),
        ("keys/old/0.root.json", 20),
    ]
    assert [path for path, _ in place.names("")] == [
        *("keys/1.root.json", "keys/old/0.root.json", "keysmith", "x.head")
    ]
    assert list(place.names("keys")) == list(place.names("keys/"))
    assert [entry.path for entry in place.entries("keys", deep=False)] == [
        "keys/1.root.json"
    ]
    shallow = {entry.path for entry in place.entries("", deep=False)}
    assert shallow - {LOCK_NAME} == {"keysmith", "x.head"}
    assert list(place.names("nothing/")) == []


def test_the_tag_of_a_listing_changes_with_the_content(place):
    place.swap("x.head", b"1", None)
    before = list(place.entries(""))
    assert list(place.entries("")) == before
    place.swap("x.head", b"2", place.read("x.head")[1])
    after = {entry.path: entry for entry in place.entries("")}
    assert after["x.head"].tag != {e.path: e for e in before}["x.head"].tag
    assert after["x.head"].modified > 1_700_000_000


def test_of_a_file_that_is_too_large_no_more_is_read_than_tells_it(place):
    data = bytes(range(256)) * 300
    place.create("x.head", data)
    assert place.read("x.head")[0] == data[: 65536 + 1]
    assert place.read("x.head", 9)[0] == data[:10]
    assert place.read("x.head", len(data))[0] == data
    place.create("empty.head", b"")
    assert place.read("empty.head")[0] == b""


def test_what_is_no_ordinary_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "x.head")
    place = FolderPlace(tmp_path)
    with pytest.raises(OSError, match="no ordinary file"):
        place.read("x.head")
    with pytest.raises(OSError, match="no ordinary file"):
        place.create("x.head", b"")


def test_what_was_removed_is_gone_and_may_be_removed_again(place):
    place.create("patches/a.dpu", b"a")
    place.remove("patches/a.dpu")
    place.remove("patches/a.dpu")
    assert place.read("patches/a.dpu") is None
    assert list(place.names("")) == []


# Object stores ------------------------------------------------------------------------


def test_what_never_changes_may_be_cached_for_ever_and_heads_for_a_minute():
    import obstore

    store = MemoryStore()
    place = ObjectPlace(store, "memory://")
    place.create("patches/a.dpu", b"a")
    place.swap("x.head", b"{}", None)
    kept = obstore.get(store, "patches/a.dpu").attributes
    assert kept == {
        "Content-Type": "application/octet-stream",
        "Cache-Control": "public, max-age=31536000, immutable",
    }
    assert obstore.get(store, "x.head").attributes == {
        "Content-Type": "application/json",
        "Cache-Control": "public, max-age=60",
    }


def test_the_probe_leaves_nothing_and_says_what_it_does():
    said = []
    place = ObjectPlace(MemoryStore(), "memory://", say=said.append)
    assert list(place.entries("")) == []
    assert said == []  # reading asks for nothing
    place.create("a", b"a")
    place.create("b", b"b")
    assert [entry.path for entry in place.entries("")] == ["a", "b"]
    assert len(said) == 1
    assert "conditional writes" in said[0]


# Addresses ----------------------------------------------------------------------------


def test_a_folder_may_have_a_colon_in_its_name(tmp_path):
    assert open_place("./s3:digits").root.name == "s3:digits"
    assert open_place(str(tmp_path / "a:b")).root == tmp_path / "a:b"


@pytest.mark.parametrize("form", ["{}", "file://{}", "file://localhost{}"])
def test_a_folder_has_a_path_or_a_url(tmp_path, form):
    folder = tmp_path / "my fleet"
    url = form.format(str(folder).replace(" ", "%20") if "://" in form else folder)
    place = open_place(url)
    assert (type(place), place.root) == (FolderPlace, folder)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("https://example.org/digits", "not written"),
        ("ftp://example.org/digits", "expected a folder"),
        ("file://server/digits", "expected a folder"),
        ("s3://key:secret@bucket/digits", "environment"),
        ("s3://bucket/digits?secret_access_key=secret", "environment"),
        ("gs://bucket/digits?endpoint=https://secret.example", "endpoint for s3"),
        ("s3://bucket/digits?endpoint=secret", "https://"),
        ("s3://bucket/digits?endpoint=https://u:secret@host", "credentials"),
        ("s3://", "s3:"),
        ("s3://bucket/digits#secret", "found #..."),
        ("s3:bucket/digits?secret", "expected s3://"),
        ("s3:/bucket/digits", "expected s3://"),
        ("file:/srv/fleet", "expected file://"),
        ("s3://[secret/digits", "no address"),
    ],
)
def test_an_address_that_is_none_is_refused_without_its_secrets(url, words):
    with pytest.raises(AddressError) as found:
        open_place(url)
    assert words in str(found.value)
    assert "secret" not in str(found.value).replace("secret_access_key", "")


def test_a_place_is_named_without_what_follows_a_question_mark():
    place = open_place("s3://bucket/digits/?endpoint=http://127.0.0.1:9")
    assert place.name == "s3://bucket/digits"


def test_a_store_that_is_away_is_said_in_one_line_without_credentials(monkeypatch):
    monkeypatch.setattr("packager.fleet.object_place.RETRIES", {"max_retries": 0})
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "an-id-of-mine")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-secret-of-mine")
    place = open_place("s3://bucket/digits?endpoint=http://127.0.0.1:9")
    with pytest.raises(SyncError, match="cannot read it") as found:
        place.read("stable.head")
    assert "of-mine" not in str(found.value)
    assert "\n" not in str(found.value)


def test_without_the_library_the_error_names_the_extra(new_run, command, monkeypatch):
    run = new_run("digits")
    run.add(1)
    monkeypatch.setitem(sys.modules, "obstore", None)
    monkeypatch.delitem(sys.modules, "obstore.store", raising=False)
    monkeypatch.delitem(sys.modules, "obstore.exceptions", raising=False)
    words = ("round_01", "--runs", run.path.parent, "--to", "s3://bucket/digits")
    code, _, err = command(fleet, "publish", *words, "--json")
    assert (code, "pip install -e '.[fleet]'" in err) == (2, True)
    assert json.loads(err.splitlines()[-1])["exit_code"] == 2
