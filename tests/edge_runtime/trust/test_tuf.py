# SPDX-License-Identifier: Apache-2.0
"""The Update Framework's own client as the oracle, in both directions."""

import copy
import json
from datetime import UTC, datetime

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from securesystemslib.formats import encode_canonical as canonical_of_tuf
from securesystemslib.signer import CryptoSigner
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Metadata, Root
from tuf.ngclient import UpdaterConfig
from tuf.ngclient._internal.trusted_metadata_set import TrustedMetadataSet
from tuf.ngclient.config import EnvelopeType

from edge_runtime.errors import DpuError
from edge_runtime.limits import Limits
from edge_runtime.trust import first_root, next_root, tuf_key_id
from edge_runtime.trust.canonical import encode_canonical
from edge_runtime.trust.root import OTHERS, _entry_id
from tests.edge_runtime.trust import fleet

OWNERS, RELEASES = ("ann", "bob"), ("fleet", "second")
EXPIRES = datetime(2100, 1, 1, tzinfo=UTC)


def tuf_accepts(current, new):
    """Whether TUF's client, which trusts one list, goes on to the other."""
    trusted = TrustedMetadataSet(current, EnvelopeType.METADATA)
    try:
        trusted.update_root(new)
    except (RepositoryError, ValueError):
        return False
    return True


def we_accept(current, new):
    try:
        next_root(first_root(current), new)
    except DpuError:
        return False
    return True


def tuf_root(version=1, owners=OWNERS, releases=RELEASES, signers=(), threshold=2):
    """A list that python-tuf made and signed, from its first to its last byte."""
    root = Root(version=version, expires=EXPIRES, consistent_snapshot=False)
    for role, names in (("root", owners), ("targets", releases)):
        for name in names:
            root.add_key(CryptoSigner(fleet.key(name)).public_key, role)
        root.roles[role].threshold = threshold
    for role in ("snapshot", "timestamp"):
        root.add_key(CryptoSigner(fleet.key("online")).public_key, role)
    metadata = Metadata(root)
    for name in signers or owners:
        metadata.sign(CryptoSigner(fleet.key(name)), append=True)
    return metadata.to_bytes()


def test_lists_that_python_tuf_made_are_accepted_here():
    one = tuf_root()
    two = tuf_root(2, ("ann", "cat"), ("fleet", "new"), ("ann", "bob", "cat"))
    assert tuf_accepts(one, two)
    first = first_root(one)
    assert first.keys.keys == tuple(fleet.public(*OWNERS))
    second = next_root(first, two)
    assert (second.version, second.expires) == (2, "2100-01-01T00:00:00Z")
    assert second.releases.keys == tuple(fleet.public("fleet", "new"))
    assert (second.releases.threshold, second.issued) == (2, "")


def test_python_tuf_and_we_name_keys_alike():
    for name in ("ann", "bob", "fleet"):
        theirs = CryptoSigner(fleet.key(name)).public_key
        assert theirs.keyid == tuf_key_id(*fleet.public(name))


def test_lists_made_here_are_accepted_by_python_tuf():
    one, two = fleet.list_1(), fleet.list_2()
    three = fleet.list_2(
        two,
        ("ann", "bob", "cat"),
        add={"root": fleet.public("cat"), "targets": fleet.public("more")},
        remove={"root": fleet.public("ann")},
    )
    trusted = TrustedMetadataSet(one, EnvelopeType.METADATA)
    trusted.update_root(two)
    trusted.update_root(three)
    assert trusted.root.version == 3
    assert trusted.root.expires == EXPIRES
    assert set(trusted.root.roles["targets"].keyids) == {
        tuf_key_id(*fleet.public(name)) for name in ("new", "more")
    }
    assert we_accept(one, two)


def test_python_tuf_goes_on_with_a_list_made_here_and_we_with_one_of_its():
    """A list that two tools sign in turn."""
    two = Metadata[Root].from_bytes(fleet.list_2(signers=("ann",)))
    two.sign(CryptoSigner(fleet.key("bob")), append=True)
    assert we_accept(fleet.list_1(), two.to_bytes())
    assert tuf_accepts(fleet.list_1(), fleet.signed(two.to_bytes(), "ann"))


