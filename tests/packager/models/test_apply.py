# SPDX-License-Identifier: Apache-2.0
"""A patch is applied to files: all at once, provably, or not at all."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from edge_runtime.errors import VerificationError, WrongParentError
from edge_runtime.formats.patch import open_patch
from edge_runtime.live.shared import public_key
from packager.cli.pack import pack, patch
from packager.key_lists import make_list, sign_list
from packager.keys import generate_key
from packager.models import staged
from packager.models.apply import apply_to_files
from packager.models.read import read_model
from packager.signing import sign
from tests.packager.models.test_checkpoint import STATE, cached, changed, cut


@pytest.fixture
def release(tmp_path, command):
    """Old and new state as files and as shards, and the patch between them."""
    for name, state in {"old": STATE, "new": changed(STATE)}.items():
        save_file(state, tmp_path / f"{name}.safetensors", {"format": "pt"})
        cut(tmp_path / f"{name}-shards", state)
    pair = ("--base", tmp_path / "old.safetensors", "--target", tmp_path / "new-shards")
    assert command(pack, *pair, "-o", tmp_path / "up.dpu")[0] == 0
    return tmp_path


def tree(folder):
    return {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def shards(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def test_a_file_stays_as_it_is_but_for_what_changed(release, command):
    old, new = release / "old.safetensors", release / "out.safetensors"
    code, out, _ = command(patch, "apply", old, release / "up.dpu", "-o", new, "--json")
    record = json.loads(out)
    assert code == 0
    assert new.read_bytes() == (release / "new.safetensors").read_bytes()
    assert read_model(new).weights.fingerprint == record["target"]
    with safe_open(new, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    for name, tensor in changed(STATE).items():
        assert torch.equal(load_file(new)[name], tensor)


def test_a_canonical_file_becomes_the_canonical_target(release, command):
    old = release / "old-shards"
    command(patch, "extract", old, "-o", release / "held")
    base, new = release / "held" / "weights.safetensors", release / "out"
    code, out, _ = command(patch, "apply", base, release / "up.dpu", "-o", new)
    assert code == 0
    digest = hashlib.sha256(new.read_bytes()).hexdigest()
    assert out == f"{digest}  {new}\n"
    with open_patch(release / "up.dpu") as opened:
        assert opened.header.target == digest


@pytest.mark.parametrize("form", ["folder", "index", "cache"])
def test_shards_stay_shards_with_their_index(release, command, form):
    base = {
        "folder": release / "old-shards",
        "index": release / "old-shards" / "model.safetensors.index.json",
        "cache": cached(release / "cache", STATE),
    }[form]
    out = release / "out"
    code, said, _ = command(patch, "apply", base, release / "up.dpu", "-o", out)
    assert (code, "in 3 files" in said) == (0, True)
    assert shards(out) == shards(release / "new-shards")
    assert not any(p.is_symlink() for p in out.iterdir())


def test_nothing_is_replaced_unasked_and_never_what_is_not_ours(release, command):
    up = release / "up.dpu"
    for base, out in [("old.safetensors", "there"), ("old-shards", "many")]:
        path = release / out
        first = command(patch, "apply", release / base, up, "-o", path)
        assert first[0] == 0
        for file in [path] if path.is_file() else path.iterdir():
            file.write_bytes(b"older")
        before = tree(release)
        code, _, err = command(patch, "apply", release / base, up, "-o", path)
        assert (code, "--force to replace it" in err) == (2, True)
        assert tree(release) == before
        again = command(patch, "apply", release / base, up, "-o", path, "--force")
        assert again[0] == 0
        assert read_model(path).weights.fingerprint in first[1]
    (release / "many" / "config.json").write_text("{}")
    before = tree(release)
    words = ("apply", release / "old-shards", up, "-o", release / "many", "--force")
    code, _, err = command(patch, *words)
    assert (code, "other files too (config.json)" in err) == (2, True)
    assert tree(release) == before


def test_a_name_that_ends_with_a_slash_is_a_folders(release, command):
    (release / "one").mkdir()
    (release / "old.safetensors").rename(release / "one" / "model.safetensors")
    for again in ([], ["--force"]):  # there is none at first
        words = (release / "one", release / "up.dpu", "-o", f"{release}/next/", *again)
        code, out, _ = command(patch, "apply", *words, "--json")
        assert code == 0
        path = release / "next" / "model.safetensors"
        assert json.loads(out)["output"] == str(path)
        assert path.read_bytes() == (release / "new.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("base", "out", "words"),
    [
        ("old-shards", "new.safetensors", "is a file, expected a name for a folder"),
        ("old.safetensors", "/dev/null", "is no ordinary file"),
    ],
)
def test_a_name_of_another_kind_is_refused(release, command, base, out, words):
    before = tree(release)
    arguments = (release / base, release / "up.dpu", "-o", release / out, "--force")
    code, _, err = command(patch, "apply", *arguments)
    assert (code, words in err) == (2, True), err
    assert tree(release) == before
    assert Path("/dev/null").is_char_device()


def test_the_current_folder_is_no_place_for_shards(release, command, monkeypatch):
    (release / "empty").mkdir()
    monkeypatch.chdir(release / "empty")
    for out in (".", release / "empty", "../empty"):
        words = (release / "old-shards", release / "up.dpu", "-o", out)
        code, _, err = command(patch, "apply", *words)
        assert (code, "is the current folder" in err) == (2, True), err
    assert list((release / "empty").iterdir()) == []


@pytest.mark.parametrize("base", ["old-shards", "old.safetensors"])
def test_what_a_link_leads_to_is_written(release, command, base):
    aim, link = release / "aim", release / "link"
    link.symlink_to("aim")
    for force in ([], ["--force"]):
        words = (release / base, release / "up.dpu", "-o", link, *force)
        code, _, err = command(patch, "apply", *words)
        assert code == 0, err
        assert link.readlink() == Path("aim")
        assert aim.is_dir() == (base == "old-shards")
        assert not list(release.glob(".*"))


def test_the_base_may_be_replaced_by_the_result(release, command):
    for base in ("old.safetensors", "old-shards"):
        words = (release / base, release / "up.dpu", "-o", release / base, "--force")
        assert command(patch, "apply", *words)[0] == 0
        code, _, err = command(patch, "apply", *words)
        assert (code, "it was applied already" in err) == (4, True)


def test_what_is_replaced_stays_as_private_as_it_was(release, command):
    shards = release / "old-shards"
    private = [release / "old.safetensors", *shards.iterdir()]
    for path in private:
        path.chmod(0o600)
    shards.chmod(0o700)
    for base in ("old.safetensors", "old-shards"):
        words = (release / base, release / "up.dpu", "-o", release / base, "--force")
        assert command(patch, "apply", *words)[0] == 0
    assert {path.stat().st_mode & 0o777 for path in private} == {0o600}
    assert shards.stat().st_mode & 0o777 == 0o700


def test_a_wrong_base_is_refused_by_what_it_holds(release, command):
    save_file({"w": torch.ones(3)}, release / "other.safetensors")
    third = changed(STATE)
    third["z.bias"] += 1
    save_file(third, release / "third.safetensors")
    before = tree(release)
    for base, words in {
        "other": "bytes; the patch is for one of",
        "third": "apply the patches between them first",
    }.items():
        arguments = (release / f"{base}.safetensors", release / "up.dpu")
        code, _, err = command(patch, "apply", *arguments, "-o", release / "out")
        assert (code, words in err) == (4, True), err
    assert tree(release) == before


def test_what_is_no_safetensors_file_is_refused_with_the_way_out(release, command):
    torch.save(STATE, release / "old.pt")
    (release / "pickled").mkdir()
    torch.save(STATE, release / "pickled" / "pytorch_model.bin")
    for base in ("old.pt", "pickled"):
        words = (release / base, release / "up.dpu", "-o", release / "out")
        code, _, err = command(patch, "apply", *words)
        assert (code, "dpu-patch extract" in err) == (3, True), err


def test_only_what_a_trusted_key_signed_is_applied(release, command, monkeypatch):
    monkeypatch.chdir(release)
    for name in ("ours.pem", "theirs.pem"):
        assert command(patch, "keygen", name)[0] == 0
    words = ("apply", "old.safetensors", "up.dpu", "-o", "out", "--trust")
    code, _, err = command(patch, *words, "ours.pub.pem")
    assert (code, "signed" in err) == (8, True)
    assert command(patch, "sign", "up.dpu", "--key", "ours.pem")[0] == 0
    assert command(patch, *words, "theirs.pub.pem")[0] == 8
    both = (*words, "ours.pub.pem", "--trust", "theirs.pub.pem")
    assert command(patch, *both, "--threshold", 2)[0] == 8
    assert not (release / "out").exists()
    assert command(patch, *both)[0] == 0


def test_a_key_list_says_who_is_trusted_until_it_expires(release, command):
    key = generate_key()
    signed = sign((release / "up.dpu").read_bytes(), [key])
    (release / "up.dpu").write_bytes(signed)
    for year, code in (("2999", 0), ("2021", 8)):
        times = "2020-01-01T00:00:00Z", f"{year}-01-01T00:00:00Z"
        listed = make_list([public_key(key)], [public_key(key)], times)
        (release / "1.root.json").write_bytes(sign_list(listed, [key]))
        words = (release / "old.safetensors", release / "up.dpu", "-o")
        trusted = ("--trust", release / "1.root.json")
        got, _, err = command(patch, "apply", *words, release / year, *trusted)
        assert (got, (release / year).exists()) == (code, not code)
        assert ("expired" in err) == bool(code)


@pytest.mark.parametrize("nameless", [True, False])
@pytest.mark.parametrize("base", ["old.safetensors", "old-shards"])
def test_an_error_on_the_way_leaves_nothing_behind(
    release, monkeypatch, base, nameless
):
    if not nameless:
        monkeypatch.setattr(staged, "TMPFILE", None)
    writes = []

    def full(handle, data, at, write=os.pwrite):
        writes.append(at)
        if len(writes) == 4:
            raise OSError(28, "No space left on device")
        return write(handle, data, at)

    before = tree(release)
    with open_patch(release / "up.dpu") as opened:
        with monkeypatch.context() as patched:
            patched.setattr(os, "pwrite", full)
            with pytest.raises(OSError, match=f"No space.*{release}/out"):
                apply_to_files(release / base, opened, release / "out")
        assert tree(release) == before
        apply_to_files(release / base, opened, release / "out")
    (release / "out").rename(release.parent / f"{nameless}{base}")
    assert sorted(p.name for p in release.iterdir() if p.name.startswith(".")) == []
    assert tree(release) == before


def test_a_disk_that_writes_something_else_is_found_out(release, monkeypatch):
    before = tree(release)

    def wrong(handle, data, at, write=os.pwrite):
        return write(handle, bytes(len(data)) if at else data, at)

    monkeypatch.setattr(os, "pwrite", wrong)
    with open_patch(release / "up.dpu") as opened, pytest.raises(VerificationError):
        apply_to_files(release / "old.safetensors", opened, release / "out")
    assert tree(release) == before


def test_a_base_that_changes_meanwhile_gives_no_result(release, monkeypatch):
    base = release / "old.safetensors"
    write = os.pwrite

    def and_change(handle, data, at):
        with base.open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"\xee")
        return write(handle, data, at)

    monkeypatch.setattr(os, "pwrite", and_change)
    with open_patch(release / "up.dpu") as opened, pytest.raises(VerificationError):
        apply_to_files(base, opened, release / "out")
    assert not (release / "out").exists()


SLOW = """
import os, sys, time
from packager.__main__ import patch
write = os.pwrite
def slow(*arguments):
    print("writes", flush=True)
    time.sleep(9)
