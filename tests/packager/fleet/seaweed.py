# SPDX-License-Identifier: Apache-2.0
"""SeaweedFS on loopback, and a proxy before it that kills whoever writes too much."""

import http.client
import json
import socket
import subprocess
import threading
import time
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.request import urlopen

from obstore import put
from obstore.store import S3Store

from tools.parts import find

ID, SECRET = "an-id-of-mine", "a-secret-of-mine"
GRPC = 10_000  # so much above each port it opens another one


@contextmanager
def running_store(folder):
    """Start an S3 server below a folder, and yield its port."""
    master, volume, filer, s3 = free_ports(4)
    identity = {
        "name": "publisher",
        "credentials": [{"accessKey": ID, "secretKey": SECRET}],
        "actions": ["Admin", "Read", "Write", "List"],
    }
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    words = [str(find("weed")), "-logtostderr=true", "server", f"-dir={folder}"]
    words += ["-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-filer", "-s3"]
    words += [f"-master.port={master}", f"-volume.port={volume}"]
    words += [f"-filer.port={filer}", f"-s3.port={s3}", f"-s3.config={folder}/s3.json"]
    # With fewer volumes it answers 500 soon.
    words += ["-volume.max=60", "-master.volumeSizeLimitMB=64"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(words, stdout=log, stderr=log)
    try:
        wait_for(s3, process)
        make_bucket(s3)
        yield s3
    finally:
        process.kill()  # asked to end, it takes half a minute
        process.wait()


def wait_for(port, process):
    """Wait until the server answers."""
    for _ in range(600):
        assert process.poll() is None, "the server ended"
        try:
            with urlopen(f"http://127.0.0.1:{port}/healthz", timeout=2):
                return
        except OSError:
            time.sleep(0.1)
    raise AssertionError("the server does not answer")


def make_bucket(port):
    """Make the bucket ``fleet``: an owner's first object does that here."""
    store = S3Store(
        "fleet",
        config={
            "endpoint": f"http://127.0.0.1:{port}",
            "access_key_id": ID,
            "secret_access_key": SECRET,
        },
        client_options={"allow_http": True},
    )
    put(store, "ready", b"")


def free_ports(count):
    """Return ports that are free, as those are that belong to them."""
    found, base = [], 20_000
    while len(found) < count:
        base += 1
        if all(is_free(port) for port in (base, base + GRPC)):
            found.append(base)
    return found


def is_free(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


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
