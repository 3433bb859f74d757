# SPDX-License-Identifier: Apache-2.0
"""What every command of this project shares: exit codes, ``--json``, error messages.

Data goes to standard output, everything else to standard error. With ``--json`` a
command prints exactly one object with a ``schema`` number (one that goes on for ever
one a line, each time), where a number that is not finite is null; an error is one JSON
object on standard error. New exit codes may be added: treat an unknown one as a
failure.
"""

import functools
import json
import math
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from errno import EACCES, ENOSPC, EPERM, EROFS
from pathlib import Path
from types import UnionType
from typing import Any, NoReturn

import click
from click.core import ParameterSource
from click.exceptions import NoArgsIsHelpError

from edge_runtime import errors
from edge_runtime.formats.kinds import Kind, refuse_others
from edge_runtime.streams import give_up_rest, prepare_streams, read_by_nobody, unheard
from edge_runtime.text import printable_lines, printable_message

Answer = tuple[dict[str, Any], str]  # of a command: as data, and for people
SCHEMA = 1
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


def json_option(command: Any) -> Any:
    """Add ``--json`` to a command."""
    return click.option(
        "--json", "as_json", is_flag=True, help="Print one JSON object instead of text."
    )(command)


def emit(record: Mapping[str, object], *, as_json: bool, text: str) -> None:
    """Print a command's result to standard output.

    Args:
        record: The result as data; ``schema`` is added.
        as_json: Print the record; otherwise the text.
        text: The result for people.
    """
    with _naming_output():
        if as_json:
            # In pieces: the text of a large record takes several times its memory.
            encoder = json.JSONEncoder(indent=2, allow_nan=False)
            pieces = encoder.iterencode(finite({"schema": SCHEMA, **record}))
            sys.stdout.writelines(pieces)
            print()
        else:
            print(printable_lines(text))


@contextmanager
def _naming_output() -> Iterator[None]:
    """Name standard output in errors of the system: no other disk is to be searched."""
    try:
        yield
    except OSError as err:
        err.filename = err.filename or "standard output"
        raise


def emit_line(record: Mapping[str, object], *, as_json: bool, text: str) -> None:
    """Print one result of a command that goes on for ever, at once.

    Args:
        record: As for :func:`emit`; it becomes one line.
        as_json: Print the record; otherwise the text.
        text: The result for people.
    """
    line = json.dumps(finite({"schema": SCHEMA, **record}), allow_nan=False)
    with _naming_output():
        print(line if as_json else printable_lines(text), flush=True)


