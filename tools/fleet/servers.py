# SPDX-License-Identifier: Apache-2.0
"""Servers on loopback for measurements, and what counts every byte that crosses."""

import hashlib
import ipaddress
import json
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tools.parts import find

LOOPBACK = "127.0.0.1"
ID, SECRET = "an-id-of-mine", "a-secret-of-mine"  # of the S3 server
GRPC = 10_000  # so much above each port SeaweedFS opens another one
_NGINX = """
daemon off; worker_processes 1; pid {folder}/nginx.pid; error_log {folder}/error.log;
events {{ worker_connections 4096; }}
http {{
    access_log off; etag on; default_type application/octet-stream;
    client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi; uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi; keepalive_requests 1000000;
    server {{
        listen {address}:{port}{tls};
        root {root};
        location ~ [.]head$ {{ add_header Cache-Control max-age=60; }}
    }}
}}
"""


class Relay:
    """Hands connections on to a port, and counts their bytes, TLS and all.

    Attributes:
        port: Where it listens.
        count: Bytes of both directions.
    """

    def __init__(self, to: int) -> None:
        """Begin to listen."""
        self._to, self.count = to, 0
        self._lock = threading.Lock()
        self._listening = socket.create_server((LOOPBACK, 0))
        self.port: int = self._listening.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Listen no more."""
        with suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)  # else accept() goes on
        self._listening.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listening.accept()
                work = threading.Thread(target=self._join, args=(client,), daemon=True)
                work.start()

    def _join(self, client: socket.socket) -> None:
        with client, socket.create_connection((LOOPBACK, self._to)) as server:
            back = threading.Thread(target=self._hand, args=(server, client))
            back.start()
            self._hand(client, server)
            back.join()

    def _hand(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                with self._lock:
                    self.count += len(data)
                sink.sendall(data)
        with suppress(OSError):
            sink.shutdown(socket.SHUT_WR)


class FileServer(ThreadingHTTPServer):
    """A web server with tags and ranges, whose headers are about those of nginx.

    Attributes:
        cut: Bytes of a body after which the connection ends; None for never.
        bodies: Bytes of bodies that were sent, by path.
    """

    daemon_threads = True

    def __init__(self, root: Path, certificate: Path | None = None) -> None:
        """Serve a folder, with TLS where there is a certificate."""
        super().__init__((LOOPBACK, 0), _Handler)
        self.root, self.cut = root, None  # type: tuple[Path, int | None]
        self.bodies: dict[str, int] = {}
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            self.socket = context.wrap_socket(self.socket, server_side=True)
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        """Serve no more."""
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "files/1.0", ""
    server: FileServer

    def do_GET(self) -> None:
        path = self.path.lstrip("/")
        file = self.server.root / path
        if not file.is_file():
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        data, asked = file.read_bytes(), self.headers
        tag = f'"{hashlib.sha256(data).hexdigest()[:16]}"'
        status, start = 200, 0
        if asked.get("If-None-Match") == tag:
            status, data = 304, b""
        elif asked.get("Range") and asked.get("If-Range", tag) == tag:
            status = 206
            start = int(asked["Range"].removeprefix("bytes=").rstrip("-"))
        self.send_response(status)
        self.send_header("Last-Modified", formatdate(file.stat().st_mtime, usegmt=True))
        self.send_header("ETag", tag)
        if status != 304:
            self.send_header("Content-Type", "application/octet-stream")
            self.send_header("Content-Length", str(len(data) - start))
            self.send_header("Accept-Ranges", "bytes")
        if status == 206:
            span = f"bytes {start}-{len(data) - 1}/{len(data)}"
            self.send_header("Content-Range", span)
        self.end_headers()
        self._send(path, data[start:])

    def _send(self, path: str, body: bytes) -> None:
        cut = self.server.cut
        if cut is not None and len(body) > cut:
            body, self.close_connection = body[:cut], True
        self.wfile.write(body)
        self.server.bodies[path] = self.server.bodies.get(path, 0) + len(body)

    def log_message(self, *_: Any) -> None:
        pass


def make_certificate(folder: Path) -> Path:
    """Write a small certificate for loopback, and its key, into one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "loopback")])
    now, address = datetime.now(UTC), ipaddress.ip_address(LOOPBACK)
    made = (
        x509.CertificateBuilder(name, name, key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=2))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(address)]), False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        .sign(key, hashes.SHA256())
    )
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    path = folder / "loopback.pem"
    path.write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain)
        + made.public_bytes(pem)
    )
    return path


