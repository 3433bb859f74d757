# SPDX-License-Identifier: Apache-2.0
"""A web server on loopback that knows ranges and tags, and can be told to misbehave."""

import hashlib
import ssl
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class FileServer(ThreadingHTTPServer):
    """Serves a folder, and counts what goes over the wire above TCP.

    Attributes:
        bytes: Sent and received, headers too.
        bodies: Bytes of bodies, by path.
        cut: Bytes of a patch or bundle after which the connection ends; None for never.
        pause_s: Seconds between two pieces of a body,
        slow: of the files whose paths begin so.
        replace: Other content by path.
        endless: Whether bodies without a length never end.
        tagged: Whether there are tags.
        drip_s: Seconds between two bytes of the headers.
        status: What every answer says instead; by path in ``statuses``.
        onward: Where every request is sent on to.
        kept: Whether connections are kept.
        connections: How many there were.
        weak: Whether they are weak, as behind a server that compresses.
        lies: Whether what it sends as a part is the beginning.
    """

    daemon_threads = True

    def __init__(self, root: Path, certificate: Path | None = None) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.scheme = "http"
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            self.socket = context.wrap_socket(self.socket, server_side=True)
            self.scheme = "https"
        self.root, self.bytes, self.bodies = root, 0, dict[str, int]()
        self.cut, self.pause_s, self.endless, self.tagged = None, 0.0, False, True
        self.weak = self.lies = False
        self.replace: dict[str, bytes] = {}
        self.status, self.statuses = 0, dict[str, int]()
        self.slow = ""
        self.drip_s, self.onward, self.kept, self.connections = 0.0, "", False, 0
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.server_port}"

    def handle_error(self, *_):
        """Clients that hang up are what is tested."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FileServer

    def setup(self):
        super().setup()
        self.server.connections += 1

    def do_GET(self):
        server = self.server
        server.bytes += len(self.raw_requestline) + len(bytes(self.headers)) + 2
        path = self.path.lstrip("/")
        data = server.replace.get(path)
        file = server.root / path
        if data is None and file.is_file():
            data = file.read_bytes()
        if server.onward:
            self.answer(302, b"", {"Location": f"{server.onward}/{path}"})
            return
        if (status := server.statuses.get(path, server.status)) or data is None:
            self.answer(status or 404, b"", {})
            return
        tag = "W/" * server.weak + f'"{hashlib.sha256(data).hexdigest()[:16]}"'
        headers = {"ETag": tag} if server.tagged else {}
        if self.headers.get("If-None-Match") == tag:
            self.answer(304, b"", headers)
            return
        asked, start = self.headers.get("Range"), 0
        condition = self.headers.get("If-Range")
        if asked and (condition is None or (condition == tag and not server.weak)):
            start = int(asked.removeprefix("bytes=").rstrip("-"))
            if start >= len(data):
                self.answer(416, b"", headers)
                return
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        body = data[: len(data) - start] if server.lies else data[start:]
        self.answer(206 if start else 200, body, headers)

    def answer(self, status, body, headers):
        server = self.server
        if not server.kept:
            headers |= {"Connection": "close"}
        if not server.endless:
            headers["Content-Length"] = str(len(body))
        lines = [f"HTTP/1.1 {status} X", *(f"{k}: {v}" for k, v in headers.items())]
        head = "\r\n".join(lines).encode() + b"\r\n\r\n"
        for piece in [head[n : n + 1] for n in range(len(head) * (server.drip_s > 0))]:
            time.sleep(server.drip_s)
            if not self.send(piece):
                return
        if not server.drip_s:
            self.send(head)
        path, sent = self.path.lstrip("/"), 0
        is_release = path.startswith(("patches/", "bundles/"))
        cut = server.cut if is_release else None
        most = len(body) if cut is None else cut
        pause = server.pause_s if path.startswith(server.slow) else 0
        step = 16 if pause else 1 << 14
        while server.endless or sent < min(most, len(body)):
            piece = body[sent : min(sent + step, most)] or b"x" * step
            time.sleep(pause)
            if not self.send(piece):
                break
            sent += len(piece)
            server.bodies[path] = server.bodies.get(path, 0) + len(piece)
        self.close_connection = not server.kept or sent < len(body)

    def send(self, data):
        try:
            self.wfile.write(data)
            self.wfile.flush()
        except OSError:
            return False
        self.server.bytes += len(data)
        return True

    def log_message(self, *_):
        pass
