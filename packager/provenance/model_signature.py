# SPDX-License-Identifier: Apache-2.0
"""Signatures of the OpenSSF Model Signing tool, by its own library (``model-signing``).

It signs each file of a folder, or one file, with a key on a NIST curve; Ed25519 is not
among the kinds that it knows. What it writes anybody checks without this project::

    model_signing verify key round_05 --signature round_05.sig --public_key K.pub.pem

ECDSA draws a random number for each signature: its bytes differ from time to time.
"""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from cryptography.exceptions import InvalidSignature

from edge_runtime.errors import TrustError
from edge_runtime.files import naming
from packager.keys import passphrase_bytes


def sign_model(path: Path, key: Path, passphrase: str | None) -> bytes:
    """Return the Sigstore bundle that signs a folder or file.

    Args:
        path: What to sign.
        key: The file of the private key.
        passphrase: Of that file, if it is encrypted.

    Raises:
        ModuleNotFoundError: The extra ``provenance`` is not installed.
        OSError: Something cannot be read.
        TrustError: The folder holds what the tool does not sign, a link for example.
    """
    from model_signing.signing import Config

    # The library hands it to cryptography as it is, which wants bytes.
    secret = passphrase_bytes(passphrase) if passphrase else None
    config = Config().use_elliptic_key_signer(private_key=key, password=secret)
    with TemporaryDirectory() as folder, naming(folder):
        place = Path(folder, "model.sig")
        try:
            config.sign(path, place)
        except ValueError as err:
            raise TrustError(f"{path} cannot be signed ({err})") from err
        return place.read_bytes()


def verify_model(path: Path, signature: Path, keys: Sequence[Path]) -> tuple[Path, str]:
    """Check a signature as the tool does, with any of some keys.

    Args:
        path: The folder or file that it is for.
        signature: The file with the signature.
        keys: Files of public keys.

    Returns:
        The key that made it, and what differs from the content that it was made for;
        nothing if all is as it was.

    Raises:
        ModuleNotFoundError: The extra ``provenance`` is not installed.
        OSError: Something cannot be read.
        TrustError: None of the keys made it, or it is malformed.
    """
    from model_signing.verifying import Config

    reasons = []
    for key in keys:
        config = Config().use_elliptic_key_verifier(public_key=key)
        try:
            config.verify(path, signature)
        except InvalidSignature:
            reasons.append(f"{key}: the signature is wrong")
        except (ValueError, LookupError, TypeError, AttributeError) as err:
            # That the key fits and the content does not, the library says in words.
            if str(err).startswith("Signature mismatch"):
                return key, str(err)
            reasons.append(f"{key}: {err}")
        else:
            return key, ""
    raise TrustError("\n  - ".join([f"{signature} is not trusted:", *reasons]))
