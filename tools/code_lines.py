# SPDX-License-Identifier: Apache-2.0
"""Count code lines (without comments, docstrings, blank lines); hold the budgets.

    python -m tools.code_lines --check

A sub-package is a floor, and the modules beside them are one more (``.``). Each floor
has a budget a little above what it has, so that growth is a decision: who adds a
capability sets the budget anew and says why in the commit.
"""

import ast
import io
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import click

from edge_runtime.commandline import CONTEXT, Command, emit, json_option, say
from tools.wheels import CHECKOUT

PACKAGES = ("edge_runtime", "packager", "trainer", "tools", "tests")

# The most code lines that a floor may have.
BUDGETS: dict[str, dict[str, int]] = {
    "edge_runtime": {
        ".": 935,
        "agent": 700,
        "cli": 1400,
        "doctor": 410,
        "formats": 3745,
        "inference": 890,
        "live": 560,
        "store": 960,
        "sync": 2060,
        "trust": 320,
        "update": 1180,
    },
    "packager": {
        ".": 1705,
        "bundles": 645,
        "fleet": 3390,
        "cli": 3135,
        "models": 1605,
        "provenance": 550,
        "report": 2365,
        "rounds": 525,
    },
    "trainer": {
        ".": 1290,
        "data": 495,
        "export": 1730,
        "folder": 570,
        "method": 1590,
        "networks": 245,
        "recipe": 565,
        "rounds": 2420,
        "starter": 25,
    },
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


def floor_lines(package: Path) -> dict[str, int]:
    """Return the code lines of each floor of a package."""
    counts: Counter[str] = Counter()
    for path in sorted(package.rglob("*.py")):
        inside = path.relative_to(package).parts
        counts[inside[0] if len(inside) > 1 else "."] += code_lines(path)
    return dict(counts)


def problems(lines: Mapping[str, Mapping[str, int]]) -> Iterator[str]:
    """Yield each floor that is over its budget, or has none."""
    for package, floors in lines.items():
        for floor, count in floors.items():
            budget = BUDGETS[package].get(floor)
            if budget is None:
                yield f"{package}/{floor} has no budget: give it one in {__file__}"
            elif count > budget:
                yield (
                    f"{package}/{floor} has {count} code lines, {budget} are allowed: "
                    "take some out, or raise the budget and say why"
                )


def table(
    packages: Mapping[str, int], lines: Mapping[str, Mapping[str, int]]
) -> Iterator[str]:
    """Yield the report as lines."""
    for package, count in packages.items():
        yield f"{package:<16}{count:>6}"
        for floor, inside in lines.get(package, {}).items():
            yield f"  {floor:<14}{inside:>6}  of {BUDGETS[package].get(floor, 0)}"


@click.command(cls=Command, context_settings=CONTEXT)
@click.option("--check", is_flag=True, help="Exit 1 if a floor is over its budget.")
@json_option
def main(*, check: bool, as_json: bool) -> None:
    """Count code lines per package and per floor."""
    packages = {
        package: sum(map(code_lines, (CHECKOUT / package).rglob("*.py")))
        for package in PACKAGES
    }
    lines = {package: floor_lines(CHECKOUT / package) for package in BUDGETS}
    record = {"packages": packages, "floors": lines}
    emit(record, as_json=as_json, text="\n".join(table(packages, lines)))
    found = list(problems(lines)) if check else []
    for problem in found:
        say(f"error: {problem}")
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