def finite(value: Any) -> Any:
    """Return data with null for NaN and infinities, which JSON does not have."""
    if isinstance(value, Mapping):
        return {name: finite(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return list(map(finite, value))
    return None if isinstance(value, float) and not math.isfinite(value) else value


def on_device(command: Callable[..., Answer]) -> Any:
    """Give a command the installed device, and print what it answers.

    To be the innermost decorator: it adds ``--json`` and takes the store's directory.
    """

    @functools.wraps(command)
    def run(root: Path, *, as_json: bool, **options: Any) -> None:
        # Imported late: help and wrong use are answered at once on a small board.
        from edge_runtime.update.device import Device

        record, text = command(Device.open(root), **options)
        emit(record, as_json=as_json, text=text)

    return json_option(click.pass_obj(run))


def progress(text: str) -> None:
    """Print what is done so far; the work goes on though it cannot be written.

    What a full disk does not take is tried again, and told as a failure in the end.
    """
    with unheard(sys.stdout):
        print(printable_lines(text), flush=True)


def say(message: str, *, label: str = "") -> None:
    """Tell a person something, on standard error, as a terminal may show it.

    Args:
        message: Whatever is in it, no other line of it can pass for its first.
        label: What stands before it, in red where colours are wanted.
    """
    if label and sys.stderr.isatty() and not os.environ.get("NO_COLOR"):
        label = click.style(label, "red", bold=True)
    with unheard(sys.stderr):  # the work counts, and the exit code tells
        # Not click.echo: that would choose an encoding of its own.
        print(label + printable_message(message), file=sys.stderr, flush=True)


def release_interrupts() -> None:
    """Let Ctrl-C interrupt this thread; :mod:`edge_runtime.__main__` held it back."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


class _CatchErrors:
    """Turns exceptions into messages and documented exit codes."""

    def main(
        self, args: Sequence[str] | None = None, *more: Any, **kwargs: Any
    ) -> NoReturn:
        args = sys.argv[1:] if args is None else list(args)
        prepare_streams()
        kwargs["standalone_mode"] = False
        try:
            release_interrupts()
            # An empty path would be this folder, where a shell variable was not set.
            if unset := [a for a in args if not a or re.fullmatch("--[a-z-]+=", a)]:
                raise click.UsageError(
                    f"found {unset[0]!r}, expected a value: is a variable not set?"
                )
            result = super().main(args, *more, **kwargs)  # type: ignore[misc]
        # The one place where a bug becomes a message.
        except (Exception, KeyboardInterrupt) as err:  # noqa: BLE001
            with unheard(sys.stderr):
                _report(err, as_json="--json" in args)
            result = exit_code(err)
        for stream in (sys.stdout, sys.stderr):
            give_up_rest(stream)
        # Without standalone mode, click hands back the code of ctx.exit(), or what
        # the command returned.
        sys.exit(result if isinstance(result, int) else OK)

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        try:
            return super().make_context(*args, **kwargs)  # type: ignore[misc,no-any-return]
        except BrokenPipeError:  # of --help and --version; click would end with 1
            read_by_nobody(sys.stdout)
            raise click.exceptions.Exit(OK) from None

    def invoke(self, ctx: click.Context) -> Any:
        try:
            result = super().invoke(ctx)  # type: ignore[misc]
            with _naming_output():
                sys.stdout.flush()
        except BrokenPipeError:
            # The reader went away (``dpu-edge infer ... | head``): not our failure.
            read_by_nobody(sys.stdout)
            return OK
        return result


def _report(error: BaseException, *, as_json: bool) -> None:
    code, message = exit_code(error), message_of(error)
    if as_json:
        record = {"schema": SCHEMA, "error": type(error).__name__, "message": message}
        record |= {"exit_code": code}
        record |= errors.details_of(error)
        record |= (
            {"traceback": traceback.format_exception(error)} if code == BUG else {}
        )
        say(json.dumps(record, default=str))
    elif isinstance(error, NoArgsIsHelpError):
        print(message, file=sys.stderr)
    elif code == BUG:
        trace = "".join(traceback.format_exception(error))
        print(printable_lines(trace), file=sys.stderr, end="")
        say("this is a bug: please report it with the lines above")
    else:
        say(message, label="error: ")
        if isinstance(error, click.UsageError) and error.ctx:
            say(error.ctx.get_usage().replace("Usage:", "usage:", 1))
            say(f"help:  {error.ctx.command_path} --help")


def message_of(error: BaseException) -> str:
    """Return what a command says of an exception, with what to do about it."""
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


class FileOf(click.Path):
    """A file of some kinds; another kind is refused by its name, before any work."""

    def __init__(self, *kinds: Kind, **how: Any) -> None:
        """Accept files of these kinds, and what nobody recognises.

        Args:
            kinds: What the file may be.
            how: As :class:`click.Path` takes it.
        """
        super().__init__(exists=True, path_type=Path, **{"dir_okay": False} | how)
        self.kinds = kinds

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Any:
        """Return the path, or say what is there and which command takes it."""
        path = Path(value)
        if path.is_char_device() or path.is_block_device():
            self.fail(f"{path} is a device, expected a file", param, ctx)
        named = Kind.SHARDS in self.kinds  # of other folders it looks at names alone
        if named or not (self.dir_okay and path.is_dir()):
            refuse_others(path, self.kinds)
        return super().convert(value, param, ctx)


class Seconds(click.FloatRange):
    """A span of time within bounds, by default up to a year: 90, 90s, 10m, 12h, 30d."""

    def __init__(self, least: float, most: float = 366 * 86_400.0) -> None:
        """Accept what is in between."""
        super().__init__(least, most)

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Any:
        """Return seconds; NaN is within no bounds, though no comparison says so."""
        if span := re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([smhd])", str(value)):
            value = float(span[1]) * UNITS[span[2]]
        found = super().convert(value, param, ctx)
        if math.isnan(found):
            self.fail(f"{value} is no number of seconds", param, ctx)
        return found


UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_JSON = "dpu_edge.json"


def _note_json(context: click.Context, _: click.Parameter, given: bool) -> None:
    context.meta[_JSON] = given or context.meta.get(_JSON)


class Command(_CatchErrors, click.Command):
    """A click command with this project's errors and exit codes."""


def shared(context: click.Context, option: click.Parameter, value: Any) -> None:
    """Keep an option's value as ``context.obj``: the callback of shared options.

    An option of a group with this callback may also follow a command's name, as if it
    stood before it; what is given last wins, over the environment too. Commands insist
    on it and take it by ``click.pass_obj``.
    """
    source = context.get_parameter_source(str(option.name))
    if source is ParameterSource.COMMANDLINE or context.obj is None:
        context.obj = value
    # What follows the name of a group within a group may still give it.
    is_command = context.parent and not isinstance(context.command, click.Group)
    if context.obj is None and is_command:
        raise click.MissingParameter(f"Or set {option.envvar}.", context, option)


class Group(_CatchErrors, click.Group):
    """A click group with this project's errors and exit codes.

    ``--json`` may stand before a command's name too, as the options that are shared.
    """

    def __init__(self, *args: Any, **how: Any) -> None:
        super().__init__(*args, **how)
        self.params.append(
            click.Option(
                ["--json"],
                is_flag=True,
                hidden=True,
                expose_value=False,
                callback=_note_json,
            )
        )

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Return a command and its arguments, with what stood before its name."""
        name, command, rest = super().resolve_command(ctx, args)
        if command is None or not ctx.meta.get(_JSON):
            return name, command, rest
        if not any("--json" in option.opts for option in command.params):
            raise click.NoSuchOption("--json", ctx=ctx)
        return name, command, ["--json", *rest]

    def add_command(self, cmd: click.Command, name: str | None = None) -> None:
        """Add a command, with the options that the group shares."""
        cmd.params += [p for p in self.params if p.callback is shared]
        super().add_command(cmd, name)


CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 88}
