# SPDX-License-Identifier: Apache-2.0
"""Connections that count every byte, and bound what comes before a body.

A body is bounded by whoever reads it, who knows its size. Before it stand headers:
``http.client`` takes 6 MB of them, and interim answers (status 100) without an end.
"""

import io
import socket
from http.client import HTTPException, HTTPResponse
from typing import Any

# A new connection with TLS: certificates of the usual size, both directions.
HANDSHAKE_BYTES = 2000
HEADER_BYTES = 24 << 10  # what was read ahead of the body is among them


class Meter:
    """Counts what goes over the wire.

    Attributes:
        spent: Bytes so far, in both directions, above TCP and TLS; and a usual
            handshake for each connection with TLS.
        received: Those of them that came.
        socket: Of the answer that is waited for; None while none is.
    """

    def __init__(self) -> None:
        """Begin with none."""
        self.spent = self.received = 0
        self.socket: socket.socket | None = None


class _Raw(io.RawIOBase):
    """What comes from a socket, counted; bounded until the headers are there."""

    def __init__(self, raw: io.RawIOBase, meter: Meter) -> None:
        self._raw, self._meter, self._left = raw, meter, HEADER_BYTES
        self.bounded = True

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        if self.bounded and self._left <= 0:
            raise HTTPException(f"more than {HEADER_BYTES} bytes before a body")
        count = self._raw.readinto(buffer)
        if self.bounded and count == 0:  # http.client takes those before it for all
            raise HTTPException("it ended within the headers")
        self._left -= count or 0
        self._meter.spent += count or 0
        self._meter.received += count or 0
        return count

    def close(self) -> None:
        self._raw.close()
        super().close()


def metered_pools(meter: Meter) -> dict[str, Any]:
    """Return urllib3's pools of connections by scheme, with a meter in each."""
    from urllib3.connection import HTTPConnection, HTTPSConnection
    from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

    class Answer(HTTPResponse):
        def __init__(self, sock: Any, *args: Any, **options: Any) -> None:
            meter.socket = sock
            super().__init__(sock, *args, **options)
            self._raw = _Raw(self.fp.detach(), meter)
            self.fp = io.BufferedReader(self._raw)

        def begin(self) -> None:
            super().begin()
            self._raw.bounded = False

    class Plain(HTTPConnection):
        response_class = Answer

        def send(self, data: Any) -> None:
            super().send(data)
            meter.spent += len(data)

    class Secure(HTTPSConnection):
        response_class = Answer

        def send(self, data: Any) -> None:
            super().send(data)
            meter.spent += len(data)

        def _new_conn(self) -> Any:
            found = super()._new_conn()
            meter.spent += HANDSHAKE_BYTES
            return found

    class PlainPool(HTTPConnectionPool):
        ConnectionCls = Plain

    class SecurePool(HTTPSConnectionPool):
        ConnectionCls = Secure

    return {"http": PlainPool, "https": SecurePool}
