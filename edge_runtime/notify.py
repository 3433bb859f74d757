"""What systemd wants to hear from a service: sd_notify by the standard library."""

import os
import socket
from collections.abc import MutableMapping
from contextlib import suppress


class Notifier:
    """Sends messages to the service manager, where there is one.

    Attributes:
        ping_s: How often to :meth:`ping` at least; None where there is no watchdog.
    """

    def __init__(self, environ: MutableMapping[str, str]) -> None:
        """Find the manager.

        Args:
            environ: The environment. What names the manager is taken out of it, so that
                no hook and no trial session speaks in our name.
        """
        self._address = environ.pop("NOTIFY_SOCKET", "")
        limit_us = int(environ.pop("WATCHDOG_USEC", "0"))
        ours = environ.pop("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        self.ping_s = limit_us / 2e6 if limit_us and ours else None

    def tell(self, *lines: str) -> None:
        """Send messages such as ``READY=1`` or ``STATUS=...``."""
        if not self._address:
            return
        # An abstract socket is written with @ for its leading zero byte.
        address = self._address.replace("@", "\0", 1 if self._address[0] == "@" else 0)
        # A manager that does not listen is no reason to leave the model out of date.
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out:
            out.connect(address)
            out.sendall("\n".join(lines).encode())

    def ping(self) -> None:
        """Tell the watchdog that there is progress; call it nowhere else."""
        if self.ping_s:
            self.tell("WATCHDOG=1")
