# SPDX-License-Identifier: Apache-2.0
"""Owners, fleet keys, their key lists, and devices that hold one."""

import json
from datetime import UTC, datetime
from functools import cache

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from edge_runtime import Device
from edge_runtime.formats.signing import Trust
from edge_runtime.live.shared import public_key
from edge_runtime.trust import first_root
from edge_runtime.trust.canonical import encode_canonical
from packager.key_lists import change_list, make_list, sign_list
from packager.signing import date_patch, sign_bundle, sign_patch
from tests.crash import world

MADE, UNTIL = "2026-01-01T00:00:00Z", "2100-01-01T00:00:00Z"
TIMES = MADE, UNTIL


@cache
def key(name):
    seed = name.encode().ljust(32, b"\0")
    return Ed25519PrivateKey.from_private_bytes(seed)


def public(*names):
    return [public_key(key(name)) for name in names]


def keys(*names):
    return [key(name) for name in names]


def signed(data, *names):
    return sign_list(data, keys(*names))


def list_1(owners=("ann", "bob"), releases=("fleet",), threshold=2, times=TIMES):
    """List 1: two owners, both sign; one fleet key."""
    data = make_list(public(*owners), public(*releases), times, {"root": threshold})
    return signed(data, *owners[:threshold])


def list_2(first=None, signers=("ann", "bob"), times=TIMES, **changes):
    """List 2: the fleet's key is exchanged for another one, unless told otherwise."""
    swap = {"add": {"targets": public("new")}, "remove": {"targets": public("fleet")}}
    data = change_list(first or list_1(), times, **(changes or swap))
    return signed(data, *signers)


def edited(data, edit, *signers):
    """A list changed by hand into what the tools would not write, and signed."""
    record = json.loads(data)
    edit(record["signed"])
    return resigned(record, *signers)


def resigned(record, *signers):
    """Sign whatever is there, asking nobody whether it is a list."""
    from edge_runtime.trust import tuf_key_id

    message = encode_canonical(record["signed"])
    record["signatures"] = [
        {
            "keyid": tuf_key_id(public_key(key(name))),
            "sig": key(name).sign(message).hex(),
        }
        for name in signers
    ]
    return json.dumps(record).encode()


def release(parent, number, *names, counter=None):
    """A patch from one round of the small world to another, signed."""
    return sign_patch_with(world.patch(parent, number, counter), *names)


def dated(parent, number, when, *names):
    """As a release, saying when it was signed."""
    at = datetime.strptime(when, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
    data = date_patch(world.patch(parent, number), int(at.timestamp()))
    return sign_patch_with(data, *names)


def sign_patch_with(data, *names):
    for name in names:
        data = sign_patch(data, key(name))
    return data


def bundle(*names):
    data = world.bundle()
    for name in names:
        data = sign_bundle(data, key(name))
    return data


def device(path, first=None, files=None):
    """A device that was installed with a key list."""
    root = first_root(first or list_1())
    return Device.install(
        path / "store", bundle("fleet"), trust=root, files=files, trial=world.no_trial
    )


def pem_device(path, *names, threshold=1):
    """A device that was installed with single keys, as before there were lists."""
    trust = Trust(tuple(public(*names)), threshold)
    data = bundle(*names)
    return Device.install(path / "store", data, trust=trust, trial=world.no_trial)


def again(device):
    """The same device after a restart."""
    return Device.open(device.store.root, trial=world.no_trial)
