# SPDX-License-Identifier: Apache-2.0
"""API pages from the sources alone: ``.. public:: edge_runtime``, and names below it.

The public names of a package are those that its ``__init__`` imports for type
checkers. A name is followed to its module, and that is read, not imported: the site
builds without torch, and without anything else that the packages need.
"""

import ast
from functools import cache
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.ext.napoleon import Config, GoogleDocstring
from sphinx.util.docutils import SphinxDirective

ROOT = Path(__file__).parent.parent
OURS = ("edge_runtime.", "packager.", "trainer.")
_NAPOLEON = Config(napoleon_use_rtype=False, napoleon_use_ivar=True)

Definition = ast.ClassDef | ast.FunctionDef


@cache
def _parsed(module: str) -> ast.Module:
    path = ROOT.joinpath(*module.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(path.read_text())


@cache
def public_names(package: str) -> dict[str, str]:
    """Return the public names of a package, and the module that each comes from."""
    found = {}
    for node in _parsed(package).body:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            for line in node.body:
                if isinstance(line, ast.ImportFrom) and line.module:
                    found |= {alias.name: line.module for alias in line.names}
    return found


def home(package: str, name: str) -> str:
    """Return the module that a name comes from."""
    return public_names(package).get(name, package)


def definition(package: str, name: str) -> Definition:
    """Return the class or function behind a public name, or of a module's own."""
    module = home(package, name)
    for node in _parsed(module).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return _with_inherited(module, node)
        if isinstance(node, Definition) and node.name == name:
            return node
    raise LookupError(f"{module} defines no class or function {name}")


def _with_inherited(module: str, node: ast.ClassDef) -> ast.ClassDef:
    """Return a class with the methods that it inherits from other modules of ours."""
    names = {member.name for member in node.body if isinstance(member, Definition)}
    whole = ast.ClassDef(**dict(ast.iter_fields(node)) | {"body": list(node.body)})
    for line in _parsed(module).body:
        if isinstance(line, ast.ImportFrom) and (line.module or "").startswith(OURS):
            for base in _parsed(str(line.module)).body:
                if isinstance(base, ast.ClassDef) and base.name in _bases(node):
                    whole.body += [
                        member
                        for member in base.body
                        if isinstance(member, Definition) and member.name not in names
                    ]
    return whole


def _bases(node: ast.ClassDef) -> set[str]:
    return {ast.unparse(base) for base in node.bases}


def _classes(module: str) -> list[str]:
    return [n.name for n in _parsed(module).body if isinstance(n, ast.ClassDef)]


def describe(kind: str, name: str, node: Definition, indent: str = "") -> list[str]:
    """Return reStructuredText for a class, with its methods, or a function."""
    options = [f":{mark}:" for mark in _marks(node)]
    if kind == "property" and isinstance(node, ast.FunctionDef) and node.returns:
        options.append(f":type: {_annotation(node.returns)}")
    text = [f".. py:{kind}:: {name}{_signature(node, kind)}", *_inside(options), ""]
    docstring = ast.get_docstring(node) or ""
    text += _inside(str(GoogleDocstring(docstring, _NAPOLEON, what=kind)).splitlines())
    if isinstance(node, ast.ClassDef):
        for member in node.body:
            if isinstance(member, ast.FunctionDef) and not member.name.startswith("_"):
                is_property = "property" in _decorators(member)
                kind_of = "property" if is_property else "method"
                text += ["", *describe(kind_of, member.name, member, "   ")]
    return [indent + line if line else "" for line in [*text, ""]]


def _inside(lines: list[str]) -> list[str]:
    return ["   " + line if line else "" for line in lines]


def _decorators(node: Definition) -> set[str]:
    return {ast.unparse(decorator).split("(")[0] for decorator in node.decorator_list}


def _marks(node: Definition) -> list[str]:
    marks = {"classmethod": "classmethod", "staticmethod": "staticmethod"}
    return [marks[name] for name in sorted(_decorators(node)) if name in marks]


def _signature(node: Definition, kind: str) -> str:
    if isinstance(node, ast.ClassDef):
        for member in node.body:
            if isinstance(member, ast.FunctionDef) and member.name == "__init__":
                return _arguments(member, method=True)
        return (
            f"({', '.join(_fields(node))})" if "dataclass" in _decorators(node) else ""
        )
    returns = _annotation(node.returns)
    if kind == "property":
        return ""  # its type is an option
    method = kind == "method" and "staticmethod" not in _decorators(node)
    return f"{_arguments(node, method=method)} -> {returns}"


def _annotation(node: ast.expr | None) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value  # quoted, as it is not defined yet where it stands
    return ast.unparse(node) if node else "None"


def _arguments(node: ast.FunctionDef, *, method: bool) -> str:
    arguments = ast.parse(f"def f({ast.unparse(node.args)}): pass").body[0].args  # type: ignore[attr-defined]
    if method:
        (arguments.posonlyargs or arguments.args).pop(0)
    return f"({ast.unparse(arguments)})"


def _fields(node: ast.ClassDef) -> list[str]:
    """Return what a dataclass is made from."""
    return [
        ast.unparse(field.target)
        + f": {ast.unparse(field.annotation)}"
        + (f" = {ast.unparse(field.value)}" if field.value else "")
        for field in node.body
        if isinstance(field, ast.AnnAssign)
        and not ast.unparse(field.target).startswith("_")
    ]


class Public(SphinxDirective):
    """Describe public names of a package, one a line; without any, a whole module."""

    required_arguments = 1  # the package
    has_content = True

    def run(self) -> list[nodes.Node]:
        """Return the descriptions, in the order in which the names are written."""
        package = self.arguments[0]
        found: list[nodes.Node] = []
        for name in list(filter(None, self.content)) or _classes(package):
            source = home(package, name).replace(".", "/") + ".py"
            self.env.note_dependency(str(ROOT / source))
            node = definition(package, name)
            kind = "class" if isinstance(node, ast.ClassDef) else "function"
            text = "\n".join(describe(kind, f"{package}.{name}", node))
            found += self.parse_text_to_nodes(text)
        return found


def setup(app: Sphinx) -> dict[str, Any]:
    """Add the directive."""
    app.add_directive("public", Public)
    return {"parallel_read_safe": True}
