# SPDX-License-Identifier: Apache-2.0
"""What a command ends with where it fails: a code, and words about what to do.

New exit codes may be added: treat an unknown one as a failure.
"""

import re
from errno import EACCES, ENOSPC, EPERM, EROFS
from types import UnionType

import click
from click.exceptions import NoArgsIsHelpError

from edge_runtime import errors
from edge_runtime.text import beginning

OK, BUG, USAGE, SYSTEM = 0, 1, 2, 10
DIFFERENT, UNTRUSTED, UNWELL = 5, 8, 13  # what a check found
HINTS = dict.fromkeys((EACCES, EPERM), "; run this as a user who may")
HINTS[ENOSPC] = "; make room and try again"
HINTS[EROFS] = "; mount it for writing, or choose another place"
# What installs a package that is not there, where it is not dpu-edge itself: a device
# has the runtime alone.
EXTRAS = {
    "onnx": "pack",
    "PIL": "image",
    "tensorboard": "tensorboard",
    **dict.fromkeys(("torch", "torchvision", "onnxscript", "onnx_ir"), "train"),
    "sklearn": "train",
    "urllib3": "sync",
    **dict.fromkeys(("tuf", "securesystemslib"), "tuf"),
    "obstore": "fleet",
}
REQUIRED = ("numpy", "onnxruntime", "zstandard", "cryptography")

# The first code that matches is an exception's; any other exception is a bug.
EXIT_CODES: dict[int, UnionType | type[BaseException]] = {
    USAGE: click.ClickException
    | FileExistsError
    | errors.AddressError
    | errors.ConfigError
    | errors.ContractError
    | errors.KeyFileError
    | errors.LimitError
    | errors.RoundNotFoundError,
    3: errors.PatchError
    | errors.BundleError
    | errors.HeadError
    | errors.KeyListError
    | errors.ProofError
    | errors.RoundError
    | errors.WeightsError,
    4: errors.WrongParentError | errors.WrongModelError,
    DIFFERENT: errors.VerificationError | errors.TrialError,
    6: errors.BudgetError,
    7: errors.StoreError,
    UNTRUSTED: errors.TrustError,
    9: errors.TrainingError,
    SYSTEM: OSError | MemoryError | errors.BlockedError | errors.SyncError,
    11: errors.BackendError,
    12: errors.HeldError,
    130: KeyboardInterrupt | click.Abort,
}

EXIT_CODE_HELP = """\b
Exit codes (new ones may be added; treat an unknown one as a failure):
  0  done, or nothing to do
  1  unexpected: a bug, please report it
  2  usage: wrong use, recipe, input or key; unknown round, name taken, missing package
  3  no valid patch, bundle, weight file, round, head, proof or key list; a halted round
  4  the patch is for other weights or for another model
  5  verification or trial failed, nothing changed
  6  the patch is over its size limit
  7  the store or published place is absent, taken, damaged, full, locked or changing
  8  not trusted: unsigned, wrongly signed, replayed or expired
  9  training or export failed
 10  the system or a server failed: full disk, no permission, memory or answer
 11  no runtime on this device can run the model
 12  held back on this device: pinned, or a hook refused
 13  'dpu-edge doctor' found something wrong
130  interrupted
"""


def exit_code(error: BaseException) -> int:
    """Return the exit code that an exception ends a command with."""
    if _missing_package(error) or _beyond_locale(error):
        return USAGE
    if _lacking(error):
        return SYSTEM
    return next((c for c, kind in EXIT_CODES.items() if isinstance(error, kind)), BUG)


def _missing_package(error: BaseException) -> str:
    """Say how to install what could not be imported; empty for any other error."""
    if not isinstance(error, ModuleNotFoundError):
        return ""
    package = (error.name or "").partition(".")[0]
    if package not in EXTRAS and package not in REQUIRED:
        return ""
    words = f"this needs {package}, which is not installed"
    if package in REQUIRED:
        return f"{words}: pip install {package}"
    return f"{words}; {errors.how_to_install(EXTRAS[package])}"


def _beyond_locale(error: BaseException) -> str:
    """Say what to do about a name that this locale cannot write; or nothing."""
    if not isinstance(error, UnicodeEncodeError) or error.encoding == "utf-8":
        return ""
    return (
        f"{error.object!r} cannot be a file name here, as this locale has only "
        f"{error.encoding}: set LC_ALL=C.UTF-8"
    )


def _lacking(error: BaseException) -> str:
    """Say what the system lacks, where a library tells it in words; or nothing."""
    known = isinstance(error, ImportError | RuntimeError | SystemError)
    if not known or not errors.tells_of_the_system(str(error)):
        return ""
    # NumPy says a page of advice around it.
    lines = str(error).splitlines()
    said = next((li for li in lines if errors.tells_of_the_system(li)), lines[0])
    return f"{said.strip()}; end other programs, or raise the limits on this one"


def message_of(error: BaseException) -> str:
    """Return what a command says of an exception, with what to do about it.

    A name in it may have megabytes: of a very long line only the beginning is given.
    """
    return "\n".join(map(beginning, _words_of(error).split("\n")))


def _words_of(error: BaseException) -> str:
    known = _missing_package(error) or _beyond_locale(error) or _lacking(error)
    if known:
        return known
    if isinstance(error, click.ClickException):
        return _in_our_voice(error)
    if isinstance(error, OSError) and error.strerror:
        hint = HINTS.get(error.errno or 0, "")
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}{hint}"
    if isinstance(error, KeyboardInterrupt | click.Abort):
        return "interrupted"
    if isinstance(error, MemoryError):
        return "not enough memory; give it smaller files, or end other programs"
    return str(error) or repr(error)


def _in_our_voice(error: click.ClickException) -> str:
    """Return click's message as ours are: no capital at the start, no full stop."""
    text = error.format_message()
    if isinstance(error, NoArgsIsHelpError):
        return text
    small = re.sub(r"(^|': )[A-Z](?=[a-z]*\b )", lambda m: m[0].lower(), text)
    joined = re.sub(
        r"\. (?=Or set |Did you mean )(.)", lambda m: f"; {m[1].lower()}", small
    )
    return re.sub(r"(?<!\.)\.$", "", joined.rstrip())
