# SPDX-License-Identifier: Apache-2.0
"""What every command of this project shares: ``--json``, its streams, its errors.

Data goes to standard output, everything else to standard error. With ``--json`` a
command prints exactly one object with a ``schema`` number (one that goes on for ever
one a line, each time), where a number that is not finite is null; an error is one JSON
object on standard error.
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
from pathlib import Path
from typing import Any, NoReturn

import click
from click.core import ParameterSource
from click.exceptions import NoArgsIsHelpError

from edge_runtime import errors
from edge_runtime.exit_codes import BUG, OK, exit_code, message_of
from edge_runtime.streams import give_up_rest, prepare_streams, read_by_nobody, unheard
from edge_runtime.text import printable_lines, printable_message

Answer = tuple[dict[str, Any], str]  # of a command: as data, and for people
SCHEMA = 1


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
