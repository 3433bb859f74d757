# SPDX-License-Identifier: Apache-2.0
"""Hold the floors: no import runs upward, none runs in a circle.

    python -m tools.layers --check

A sub-package is a floor. Each package lists its floors from the ground up; a module may
import from its own floor and from those below. Imports inside of functions count too:
they are late to save time, not to go around the order. Imports for type checkers alone
do not count.
"""

import ast
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import click

from edge_runtime.commandline import CONTEXT, Command, emit, json_option
from tools.ending import end
from tools.wheels import CHECKOUT

# From the ground up: sub-packages, and modules that stand beside them.
FLOORS: dict[str, tuple[str, ...]] = {
    "edge_runtime": (
        *(
            "errors",
            "sizes",
            "text",
            "times",
            "streams",
            "limits",
            "reading",
            "files",
            "formats",
            "trust",
            "store",
        ),
        *(
            "inference",
            "live",
            "update",
            "agent",
            "sync",
            "doctor",
            "exit_codes",
            "parameters",
            "commandline",
            "cli",
            "__main__",
        ),
    ),
    "packager": (
        *("zip_file", "mapped", "keys", "signing", "key_lists", "rounds"),
        *("read_proof", "check_proof", "check_proofs", "diff", "moved"),
        *("packed_file", "release", "release_counter", "build", "size", "ledger"),
        *("compose", "models", "bundles", "provenance", "report", "fleet", "cli"),
        "__main__",
    ),
    "trainer": (
        *(
            "trees",
            "parallel",
            "method",
            "export",
            "recipe",
            "data",
            "networks",
            "config",
        ),
        *(
            "folder",
            "publish",
            "rounds",
            "callbacks",
            "board",
            "progress",
            "starter",
            "advice_text",
            "recipe_argument",
            "cli",
            "__main__",
        ),
    ),
}
# What each package may know of the others. tools and tests may know everything.
BELOW = {
    "edge_runtime": {"edge_runtime"},
    "packager": {"edge_runtime", "packager"},
    "trainer": {"edge_runtime", "trainer"},
}


def modules(root: Path, package: str) -> dict[str, Path]:
    """Return the modules of a package: dotted name -> file. Faces are left out."""
    return {
        ".".join(path.relative_to(root).with_suffix("").parts): path
        for path in sorted((root / package).rglob("*.py"))
        if path.name != "__init__.py"
    }


def imports(path: Path) -> Iterator[str]:
    """Yield every dotted name that a module imports, early or late.

    ``from a.b import c`` yields ``a.b.c``: whoever asks looks for its longest beginning
    that is a module.
    """
    waiting: list[ast.AST] = [ast.parse(path.read_text())]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            waiting += node.orelse
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        waiting += ast.iter_child_nodes(node)


def edges(root: Path) -> dict[str, set[str]]:
    """Return what each module imports of this project's modules."""
    known: dict[str, Path] = {}
    for package in FLOORS:
        known |= modules(root, package)
    return {
        name: {found for text in imports(path) if (found := _module(text, known))}
        for name, path in known.items()
    }


def _module(text: str, known: Mapping[str, Path]) -> str | None:
    parts = text.split(".")
    for stop in range(len(parts), 1, -1):
        if (name := ".".join(parts[:stop])) in known:
            return name
    # The face of a package: what it re-exports is not followed.
    return parts[0] if parts[0] in FLOORS else None


def problems(graph: Mapping[str, set[str]]) -> Iterator[str]:
    """Yield each import that breaks the order, each stray module, and a circle."""
    for module, used in sorted(graph.items()):
        package, floor = module.split(".")[:2]
        if floor not in FLOORS[package]:
            yield f"{module} is on no floor: add {floor!r} to FLOORS in {__file__}"
            continue
        for other in sorted(used):
            package_of_other, _, rest = other.partition(".")
            if package_of_other not in BELOW[package]:
                yield f"{module} imports {other}: {package} may not know it"
            elif rest and package_of_other == package:
                height = FLOORS[package].index
                target = rest.split(".")[0]
                if target in FLOORS[package] and height(target) > height(floor):
                    yield f"{module} imports {other}, a floor above its own"
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as err:
        yield "modules import each other in a circle: " + " -> ".join(err.args[1])


@click.command(cls=Command, context_settings=CONTEXT)
@click.option("--check", is_flag=True, help="Exit 1 if an import breaks the order.")
@json_option
def main(*, check: bool, as_json: bool) -> None:
    """Show the floors of each package, and imports that break their order."""
    found = list(problems(edges(CHECKOUT)))
    text = "\n".join(
        f"{package}\n  " + " < ".join(floors) for package, floors in FLOORS.items()
    )
    emit({"floors": FLOORS, "problems": found}, as_json=as_json, text=text)
    end(found, check=check)


if __name__ == "__main__":
    main()
