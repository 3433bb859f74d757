# SPDX-License-Identifier: Apache-2.0
"""The publisher of a simulated fleet: real rounds, patches, heads and key lists."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from edge_runtime.errors import RoundError
from edge_runtime.formats.model_folder import Outcome, list_rounds
from edge_runtime.live.shared import public_key
from edge_runtime.sync.head import SignedHead
from edge_runtime.sync.head_file import read_head
from edge_runtime.sync.paths import head_path
from edge_runtime.times import utc
from packager.fleet.channel import Channel, add_list, pause
from packager.fleet.place import FolderPlace
from packager.fleet.publish import publish
from packager.key_lists import change_list, make_list, sign_list
from packager.rounds.folder import RoundFolder, read_round
from packager.rounds.record import read_record

CHANNEL = "stable"
# Ten of these rounds are better than what devices have, and are published.
TRAINING = "run.rounds=24", "data.growth=36", "data.initial=300"
LIFE_S = 50 * 365 * 86_400  # of lists and heads: programs of devices read real clocks


def train(folder: Path, changes: Sequence[str] = TRAINING) -> Path:
    """Train the digits, by default in many small rounds: a minute of CPU time.

    Args:
        folder: For the run.
        changes: Of the recipe.

    Returns:
        The run's folder.
    """
    from trainer.config import load_config
    from trainer.rounds.schedule import run_rounds

    recipe = Path(str(files("trainer"))) / "recipes" / "digits.toml"
    run_rounds(load_config(recipe, changes), folder)
    return folder / "digits"


def copy_run(run: Path, folder: Path, least: int) -> Path:
    """Copy a run into a folder: publishing writes its ledger beside the rounds.

    Args:
        run: Of somebody, which stays as it is.
        folder: Where to.
        least: How many of its rounds have to update something.

    Returns:
        The copy.

    Raises:
        RoundError: It has fewer, or is no run.
    """
    records = map(read_record, list_rounds(run))
    count = sum(record.outcome is Outcome.UPDATED for record in records)
    if count < least:
        raise RoundError(
            f"{run} has {count} rounds that update anything, expected a run with "
            f"{least} or more; leave --run out, and the digits are trained"
        )
    return Path(shutil.copytree(run, folder / run.resolve().name))


@dataclass(frozen=True, slots=True)
class Issue:
    """A head as devices find it from some moment on.

    Attributes:
        at: Seconds since 1970.
        signed: What it says.
        size: Bytes of its file.
        what: ``release``, ``pause`` or ``revert``.
        is_bad: Whether its release is the bad one.
    """

    at: int
    signed: SignedHead
    size: int
    what: str
    is_bad: bool = False


class Publisher:
    """Publishes a run's rounds into a folder, with keys that are exchanged.

    Attributes:
        place: Where devices look.
        rounds: What has not been published yet.
        issues: Every head so far.
        lists: The files of the key lists, the first one first.
        full_bytes: Bytes of the whole weights.
    """

    def __init__(
        self, run: Path, folder: Path, *, now: int, pausable: bool = True
    ) -> None:
        """Release the first updated round, which devices are installed from.

        Args:
            run: With updated rounds; its ledger is written there.
            folder: Where devices look.
            now: Seconds since 1970.
            pausable: Whether heads name a key that may pause them.
        """
        self._pausers = (public_key(_key(2)),) if pausable else ()
        self.place = FolderPlace(folder)
        found = [read_round(path) for path in list_rounds(run)]
        self.rounds = [r for r in found if r.record.outcome is Outcome.UPDATED]
        self.full_bytes = self.rounds[0].weights.layout.file_size
        self._owner, self._signer, self._pauser = (_key(n) for n in range(3))
        self._former: Ed25519PrivateKey | None = None
        keys = [public_key(self._owner)], [public_key(self._signer)]
        first = make_list(*keys, (utc(now), utc(now + LIFE_S)))
        self.lists = [sign_list(first, [self._owner])]
        self.issues: list[Issue] = []
        self._newest = self._good = self.rounds[0]
        self.release(now=now)

    def release(
        self,
        *,
        now: int,
        shares: tuple[tuple[int, int], ...] = (),
        is_bad: bool = False,
    ) -> Issue:
        """Publish the next round."""
        before, self._newest = self._newest, self.rounds.pop(0)
        if is_bad:
            self._good = before
        return self._publish(self._newest, now, "release", shares, is_bad=is_bad)

    def revert(self, *, now: int) -> Issue:
        """Take the bad release back, everywhere at once."""
        return self._publish(self._good, now, "revert", (), revert=True)

    def pause(self, *, now: int) -> Issue:
        """Halt the rollout, with the key that can do nothing else."""
        pause(self.place, CHANNEL, self._pauser, now=now)
        return self._issue(now, "pause", is_bad=self.issues[-1].is_bad)

    def rotate(self, *, now: int) -> None:
        """Let another key sign releases; the next publication goes on from the old."""
        old, new = self._signer, _key(10 + len(self.lists))
        changes = {"targets": [public_key(new)]}, {"targets": [public_key(old)]}
        times = utc(now), utc(now + LIFE_S)
        data = change_list(self.lists[-1], times, add=changes[0], remove=changes[1])
        self.lists.append(sign_list(data, [self._owner]))
        add_list(self.place, self.lists[-1])
        self._former, self._signer = old, new

    def _publish(
        self,
        round_: RoundFolder,
        now: int,
        what: str,
        shares: tuple[tuple[int, int], ...],
        *,
        is_bad: bool = False,
        revert: bool = False,
    ) -> Issue:
        channel = Channel(
            name=CHANNEL,
            signers=[self._signer],
            lifetime_s=LIFE_S,
            shares=shares,
            pausers=self._pausers,
            former=(public_key(self._former),) if self._former else (),
        )
        publish(round_, self.place, channel, now=now, revert=revert)
        self._former = None
        return self._issue(now, what, is_bad=is_bad)

    def _issue(self, now: int, what: str, *, is_bad: bool) -> Issue:
        data, _ = self.place.read(head_path(CHANNEL)) or (b"", "")
        self.issues.append(Issue(now, read_head(data), len(data), what, is_bad))
        return self.issues[-1]


def _key(number: int) -> Ed25519PrivateKey:
    # The same in each run: so are the bytes of heads, and with them all figures.
    return Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32)
