# SPDX-License-Identifier: Apache-2.0
"""Ask a place's TUF repository what a channel says, as a new device would."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

from edge_runtime.errors import DpuError, TrustError
from edge_runtime.sync.head import SignedHead
from edge_runtime.sync.plan import TufStaleError
from edge_runtime.sync.source import EXCHANGE_S, Answer
from edge_runtime.sync.tuf import TufClient, limit
from edge_runtime.times import duration, utc
from packager.fleet.check import SOON, Finding, Read, State

MONTH_S = 30 * 86_400  # how long a timestamp is valid, unless somebody says otherwise


def check_tuf(
    read: Read, channel: str, signed: SignedHead | None, root: Path, *, now: int
) -> Finding:
    """Look at what the repository says of a channel.

    Args:
        read: Reads a file of the place.
        channel: The channel.
        signed: Its own head, which the repository should say too.
        root: The first root of devices.
        now: Seconds since 1970.

    Raises:
        OSError: A file cannot be read or written.
    """
    with tempfile.TemporaryDirectory() as folder:
        client, source = TufClient(Path(folder), root), _Source(read)
        try:
            told = client.ask(
                source, channel, slowest=1, deadline_s=EXCHANGE_S, allow=lambda _: None
            )
        except TufStaleError as err:
            return Finding("tuf", State.WRONG, f"{err}; dpu-fleet renew --tuf DIR")
        except TrustError as err:
            return Finding("tuf", State.UNTRUSTED, str(err))
        except DpuError as err:
            return Finding("tuf", State.WRONG, str(err))
    left = told.expires - now
    words = ", ".join(f"{role} {n}" for role, n in told.versions.items())
    if left <= 0:
        words = f"over since {utc(told.expires)}: dpu-fleet renew --tuf DIR"
        return Finding("tuf", State.WRONG, words)
    if signed is None or told.signed.sha256 != signed.sha256:
        words = f"it says version {told.signed.head.version}, not what the head says: "
        return Finding("tuf", State.WRONG, f"{words}publish again with --tuf DIR")
    if left < MONTH_S / SOON:
        words = f"ends in {duration(left)}: dpu-fleet renew --tuf DIR"
        return Finding("tuf", State.NOTE, words)
    return Finding("tuf", State.OK, f"{words}; ends in {duration(left)}")


class _Source:
    """A place as a device's source."""

    name = "the place"

    def __init__(self, read: Read) -> None:
        self._read, self.spent = read, 0

    @contextmanager
    def get(
        self,
        path: str,
        *,
        tag: str = "",  # noqa: ARG002 - nothing is known yet
        offset: int = 0,  # noqa: ARG002
        within: float = EXCHANGE_S,  # noqa: ARG002 - the reader has its own
    ) -> Iterator[Answer]:
        data = self._read(path, limit())
        if data is None:
            yield Answer(404)
        else:
            yield Answer(200, "", len(data), BytesIO(data))