def test_the_limit_of_a_list_is_that_of_tufs_client():
    assert UpdaterConfig().root_max_length == Limits().key_list_bytes


# Canonical JSON -----------------------------------------------------------------------

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(VALUES)
def test_canonical_json_is_that_of_securesystemslib(value):
    assert encode_canonical(value) == canonical_of_tuf(value).encode()


@given(VALUES)
def test_canonical_json_is_the_same_however_a_file_is_laid_out(value):
    for options in (
        {},
        {"indent": 2},
        {"ensure_ascii": False, "separators": (",", ":")},
    ):
        text = json.dumps(value, **options)
        assert encode_canonical(json.loads(text)) == encode_canonical(value)


@pytest.mark.parametrize("value", [1.0, [1.5], {"a": float("nan")}, "\ud800"])
def test_what_has_no_canonical_form_is_refused(value):
    with pytest.raises(ValueError, match=r"."):
        encode_canonical(value)


# The same verdict ---------------------------------------------------------------------

BASE = tuf_root()
NEXT = tuf_root(2, ("ann", "cat"), ("fleet", "new"), ("ann", "bob", "cat"))
NAMES = ("ann", "bob", "cat", "fleet", "new", "thief")
IDS = [tuf_key_id(*fleet.public(name)) for name in NAMES]
ROLES = st.sampled_from(["root", "targets", "snapshot", "timestamp"])


def places(value, path=()):
    """Every place in plain JSON."""
    yield path
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in items:
            yield from places(inner, (*path, key))


def at(record, path):
    for key in path:
        record = record[key]
    return record


@st.composite
def mutated(draw, *, wildly=False):
    """A list that was changed in some ways, and perhaps signed again after that."""
    record = json.loads(NEXT)
    for kind in draw(st.lists(st.sampled_from(SAME), max_size=3)):
        kind(draw, record)
    for kind in draw(st.lists(st.sampled_from(WILD), max_size=2)) if wildly else ():
        kind(draw, record)
    signed_again = draw(st.booleans())
    if signed_again and isinstance(record.get("signed"), dict):
        names = draw(st.lists(st.sampled_from(NAMES), unique=True, max_size=5))
        try:
            return fleet.resigned(record, *names)
        except (ValueError, RecursionError):
            assume(False)
    return json.dumps(record).encode()


def number(draw, record):
    record["signed"]["version"] = draw(st.integers(-1, 5))


def role_of(record, name):
    return record["signed"]["roles"].get(name, {"keyids": [], "threshold": 1})


def threshold(draw, record):
    role_of(record, draw(ROLES))["threshold"] = draw(st.integers(-1, 3))


def add_to_role(draw, record):
    role_of(record, draw(ROLES)).get("keyids", []).append(draw(st.sampled_from(IDS)))


def take_from_role(draw, record):
    ids = role_of(record, draw(ROLES)).get("keyids", [])
    if ids:
        ids.remove(draw(st.sampled_from(ids)))


def drop_key(draw, record):
    record["signed"]["keys"].pop(draw(st.sampled_from(IDS)), None)


def other_kind_of_key(draw, record):
    keys = record["signed"]["keys"]
    if keys:
        name = draw(st.sampled_from(sorted(keys)))
        entry = keys.pop(name)
        kinds = [
            ("ed448", "ed25519"),
            ("ed25519", "ed448"),
            ("rsa", "ed25519"),
            *OTHERS,
        ]
        entry["keytype"], entry["scheme"] = draw(st.sampled_from(kinds))
        keys[_entry_id(entry)] = entry
        for role in record["signed"]["roles"].values():
            role["keyids"] = [
                _entry_id(entry) if i == name else i for i in role["keyids"]
            ]


def drop_signature(draw, record):
    if record["signatures"]:
        record["signatures"].pop(draw(st.integers(0, len(record["signatures"]) - 1)))


