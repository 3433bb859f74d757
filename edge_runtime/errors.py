# SPDX-License-Identifier: Apache-2.0
"""Every error of this project that a caller may catch.

One tree, so that a caller can catch as much or as little as needed::

    DpuError
     + PatchError                   the patch file is at fault; nothing changed
     |  + PatchFormatError          not a patch, truncated, malformed, over a limit
     |  + PatchVersionError         newer than this runtime      .found .supported
     |  + PatchIntegrityError       a checksum does not match    .expected .actual
     + WeightsError                 a weight file or init recipe is malformed
     + BundleError                  an installation bundle is malformed
     + ContractError                malformed contract or arrays, or an unfit input
     + WrongParentError             patch is for other weights   .expected .actual
     + WrongModelError              patch is for another network .expected .actual
     + VerificationError            result is not the promised one; nothing installed
     + TrialError                   new weights failed their trial; nothing installed
     |  + TrialCutOffError          their trial crashed or hung: one try
     + StoreError                   the device's own files, or the place published to
     + BackendError                 no runtime here can run the graph
     + BlockedError                 this device cannot try a release now: no memory, ...
     + TrustError                   unsigned, wrongly signed or replayed release
     |  + ListExpiredError          the key list expired before it was signed
     + KeyListError                 what should be a key list is malformed
     + HeadError                    what should be a channel's head is malformed
     + SyncError                    no answer of a server, or not a usable one
     + AddressError                 (packager) no address of a place to publish to
     + KeyFileError                 a file does not hold the key that is needed
     + ProofError                   what should be a device's proof is malformed
     + LimitError                   DPU_LIMITS does not say what it should
     + HeldError                    this device's owner holds the update back
     + RoundError                   (packager) round folder incomplete or inconsistent
     |  + RoundNotFoundError        no such round, or more than one
     + BudgetError                  (packager) patch over its size limit .limit .actual
     + TrainingError                (trainer)
        + ConfigError               recipe with problems, all of them listed .problems
        + StepNotObservedError      no attached optimizer stepped
        + FrozenWeightChangedError  something else wrote the weights .tensor .count
        + ExportError               the model cannot be deployed weight for weight

Messages say what was expected, what was found and what to do next. "Already at the
target" is a result (:class:`edge_runtime.update.device.UpdateResult`), not an error:
retries are normal on bad links. The library knows nothing of exit codes; they are in
:mod:`edge_runtime.commandline`.
"""

import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

# What JSON of an unexpected shape raises where it is parsed.
MALFORMED = (
    *(ValueError, LookupError, TypeError, AttributeError),
    *(ArithmeticError, RecursionError),
)

_SYSTEM_ERRORS = (
    *(errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EIO, errno.EAGAIN),
    *(errno.EACCES, errno.EPERM, errno.ENOSPC),
)
# Libraries tell of faults of the system in words alone.
_SYSTEM_WORDS = (
    *map(os.strerror, _SYSTEM_ERRORS),
    *("bad_alloc", "Failed to allocate memory", "failed to allocate memory"),
    *("Unable to allocate", "failed to map segment", "allocate memory"),
    "can't start new thread",
    "SystemError : ",  # ONNX Runtime's, with the number of an error of the system
)


def tells_of_the_system(text: str) -> bool:
    """Return whether a library's message says that the system lacks something."""
    return any(words in text for words in _SYSTEM_WORDS)


def how_to_install(extra: str) -> str:
    """Say how an extra of this project is installed; nothing is on PyPI yet."""
    return (
        f"it is in the extra '{extra}': pip install -e '.[{extra}]' in a checkout, "
        f'else pip install "$(echo dpu_edge-*.whl)[{extra}]" (docs/installing.md)'
    )


class DpuError(Exception):
    """The root of the tree.

    Attributes:
        details: Facts beside the message, JSON-able; ``--json`` prints them.
    """

    def __init__(self, message: str = "", **details: Any) -> None:
        super().__init__(message)
        self.details = details


def told_of(error: BaseException) -> str:
    """Return an error's message; with its type where it is not meant for people."""
    is_meant = isinstance(error, DpuError | OSError) and str(error)
    return str(error) if is_meant else f"{type(error).__name__}: {error}"


def details_of(error: BaseException) -> dict[str, Any]:
    """Return the facts beside an exception's message, also of the system's."""
    found: dict[str, Any] = getattr(error, "details", {})
    return found


