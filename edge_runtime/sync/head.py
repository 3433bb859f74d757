# SPDX-License-Identifier: Apache-2.0
"""What the head of a channel says: which release runs, where, and how to get there.

A pause may be added by a key that can do nothing else; whoever takes it away again
makes no device forget it.
"""

import hashlib
from dataclasses import dataclass

from edge_runtime.formats.signing import Signature, Trust, framed, is_signed, key_id
from edge_runtime.trust.canonical import encode_canonical

HEAD_CONTEXT = b"dpu channel head"
PAUSE_CONTEXT = b"dpu channel pause"
CHANNEL_FORM = r"[a-z0-9][a-z0-9_-]{0,31}"
SHORT = 12  # hexadecimal digits of a fingerprint in a way
PERMILLE = 1000


@dataclass(frozen=True, slots=True)
class Way:
    """A patch that the channel offers.

    Attributes:
        parent: First 12 hexadecimal digits of the weights that it leads from.
        target: The same of those that it leads to.
        size: Its bytes.
        sha256: Of the file, which is its name too.
    """

    parent: str
    target: str
    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Rollout:
    """Which devices take a release, and when.

    Attributes:
        id: Keeps a device's place while the share grows; another id shuffles.
        steps: Share in permille, and from which second since 1970 on, in order of time.
        groups: Devices of these groups only; empty: all.
    """

    id: str
    steps: tuple[tuple[int, int], ...] = ()
    groups: tuple[str, ...] = ()

    def share(self, now: int) -> int:
        """Return the share of the devices that take part at a time, in permille."""
        begun = [share for share, start in self.steps if start <= now]
        return begun[-1] if begun else PERMILLE if not self.steps else 0

    def includes(self, device: str, group: str, now: int) -> bool:
        """Return whether a device takes part now; once it does, it stays.

        Args:
            device: The device's id, any text that stays the same.
            group: The group that it belongs to, or empty.
            now: Seconds since 1970.
        """
        if self.groups and group not in self.groups:
            return False
        return place(self.id, device) < self.share(now)


@dataclass(frozen=True, slots=True)
class Head:
    """What a channel says.

    Attributes:
        model: Identity of network and run, 64 hexadecimal digits.
        channel: Its name.
        version: Grows with every head of the channel.
        at: When it was signed, in seconds since 1970.
        expires: From this second since 1970 on, nobody knows whether it is the newest.
        counter: Release counter of the newest release.
        round: Its round.
        target: Its fingerprint, 64 hexadecimal digits.
        ways: The patches that lead there, alone or one behind the other.
        bundle: Bytes and SHA-256 of what installs a new device; None without one.
        keys: Number of the newest key list beside it; 0: there is none.
        rollout: Which devices take part; None: all, now.
        pausers: Public keys, hex, that may pause it and do nothing else.
    """

    model: str
    channel: str
    version: int
    at: int
    expires: int
    counter: int
    round: int
    target: str
    ways: tuple[Way, ...] = ()
    bundle: tuple[int, str] | None = None
    keys: int = 0
    rollout: Rollout | None = None
    pausers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Pause:
    """A halt of a rollout: no device begins this version any more.

    Attributes:
        at: When, in seconds since 1970.
        signature: Of one of the head's pausers.
    """

    at: int
    signature: Signature


@dataclass(frozen=True, slots=True)
class SignedHead:
    """A head whose signatures have not been looked at yet.

    Attributes:
        head: What it says.
        message: The bytes that are signed.
        signatures: What came with them.
        pause: What a pauser added; None for nothing.
    """

    head: Head
    message: bytes
    signatures: tuple[Signature, ...]
    pause: Pause | None = None

    @property
    def sha256(self) -> str:
        """SHA-256 of what is signed: two heads of one version must not differ."""
        return hashlib.sha256(self.message).hexdigest()

    def check(self, trust: Trust) -> tuple[str, ...]:
        """Insist that enough trusted keys signed it; return the ids of those.

        Raises:
            TrustError: Too few of them did, or a signature is wrong.
        """
        return trust.check(HEAD_CONTEXT, self.message, self.signatures)

    def is_paused(self) -> bool:
        """Return whether a key that the head names paused it.

        To be asked behind :meth:`check`, which proves whom the head names.
        """
        if self.pause is None:
            return False
        message = framed(PAUSE_CONTEXT, pause_message(self.sha256, self.pause.at))
        return any(
            key_id(key) == self.pause.signature.key_id
            and is_signed(key, self.pause.signature.value, message)
            for key in self.head.pausers
        )


def place(rollout: str, device: str) -> int:
    """Return where a device stands in a rollout, from 0 to 999."""
    text = f"{rollout}\n{device}".encode(errors="surrogatepass")
    return int.from_bytes(hashlib.sha256(text).digest()[:8]) % PERMILLE


def pause_message(sha256: str, at: int) -> bytes:
    """Return what a pauser signs: which head, and when."""
    return encode_canonical({"head": sha256, "at": at})