@contextmanager
def running_nginx(root: Path, folder: Path) -> Iterator[int]:
    """Start nginx on a folder of files, and yield its port."""
    (port,) = free_ports(1)
    words = {"folder": folder, "address": LOOPBACK, "port": port, "tls": ""}
    config = folder / "nginx.conf"
    config.write_text(_NGINX.format(root=root, **words))
    command = [str(find("nginx")), "-p", str(folder), "-c", str(config)]
    command += ["-e", f"{folder}/error.log"]
    # It ends its worker, which would outlive it otherwise.
    with _running(command, folder, 10) as process:
        _wait(port, process)
        yield port


@contextmanager
def running_store(folder: Path) -> Iterator[int]:
    """Start SeaweedFS, an S3 server, below a folder, and yield its port."""
    master, volume, filer, s3 = free_ports(4)
    identity = {
        "name": "publisher",
        "credentials": [{"accessKey": ID, "secretKey": SECRET}],
        "actions": ["Admin", "Read", "Write", "List"],
    }
    # Devices know no secrets: they only read.
    anybody = {"name": "anonymous", "actions": ["Read"]}
    identities = {"identities": [identity, anybody]}
    (folder / "s3.json").write_text(json.dumps(identities))
    words = [str(find("weed")), "-logtostderr=true", "server", f"-dir={folder}"]
    words += [f"-ip={LOOPBACK}", f"-ip.bind={LOOPBACK}", "-filer", "-s3"]
    words += [f"-master.port={master}", f"-volume.port={volume}"]
    words += [f"-filer.port={filer}", f"-s3.port={s3}", f"-s3.config={folder}/s3.json"]
    # Two more ports, which two servers on one machine would share.
    words += ["-s3.port.iceberg=0", "-s3.port.lance=0"]
    # With fewer volumes it answers 500 soon.
    words += ["-volume.max=60", "-master.volumeSizeLimitMB=64"]
    with _running(words, folder) as process:  # asked to end, it takes half a minute
        _wait(s3, process, "/healthz")
        _make_bucket(s3)
        yield s3


@contextmanager
def _running(
    command: list[str], folder: Path, patience_s: float = 0
) -> Iterator["subprocess.Popen[bytes]"]:
    """Run a server; asked to end, it has so long to do so."""
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        yield process
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(patience_s)
        process.kill()
        process.wait()


def _wait(port: int, process: "subprocess.Popen[bytes]", path: str = "") -> None:
    """Wait until a server answers."""
    for _ in range(600):
        if process.poll() is not None:
            raise RuntimeError("the server ended; see its log")
        try:
            if path:
                urlopen(f"http://{LOOPBACK}:{port}{path}", timeout=2).close()
            else:
                socket.create_connection((LOOPBACK, port), timeout=2).close()
            return
        except OSError:
            time.sleep(0.1)
    raise RuntimeError("the server does not answer")


def _make_bucket(port: int) -> None:
    """Make the bucket ``fleet``: an owner's first object does that here."""
    from obstore import put
    from obstore.store import S3Store

    store = S3Store(
        "fleet",
        config={
            "endpoint": f"http://{LOOPBACK}:{port}",
            "access_key_id": ID,
            "secret_access_key": SECRET,
        },
        client_options={"allow_http": True},
    )
    put(store, "ready", b"")


def free_ports(count: int) -> list[int]:
    """Return ports that are free, as those are that belong to them."""
    found, base = list[int](), 20_000
    while len(found) < count:
        base += 1
        if all(map(_is_free, (base, base + GRPC))):
            found.append(base)
    return found


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((LOOPBACK, port)) != 0
