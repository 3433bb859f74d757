"""What systemd wants to hear from a service: sd_notify by the standard library."""

import os
import socket
from contextlib import suppress


def tell(*lines: str) -> None:
    """Send messages such as ``READY=1`` to the service manager, where there is one."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    # An abstract socket is written with @ for its leading zero byte.
    address = address.replace("@", "\0", 1 if address[0] == "@" else 0)
    # A manager that does not listen is no reason to leave the model out of date.
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out:
        out.connect(address)
        out.sendall("\n".join(lines).encode())


def ping() -> None:
    """Tell the watchdog that there is progress; call it nowhere else."""
    tell("WATCHDOG=1")
