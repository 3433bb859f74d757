# SPDX-License-Identifier: Apache-2.0
"""What a bundle carries is bounded before it is read."""

import hashlib
import io
import json
import zipfile
from copy import copy

import pytest

from edge_runtime.errors import BundleError, KeyFileError
from edge_runtime.formats.bundle import read_bundle
from edge_runtime.formats.signing import FirstUse
from edge_runtime.limits import limits
from packager.zip_file import encode_bundle

PEM = b"x" * limits().key_bytes
MOST = limits().list_keys


def test_a_bundle_with_more_keys_than_a_list_may_have_is_refused_before_one_is_read():
    keys = {f"keys/{n}.pem": b"" for n in range(MOST + 1)}
    with pytest.raises(BundleError, match=rf"{MOST + 1} keys, {MOST} are accepted"):
        read_bundle(encode_bundle({}, keys), FirstUse(1))
    del keys["keys/0.pem"]
    with pytest.raises(KeyFileError):
        read_bundle(encode_bundle({}, keys), FirstUse(1))


def test_keys_that_lie_in_the_same_bytes_are_refused_before_one_is_read():
    names = [f"keys/{n}.pem" for n in range(MOST)]
    files = dict.fromkeys(names, hashlib.sha256(PEM).hexdigest())
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("bundle.json", json.dumps({"schema": 1, "files": files}))
        archive.writestr(names[0], PEM)
        for name in names[1:]:
            entry = copy(archive.filelist[-1])
            entry.filename = name
            archive.filelist.append(entry)
    with pytest.raises(BundleError, match="more bytes than the"):
        read_bundle(out.getvalue(), FirstUse(1))


def bundle_whose_manifest(path, **facts):
    """A zip file whose index says what is not so of its only member."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("bundle.json", "{}" + " " * 1000)
        for name, value in facts.items():
            setattr(archive.filelist[0], name, value)
    return path


@pytest.mark.parametrize("place", [1 << 50, (1 << 63) - 1])
def test_a_member_that_begins_where_no_file_has_a_place_is_no_fault_of_the_disk(
    tmp_path, place
):
    with pytest.raises(BundleError, match="damaged"):
        read_bundle(bundle_whose_manifest(tmp_path / "b.zip", header_offset=place))


def test_a_member_that_has_more_bytes_than_it_states_is_refused_unread(tmp_path):
    with pytest.raises(BundleError, match=r"bundle\.json is compressed"):
        read_bundle(bundle_whose_manifest(tmp_path / "b.zip", file_size=2))