def double_signature(draw, record):
    if record["signatures"]:
        record["signatures"].append(draw(st.sampled_from(record["signatures"])))


def bend_signature(draw, record):
    for entry in record["signatures"]:
        if len(entry["sig"]) == 128 and draw(st.booleans()):
            bits = bytearray.fromhex(entry["sig"])
            bits[draw(st.integers(0, 63))] ^= 1 << draw(st.integers(0, 7))
            entry["sig"] = draw(
                st.sampled_from([bits.hex(), entry["sig"][:-2], "zz", ""])
            )


def swap_signatures(draw, record):
    for entry in record["signatures"]:
        entry["keyid"] = draw(st.sampled_from([entry["keyid"], *IDS]))


def note(draw, record):
    where = draw(st.sampled_from(["top", "signed", "role", "signature"]))
    place = {
        "top": record,
        "signed": record["signed"],
        "role": role_of(record, "root"),
        "signature": (record["signatures"] or [{}])[0],
    }[where]
    place["x-note"] = draw(VALUES)


def expiry(draw, record):
    times = ["2000-01-01T00:00:00Z", "2026-02-30T00:00:00Z", "2026-01-01", "soon", ""]
    record["signed"]["expires"] = draw(st.sampled_from(times))


def spec(draw, record):
    versions = ["1.0.31", "1.0.0", "1.9", "1", "2.0.0", "0.9.0", "1.0.x", "1.0.0.0", ""]
    record["signed"]["spec_version"] = draw(st.sampled_from(versions))


def kind_of_file(draw, record):
    record["signed"]["_type"] = draw(st.sampled_from(["root", "targets", "Root", ""]))


def snapshots(draw, record):
    record["signed"]["consistent_snapshot"] = draw(st.booleans())


def drop(draw, record):
    """Without some field, wherever it stands."""
    paths = [path for path in places(record) if path and isinstance(path[-1], str)]
    path = draw(st.sampled_from(paths or [None]))
    assume(path)
    del at(record, path[:-1])[path[-1]]


def anything(draw, record):
    """Any JSON in any place."""
    path = draw(st.sampled_from([path for path in places(record) if path] or [None]))
    assume(path)
    at(record, path[:-1])[path[-1]] = draw(VALUES | st.floats())


SAME = [
    *(number, threshold, add_to_role, take_from_role, drop_key, other_kind_of_key),
    *(drop_signature, double_signature, bend_signature, swap_signatures, note),
    *(expiry, spec, kind_of_file, snapshots),
]
WILD = [drop, anything]


def never_met(data):
    """A role that nobody could meet: TUF's client finds out with the first release."""
    signed = json.loads(data)["signed"]
    role = signed["roles"]["targets"]
    usable = [
        name
        for name in role["keyids"]
        if signed["keys"].get(name, {}).get("keytype") == "ed25519"
        and signed["keys"][name]["scheme"] == "ed25519"
    ]
    return len(usable) < role["threshold"]


@settings(max_examples=300)
@given(mutated())
def test_a_changed_list_gets_the_verdict_of_python_tuf(data):
    verdict = tuf_accepts(BASE, data)
    if verdict and never_met(data):
        verdict = False  # the one place where these changes find us stricter
    assert we_accept(BASE, data) == verdict


@settings(max_examples=300)
@given(mutated(wildly=True))
def test_nothing_is_accepted_here_that_python_tuf_refuses(data):
    if we_accept(BASE, data):
        assert tuf_accepts(BASE, data)


def test_the_changes_reach_both_verdicts():
    """Else the two properties above would say nothing."""
    assert tuf_accepts(BASE, NEXT)
    assert we_accept(BASE, NEXT)
    record = copy.deepcopy(json.loads(NEXT))
    record["signed"]["x-note"] = [1, {"a": None}]
    for names, verdict in ((("ann", "bob", "cat"), True), (("ann", "cat"), False)):
        data = fleet.resigned(record, *names)
        assert we_accept(BASE, data) is tuf_accepts(BASE, data) is verdict