os.pwrite = slow
sys.argv = ["dpu-patch", *sys.argv[1:]]
patch()
"""


@pytest.mark.parametrize("name", [signal.SIGKILL, signal.SIGINT])
def test_a_process_that_is_killed_leaves_nothing_behind(release, name):
    before = tree(release)
    words = ["apply", "old-shards", "up.dpu", "-o", "out"]
    with subprocess.Popen(
        [sys.executable, "-c", SLOW, *words],
        cwd=release,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:
        assert process.stdout.readline() == b"writes\n"
        process.send_signal(name)
        process.wait()
    assert process.returncode in (-signal.SIGKILL, 130)
    assert tree(release) == before
    assert not [p for p in release.iterdir() if p.name.startswith(".")]


def test_memory_does_not_grow_with_the_model(tmp_path):
    """Two sizes, eight-fold apart: what is held beside mapped pages stays the same."""
    peaks = []
    for size in (4 << 20, 32 << 20):
        state = {f"w{n}": torch.zeros(size // 8 // 4) for n in range(8)}
        save_file(state, tmp_path / "a.safetensors")
        state["w3"][5] = 1
        save_file(state, tmp_path / "b.safetensors")
        code = (
            "import sys, tracemalloc\n"
            "from packager.models.read import read_model, pack_models\n"
            "from packager.models.apply import apply_to_files\n"
            "from edge_runtime.formats.patch import open_patch\n"
            "from pathlib import Path\n"
            "a, b, out = map(Path, sys.argv[1:])\n"
            "data = pack_models(read_model(a), read_model(b)).data\n"
            "tracemalloc.start()\n"
            "with open_patch(data) as up: apply_to_files(a, up, out, force=True)\n"
            "print(tracemalloc.get_traced_memory()[1])"
        )
        files = [tmp_path / n for n in ("a.safetensors", "b.safetensors", "out")]
        done = subprocess.run(
            [sys.executable, "-c", code, *map(str, files)],
            capture_output=True,
            text=True,
            check=True,
            cwd=Path(__file__).parents[3],
        )
        peaks.append(int(done.stdout))
        assert files[1].read_bytes() == files[2].read_bytes()
    assert peaks[1] < peaks[0] * 1.5
    assert peaks[1] < 16 << 20


def test_an_apply_is_refused_in_the_library_too(release):
    with open_patch(release / "up.dpu") as opened:
        with pytest.raises(WrongParentError) as caught:
            apply_to_files(release / "new.safetensors", opened, release / "out")
        assert caught.value.actual == opened.header.target
