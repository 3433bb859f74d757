# SPDX-License-Identifier: Apache-2.0
"""Proofs: what a device holds and runs, in answer to a server's nonce, signed.

A proof is one JSON object in canonical form: keys sorted, no spaces, ASCII, no floats.
The signature is over that form without its ``signature`` member. What a proof shows,
and what not, is in ``docs/proof.md``.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_runtime.errors import KeyFileError, StoreError
from edge_runtime.formats.signing import framed, key_id
from edge_runtime.live.entries import measure, read_entries, undeclared_processes
from edge_runtime.live.shared import canonical, public_key
from edge_runtime.reading import read_key_file
from edge_runtime.store.contents import KEY_NAME
from edge_runtime.store.store import Store
from edge_runtime.times import utc

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

SCHEMA = 1
CONTEXT = b"dpu device proof"  # a proof's signature is worth nothing on a patch
_TRIES = 3


def make_proof(store: Store, nonce: str, *, tensors: bool = False) -> bytes:
    """Say what is on this disk and what the live predictors answer with.

    Args:
        store: The store.
        nonce: What the server asked with; it makes an old proof worthless.
        tensors: Also give the SHA-256 of each tensor, so that the server can name the
            ones that differ.

    Returns:
        The proof, signed with the store's key (:func:`device_key`) if it has one.

    Raises:
        StoreError: Nothing is installed, or updates come faster than they are read.
        KeyFileError: The key file does not hold a key.
        OSError: The key file cannot be read.
    """
    key = read_key(store.root / KEY_NAME)
    proof = _facts(store, tensors=tensors) | {"nonce": nonce}
    if key is not None:
        value = key.sign(framed(CONTEXT, canonical(proof))).hex()
        proof["signature"] = {"key_id": key_id(public_key(key)), "value": value}
    return canonical(proof)


def _facts(store: Store, *, tensors: bool) -> dict[str, Any]:
    for _ in range(_TRIES):
        stamp, state = store.stamp(), store.reload()
        folder = store.slot_folder(state.active)
        live = [_live(store, entry) for entry in read_entries(store)]
        facts = state.summary() | {
            "schema": SCHEMA,
            "time": utc(),
            "disk": measure(folder, store.layout if tensors else None),
            "live": live,
            "untold": undeclared_processes(store, {entry["pid"] for entry in live}),
        }
        if store.stamp() == stamp:
            return facts
    raise StoreError("the store changes while it is read; ask for the proof again")


def _live(store: Store, entry: dict[str, Any]) -> dict[str, Any]:
    """Add whether the file that a session was made from is still as it was."""
    now = measure(store.root / "slots" / entry.get("slot", ""))
    same = now is not None and now["inode"] == entry.get("inode")
    return entry | {"file_now": now["fingerprint"] if now and same else ""}


# The device's own key -----------------------------------------------------------------


def device_key(store: Store) -> "Ed25519PrivateKey":
    """Return the store's key; it is made where there is none.

    Raises:
        StoreError: Another process is writing.
        KeyFileError: The key file does not hold a key.
        OSError: The disk is full or refuses.
    """
    path = store.root / KEY_NAME
    if (key := read_key(path)) is None:
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

        with store.lock():
            if (key := read_key(path)) is None:  # nobody else was quicker
                key = Ed25519PrivateKey.generate()
                text = key.private_bytes_raw().hex() + "\n"
                store.files.replace(path, text.encode(), mode=0o600, suffix=".part")
    return key


def read_key(path: Path) -> "Ed25519PrivateKey | None":
    """Read a device's private key: 32 raw bytes, in hex; None if there is no file.

    Raises:
        OSError: The file cannot be read.
        KeyFileError: It holds something else, or is a link to nothing.
    """
    if path.is_symlink() and not path.exists():
        raise KeyFileError(
            f"{path} links to {path.readlink()}, which is not there; mount or restore "
            "it, or remove the link for another key"
        )
    if not path.exists():
        return None
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    try:
        return Ed25519PrivateKey.from_private_bytes(_key_bytes(path))
    except ValueError as err:
        raise KeyFileError(
            f"{path} does not hold a device's private key ({err}); remove it, and "
            "'dpu-edge device-key' makes one"
        ) from err


def _key_bytes(path: Path) -> bytes:
    data = read_key_file(path)
    return bytes.fromhex(data.decode("ascii"))


def encode_public(key: "Ed25519PrivateKey | EllipticCurvePrivateKey") -> bytes:
    """Encode the public half of a key as PEM (SubjectPublicKeyInfo)."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    form = PublicFormat.SubjectPublicKeyInfo
    return key.public_key().public_bytes(Encoding.PEM, form)
