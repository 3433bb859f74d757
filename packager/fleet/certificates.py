# SPDX-License-Identifier: Apache-2.0
"""Client certificates of devices, by a small authority of the operator's own.

They open one door, the drop box for reports of a web server: whose certificate names a
device may write that device's reports. They prove nothing about weights; that is the
part of the device's key, which the network side never reads.
"""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from edge_runtime.errors import KeyFileError
from packager.keys import encode_private

# A device that hangs on a wall for ten years must not fall silent before.
LIFETIME, AHEAD = timedelta(days=3650), timedelta(days=1)


@dataclass(frozen=True, slots=True)
class Authority:
    """Who says which certificate is whose device's.

    Attributes:
        certificate: What the web server trusts.
        key: What signs; it stays with the operator.
    """

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @property
    def public_pem(self) -> bytes:
        """The certificate, as nginx takes it (``ssl_client_certificate``)."""
        return self.certificate.public_bytes(Encoding.PEM)

    @property
    def private_pem(self) -> bytes:
        """The private key."""
        return encode_private(self.key)


def make_authority(name: str) -> Authority:
    """Make an authority, which signs devices' certificates and no other authority's.

    Args:
        name: Whose it is; cut to the 64 bytes that a certificate takes.
    """
    name = name.encode(errors="replace")[:64].decode(errors="ignore")
    key = ec.generate_private_key(ec.SECP256R1())
    subject = _named(name)
    limits = x509.BasicConstraints(ca=True, path_length=0)
    signs = _usage(signs_others=True)
    begun = _begun(subject, subject, key, LIFETIME * 2)
    signed = begun.add_extension(limits, critical=True).add_extension(signs, True)
    return Authority(signed.sign(key, hashes.SHA256()), key)


def read_authority(certificate: bytes, key: bytes, name: str) -> Authority:
    """Read an authority from its two PEM files.

    Raises:
        KeyFileError: They are none, or not of one authority.
    """
    try:
        found = x509.load_pem_x509_certificate(certificate)
        private = load_pem_private_key(key, None)
    except (ValueError, TypeError) as err:
        raise KeyFileError(
            f"{name}: expected ca.pem and ca.key as written, found {err}"
        ) from err
    if not isinstance(private, ec.EllipticCurvePrivateKey) or (
        private.public_key() != found.public_key()
    ):
        raise KeyFileError(f"{name}: ca.key is not the key of ca.pem")
    return Authority(found, private)


def make_client(authority: Authority, device: str) -> bytes:
    """Return a new certificate for a device and its private key, one PEM file."""
    key = ec.generate_private_key(ec.SECP256R1())
    whose = authority.certificate.subject
    begun = _begun(_named(device), whose, key, LIFETIME)
    client = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH])
    certificate = (
        begun.add_extension(x509.BasicConstraints(ca=False, path_length=None), True)
        .add_extension(_usage(signs_others=False), critical=True)
        .add_extension(client, critical=False)
        .sign(authority.key, hashes.SHA256())
    )
    return certificate.public_bytes(Encoding.PEM) + encode_private(key)


def _named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _begun(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    lifetime: timedelta,
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - AHEAD)  # boards without a clock wake up in the past
        .not_valid_after(now + lifetime)
    )


def _usage(*, signs_others: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_others,
        key_cert_sign=signs_others,
        crl_sign=signs_others,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