def add_details(error: Exception, **details: Any) -> None:
    """Add facts to an exception of ours or of the operating system."""
    error.__dict__["details"] = details_of(error) | details


@contextmanager
def prefix_errors(name: str | os.PathLike[str]) -> Iterator[None]:
    """Let errors begin with the file that they are about."""
    try:
        yield
    except DpuError as err:
        err.args = (f"{os.fspath(name)}: {err}",)
        raise


class PatchError(DpuError):
    """The patch file is at fault; nothing was changed."""


class PatchFormatError(PatchError):
    """Not a patch, truncated, malformed, or over a limit."""


class PatchVersionError(PatchError):
    """The patch needs a newer runtime."""

    def __init__(self, message: str, *, found: int, supported: int) -> None:
        super().__init__(message, found=found, supported=supported)
        self.found = found
        self.supported = supported


class _MismatchError(DpuError):
    """Two hexadecimal digests that should have been equal."""

    def __init__(self, message: str, *, expected: str, actual: str) -> None:
        super().__init__(message, expected=expected, actual=actual)
        self.expected = expected
        self.actual = actual


class PatchIntegrityError(PatchError, _MismatchError):
    """A checksum of the patch does not match its bytes."""


class WeightsError(DpuError):
    """A weight file or an init recipe is malformed."""


class BundleError(DpuError):
    """An installation bundle is malformed."""


class ContractError(DpuError):
    """A contract or an array file is malformed, or an input does not fit the model."""


class WrongParentError(_MismatchError):
    """The patch leads from weights that this device does not have."""


class WrongModelError(_MismatchError):
    """The patch is for another network."""


class VerificationError(_MismatchError):
    """The result is not what was promised; nothing was installed."""


class TrialError(DpuError):
    """The new weights failed their trial session; nothing was installed."""


class TrialCutOffError(TrialError):
    """The trial session crashed or hung: one try, and no verdict."""


class BlockedError(DpuError):
    """This device cannot try the release now, whatever its weights; try again later."""


class BackendError(DpuError):
    """No runtime on this device can run the graph; the message says what it lacks."""


class StoreError(DpuError):
    """The store, or the place published to: absent, damaged, full, locked, changing."""


class TrustError(DpuError):
    """The release is unsigned, wrongly signed, replayed, or failed its trial."""


class ListExpiredError(TrustError):
    """The key list of the device expired before this was signed."""


class KeyListError(DpuError):
    """What should be a key list is malformed, or could never be met."""


class HeadError(DpuError):
    """What should be the head of a channel is malformed."""


class SyncError(DpuError):
    """A server gives no answer, or none that can be used; later it may.

    Attributes:
        permanent: Whether only a person can change that, so it is asked less often.
    """

    def __init__(self, message: str, *, permanent: bool = False) -> None:
        super().__init__(message)
        self.permanent = permanent


class AddressError(DpuError):
    """What should be the address of a place to publish to is none."""


class KeyFileError(DpuError):
    """A file does not hold the key that is needed, or there are too few of them."""


class ProofError(DpuError):
    """What should be a device's proof is malformed."""


class LimitError(DpuError):
    """The environment does not say how much readers may accept."""


class HeldError(DpuError):
    """The device's owner holds the update back: it is pinned, or a hook refused."""


class RoundError(DpuError):
    """A round folder is incomplete or inconsistent."""


class RoundNotFoundError(RoundError):
    """No round of that name, or more than one."""


class BudgetError(DpuError):
    """The finished patch is larger than its limit; no file was left behind."""

    def __init__(self, message: str, *, limit: int, actual: int) -> None:
        super().__init__(message, limit=limit, actual=actual)
        self.limit = limit
        self.actual = actual


class TrainingError(DpuError):
    """Training could not produce a round."""


class ConfigError(TrainingError):
    """A recipe has problems; ``problems`` lists every one of them."""

    def __init__(self, message: str, *, problems: Sequence[str] = ()) -> None:
        self.problems = tuple(problems)
        text = "\n  - ".join([message, *problems])
        super().__init__(text, problems=self.problems)


class StepNotObservedError(TrainingError):
    """No attached optimizer stepped, so there is nothing to score."""


class FrozenWeightChangedError(TrainingError):
    """Something other than the attached optimizers wrote a frozen weight."""

    def __init__(self, message: str, *, tensor: str, count: int) -> None:
        super().__init__(message, tensor=tensor, count=count)
        self.tensor = tensor
        self.count = count


class ExportError(TrainingError):
    """The model cannot be deployed weight for weight; the message names the tensor."""
