# SPDX-License-Identifier: Apache-2.0
"""A proxy before SeaweedFS that kills whoever writes too much."""

import http.client
import threading
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class KillingProxy(ThreadingHTTPServer):
    """Hands requests on, and kills a process at one of those that change something.

    Attributes:
        victim: The process.
        at: Which request it is, from 0 on.
        answered: Whether the store has carried it out by then.
        count: How many there were.
    """

    daemon_threads = True

    def __init__(self, port):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.port, self.victim, self.at, self.answered = port, None, 0, False
        self.count, self.ready = 0, threading.Event()
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: KillingProxy

    def _hand_on(self):
        server, ours = self.server, False
        if self.command in ("PUT", "POST", "DELETE"):
            ours, server.count = server.count == server.at, server.count + 1
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if ours and not server.answered:
            self._kill()
            return
        connection = http.client.HTTPConnection("127.0.0.1", server.port)
        with closing(connection):
            connection.request(self.command, self.path, body, dict(self.headers))
            answer = connection.getresponse()
            data = answer.read()
        if ours:
            self._kill()
            return
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("transfer-encoding", "content-length", "date"):
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _hand_on  # noqa: N815

    def _kill(self):
        self.server.ready.wait(60)
        self.server.victim.kill()
        self.close_connection = True

    def log_message(self, *_):
        pass
