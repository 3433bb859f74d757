"""Count code lines (without comments, docstrings, blank lines); hold the budgets.

python -m tools.code_lines --check

The runtime's modules stand in rings, each with a budget a little above what it has, so
that growth is a decision and shrinking is kept. A module in no ring fails the check.
"""

import ast
import io
import sys
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click

from edge_runtime.commandline import CONTEXT, Command, emit, json_option, say
from tools.wheels import CHECKOUT

PACKAGES = ("edge_runtime", "packager", "trainer", "tools", "tests")
RUNTIME = "edge_runtime"
GOAL = 2000  # code lines of the whole runtime, the NumPy backend aside: missed


@dataclass(frozen=True, slots=True)
class Ring:
    """Modules of the runtime that belong together.

    Attributes:
        what: What goes wrong if they are wrong.
        budget: The most code lines that they may have.
        modules: Their names.
    """

    what: str
    budget: int
    modules: frozenset[str]


def _ring(what: str, budget: int, modules: str) -> Ring:
    return Ring(what, budget, frozenset(modules.split()))


# From the inside out. Only "numpy" is outside the goal.
RINGS = {
    "patch": _ring(
        "reads, checks and applies a patch: an attacker's bytes end here",
        1730,
        "apply codec frames header init line patch positions sections signing values "
        "weights",
    ),
    "store": _ring(
        "keeps the weights whole on disk and decides what becomes active",
        1020,
        "bundle contract device files hooks slots state store trial",
    ),
    "inference": _ring(
        "answers with the active weights and moves to new ones",
        360,
        "bench follow infer inputs",
    ),
    "service": _ring(
        "runs all of it without a person, and proves it to the server",
        514,
        "agent live proof report route",
    ),
    "commands": _ring(
        "the command line, the errors and the public names",
        733,
        "__init__ __main__ cli cli_agent cli_infer command errors",
    ),
    "numpy": _ring("computes where ONNX Runtime cannot be had", 230, "numpy_backend"),
}
_SILENT = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
}


def code_lines(path: Path) -> int:
    """Return how many lines of a Python file hold code."""
    text = path.read_text()
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in _SILENT:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and _is_docstring(body[0]):
            lines.difference_update(range(body[0].lineno, body[0].end_lineno + 1))
    return len(lines)


def _is_docstring(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def runtime_lines() -> dict[str, int]:
    """Return the code lines of each module of the runtime."""
    return {path.stem: code_lines(path) for path in (CHECKOUT / RUNTIME).glob("*.py")}


def ring_lines(modules: dict[str, int]) -> dict[str, int]:
    """Return the code lines of each ring."""
    return {
        name: sum(modules.get(module, 0) for module in ring.modules)
        for name, ring in RINGS.items()
    }


def problems(modules: dict[str, int]) -> Iterator[str]:
    """Yield what is over its budget or in no ring."""
    for name, count in ring_lines(modules).items():
        if count > RINGS[name].budget:
            yield (
                f"ring {name!r} has {count} code lines, {RINGS[name].budget} are "
                "allowed: take some out, or raise the budget and say why"
            )
    known = frozenset().union(*(ring.modules for ring in RINGS.values()))
    for module in sorted(modules.keys() - known):
        yield f"{RUNTIME}/{module}.py is in no ring: add it to one in {__file__}"


def table(packages: dict[str, int], modules: dict[str, int]) -> Iterator[str]:
    """Return the report as lines."""
    for package, count in packages.items():
        yield f"{package:<14}{count:>6}"
    yield ""
    yield f"{RUNTIME:<14}{'lines':>6}{'budget':>8}"
    counts = ring_lines(modules)
    for name, count in counts.items():
        yield f"  {name:<12}{count:>6}{RINGS[name].budget:>8}  {RINGS[name].what}"
    total = sum(counts.values()) - counts["numpy"]
    yield f"  {'all but numpy':<12}{total:>5}; the goal of {GOAL} is " + (
        "held" if total <= GOAL else "missed"
    )


@click.command(cls=Command, context_settings=CONTEXT)
@click.option("--check", is_flag=True, help="Exit 1 if a ring is over its budget.")
@json_option
def main(*, check: bool, as_json: bool) -> None:
    """Count code lines per package and per ring of the runtime."""
    packages = {
        package: sum(map(code_lines, (CHECKOUT / package).rglob("*.py")))
        for package in PACKAGES
    }
    modules = runtime_lines()
    record = {"packages": packages, "rings": ring_lines(modules), "modules": modules}
    emit(record, as_json=as_json, text="\n".join(table(packages, modules)))
    found = list(problems(modules)) if check else []
    for problem in found:
        say(f"error: {problem}")
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
