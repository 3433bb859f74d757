# SPDX-License-Identifier: Apache-2.0
"""nginx with the configuration of the example, on free ports, and a proxy that cuts."""

import os
import socket
import struct
import subprocess
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

from tools.parts import find

CONFIGURATION = Path(__file__).parents[3] / "examples" / "fleet" / "nginx.conf"
PORTS = ("8443", "8444")
RESET = struct.pack("ii", 1, 0)  # SO_LINGER: what was not read is thrown away


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@contextmanager
def running_nginx(folder, changes=()):
    """Start nginx in a folder that has www, certificates and cards.

    Args:
        folder: Where.
        changes: Texts of the configuration, and what they become.

    Yields:
        The ports that stand for 8443 and 8444.
    """
    ports = {port: str(free_port()) for port in PORTS}
    text = CONFIGURATION.read_text()
    for old, new in (dict(changes) | ports).items():
        assert old in text, old
        text = text.replace(old, new)
    (folder / "nginx.conf").write_text(text)
    (folder / "run").mkdir()
    # Only root is asked for whom the workers run; everybody else is themselves.
    own = ["user root;"] if os.geteuid() == 0 else []
    words = ["-g", " ".join(["daemon off;", *own]), "-p", folder, "-c", "nginx.conf"]
    process = subprocess.Popen([find("nginx"), *words], stderr=subprocess.PIPE)
    try:
        for port in ports.values():
            _wait(int(port), process)
        yield tuple(map(int, ports.values()))
    finally:
        process.terminate()
        process.wait()
        process.stderr.close()


def _wait(port, process):
    for _ in range(100):
        assert process.poll() is None, process.stderr.read().decode()
        with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            return
        time.sleep(0.05)
    raise AssertionError("nginx does not answer")


class CuttingProxy:
    """Passes bytes on to a port, and ends each answer after so many.

    Attributes:
        after: Bytes of each connection's answer that are passed on; None for all.
        reset: Whether it ends so that the client loses what it has not read yet.
        cuts: Connections that it ended.
        answers: What was passed on, for each connection.
        url: Its address, without a scheme.
    """

    def __init__(self, port):
        self.port, self.after, self.reset = port, None, False
        self.cuts, self.answers = 0, []
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.url = f"127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self):
        with suppress(OSError):
            while True:
                client, _ = self.listener.accept()
                threading.Thread(target=self._pass, args=[client], daemon=True).start()

    def _pass(self, client):
        with client, socket.create_connection(("127.0.0.1", self.port)) as server:
            asking = threading.Thread(target=self._ask, args=[client, server])
            asking.start()
            left, answer = self.after, bytearray()
            self.answers.append(answer)
            with suppress(OSError):
                while data := server.recv(1 << 16 if left is None else max(left, 1)):
                    data = data if left is None else data[:left]
                    client.sendall(data)
                    answer += data
                    left = None if left is None else left - len(data)
                    if left == 0:
                        self.cuts += 1
                        break
            if self.reset:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            # Whoever still reads from them is woken, or closing them would end nothing.
            with suppress(OSError):
                client.shutdown(socket.SHUT_RD if self.reset else socket.SHUT_RDWR)
            with suppress(OSError):
                server.shutdown(socket.SHUT_RDWR)
            asking.join()

    def _ask(self, client, server):
        with suppress(OSError):
            while data := client.recv(1 << 16):
                server.sendall(data)
        with suppress(OSError):
            server.shutdown(socket.SHUT_WR)


@contextmanager
def cutting(port):
    """Yield a proxy before a port."""
    proxy = CuttingProxy(port)
    try:
        yield proxy
    finally:
        proxy.listener.close()
