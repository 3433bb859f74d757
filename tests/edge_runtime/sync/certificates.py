# SPDX-License-Identifier: Apache-2.0
"""An authority of one's own, and certificates of servers and devices by it."""

import datetime
import ipaddress

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID


class Authority:
    """Writes ``ca.pem``, and a certificate with its key for each name asked for."""

    def __init__(self, folder):
        self.folder, self.key = folder, ec.generate_private_key(ec.SECP256R1())
        folder.mkdir(exist_ok=True)
        self.name = _name("an authority of one's own")
        constraint = x509.BasicConstraints(ca=True, path_length=0)
        self._write("ca", self.name, self.key, constraint)
        self.ca = folder / "ca.pem"

    def certify(self, name):
        """Return the file with the certificate and the key of a device or server."""
        key = ec.generate_private_key(ec.SECP256R1())
        none = x509.BasicConstraints(ca=False, path_length=None)
        return self._write(name, _name(name), key, none)

    def _write(self, name, subject, key, constraint):
        now = datetime.datetime.now(datetime.UTC)
        addresses = [ipaddress.ip_address("127.0.0.1")]
        certificate = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self.name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=30))
            .add_extension(constraint, critical=True)
            .add_extension(
                x509.SubjectAlternativeName(map(x509.IPAddress, addresses)),
                critical=False,
            )
            .sign(self.key, hashes.SHA256())
        )
        path = self.folder / f"{name}.pem"
        pem = serialization.Encoding.PEM
        path.write_bytes(
            certificate.public_bytes(pem)
            + key.private_bytes(
                pem,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        return path


def _name(text):
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])
