# SPDX-License-Identifier: Apache-2.0
"""An S3-like server on loopback, in memory, that can be told to ignore conditions."""

import hashlib
import re
import threading
import time
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape


class S3Server(ThreadingHTTPServer):
    """Knows one bucket, ``fleet``, and any credentials.

    Attributes:
        objects: Content and time of change, by key.
        conditions: What becomes of If-Match and If-None-Match: ``heeded``, ``ignored``
            or ``refused``.
        lost: How many answers to writes are lost: an error is sent instead.
        log: Methods and keys of the requests.
        before: Called with method and key before a request is answered.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.objects: dict[str, tuple[bytes, float]] = {}
        self.conditions, self.lost, self.lock = "heeded", 0, threading.Lock()
        self.log: list[tuple[str, str]] = []
        self.before = lambda _method, _key: None
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def url(self) -> str:
        """The address of a model's folder."""
        return f"s3://fleet/digits?endpoint=http://127.0.0.1:{self.server_port}"

    def age(self, seconds: float) -> None:
        """Make everything that is there older."""
        for key, (data, changed) in self.objects.items():
            self.objects[key] = data, changed - seconds


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: S3Server

    def _handle(self):
        parts = urlsplit(self.path)
        query = parse_qs(parts.query, keep_blank_values=True)
        key = unquote(parts.path).removeprefix("/fleet").lstrip("/")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if not parts.path.startswith("/fleet"):
            self._answer(404, b"<Error><Code>NoSuchBucket</Code></Error>")
            return
        if self.command == "POST" and "delete" in query:
            for name in re.findall(r"<Key>(.*?)</Key>", body.decode()):
                self.server.log.append(("DELETE", name))
                self.server.before("DELETE", name)
                self.server.objects.pop(name, None)
            self._answer(200, b"<DeleteResult></DeleteResult>")
            return
        self.server.log.append((self.command, key))
        self.server.before(self.command, key)
        with self.server.lock:
            if self.command == "GET" and "list-type" in query:
                self._answer(200, self._list(query))
            elif self.command == "GET":
                self._get(key)
            elif self.command == "PUT":
                self._put(key, body)
            else:
                self._answer(405, b"")

    do_GET = do_PUT = do_POST = _handle  # noqa: N815

    def _get(self, key):
        found = self.server.objects.get(key)
        if found is None:
            self._answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
            return
        data, changed = found
        self._answer(
            200,
            data,
            {"ETag": tag_of(data), "Last-Modified": formatdate(changed, usegmt=True)},
        )

    def _put(self, key, body):
        server, found = self.server, self.server.objects.get(key)
        asked, absent = self.headers.get("If-Match"), self.headers.get("If-None-Match")
        if (asked or absent) and server.conditions == "refused":
            self._answer(501, b"<Error><Code>NotImplemented</Code></Error>")
            return
        if server.conditions == "heeded":
            wrong = asked and (found is None or tag_of(found[0]) != asked)
            if wrong or (absent and found):
                self._answer(412, b"<Error><Code>PreconditionFailed</Code></Error>")
                return
        server.objects[key] = body, time.time()
        if server.lost:
            server.lost -= 1
            self._answer(503, b"<Error><Code>SlowDown</Code></Error>")
        else:
            self._answer(200, b"", {"ETag": tag_of(body)})

    def _list(self, query):
        prefix = query.get("prefix", [""])[0]
        delimiter = query.get("delimiter", [""])[0]
        found, folders = [], set()
        for key, (data, changed) in sorted(self.server.objects.items()):
            rest = key.removeprefix(prefix)
            if not key.startswith(prefix):
                continue
            if delimiter and delimiter in rest:
                folders.add(prefix + rest.partition(delimiter)[0] + delimiter)
                continue
            day = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(changed))
            found.append(
                f"<Contents><Key>{escape(key)}</Key><LastModified>{day}</LastModified>"
                f"<ETag>{escape(tag_of(data))}</ETag><Size>{len(data)}</Size></Contents>"
            )
        common = "".join(
            f"<CommonPrefixes><Prefix>{escape(name)}</Prefix></CommonPrefixes>"
            for name in sorted(folders)
        )
        text = "".join(found) + common
        return (
            f"<ListBucketResult><Name>fleet</Name><Prefix>{escape(prefix)}</Prefix>"
            f"<KeyCount>{len(found)}</KeyCount><IsTruncated>false</IsTruncated>{text}"
            "</ListBucketResult>"
        ).encode()

    def _answer(self, status, body, headers=None):
        self.send_response(status)
        for name, value in {
            "Content-Length": str(len(body)),
            **(headers or {}),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def tag_of(data):
    return f'"{hashlib.md5(data, usedforsecurity=False).hexdigest()}"'
