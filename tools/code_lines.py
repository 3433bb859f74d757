"""Count code lines (without comments, docstrings, blank lines); hold the budget.

python -m tools.code_lines --check
"""

import ast
import io
import sys
import tokenize
from pathlib import Path

import click

from edge_runtime.command import CONTEXT, Command, emit, json_option, say

PACKAGES = ("edge_runtime", "packager", "trainer", "tools", "tests")
RUNTIME_BUDGET = 2000  # code lines of edge_runtime, the NumPy backend aside
ASIDE = {"numpy_backend.py"}
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


@click.command(cls=Command, context_settings=CONTEXT)
@click.option("--check", is_flag=True, help="Exit 1 if the runtime is over its budget.")
@json_option
def main(*, check: bool, as_json: bool) -> None:
    """Count code lines per package."""
    counts = {
        package: sum(
            code_lines(path)
            for path in sorted(Path(package).rglob("*.py"))
            if path.name not in ASIDE
        )
        for package in PACKAGES
    }
    text = "\n".join(f"{package:<14}{count:>7}" for package, count in counts.items())
    emit({"code_lines": counts}, as_json=as_json, text=text)
    if check and counts["edge_runtime"] > RUNTIME_BUDGET:
        say(f"edge_runtime is over its budget of {RUNTIME_BUDGET} code lines")
        sys.exit(1)


if __name__ == "__main__":
    main()
