# SPDX-License-Identifier: Apache-2.0
"""How the site is built: ``make docs``. Nothing is fetched or, of ours, imported."""

import sys
import tomllib
from pathlib import Path

from sphinx.application import Sphinx

sys.path.insert(0, str(Path(__file__).parent))
_ROOT = Path(__file__).parent.parent
_PROJECT = tomllib.loads((_ROOT / "pyproject.toml").read_text())["project"]

project = _PROJECT["name"]
release = version = _PROJECT["version"]
author = "The dpu-edge maintainers"
project_copyright = author
language = "en"

extensions = [
    "myst_parser",
    "public_api",  # beside this file: reads the sources, imports none of them
]
add_module_names = False

myst_heading_anchors = 3
myst_links_external_new_tab = False

html_theme = "furo"
html_title = f"dpu-edge {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_copy_source = False
html_theme_options = {"navigation_with_keys": False}


# Texts that stand beside what they describe, and the pages that include them.
_PAGES = {"FORMAT.md": "format", "CRASH.md": "crash", "TRUST.md": "trust"}


def _link_to_pages(_app: Sphinx, _path: Path, _parent: str, content: list[str]) -> None:
    """Let links between included texts lead to the pages that include them."""
    for name, page in _PAGES.items():
        content[0] = content[0].replace(f"]({name}", f"](../docs/{page}.md")
        # As SECURITY.md names them, from the root.
        content[0] = content[0].replace(f"](edge_runtime/{name}", f"](docs/{page}.md")
    content[0] = content[0].replace("](tools/RESULTS.md", "](docs/results.md")


def setup(app: Sphinx) -> None:
    """Connect what this file does to the build."""
    app.connect("include-read", _link_to_pages)
