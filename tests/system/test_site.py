# SPDX-License-Identifier: Apache-2.0
"""The site builds without a warning, and needs no network to be read."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import edge_runtime
import packager
import trainer

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--quiet"]
    done = subprocess.run(
        [*build, "-d", out / "cache", ROOT / "docs", out / "html"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return out / "html"


def test_no_page_loads_anything_from_elsewhere(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        for tag in re.findall(r"<(?:script|link|img|iframe)\b[^>]*>", page.read_text()):
            assert not re.search(r'(?:src|href)="(?:https?:)?//', tag), (page, tag)
    for sheet in (site / "_static").rglob("*.css"):
        assert not re.search(r"url\([\"']?https?:|@import", sheet.read_text()), sheet


@pytest.mark.parametrize("package", [edge_runtime, packager, trainer])
def test_every_public_name_is_described(site, package):
    page = (site / "api" / f"{package.__name__}.html").read_text()
    described = set(re.findall(rf'id="{package.__name__}\.(\w+)"', page))
    assert described == set(package.__all__) - {"DpuError"}


def test_every_error_is_described(site):
    page = (site / "api" / "edge_runtime.html").read_text()
    assert 'id="edge_runtime.errors.DpuError"' in page
    for name in re.findall(
        r"^class (\w+)", (ROOT / "edge_runtime/errors.py").read_text(), re.M
    ):
        assert f'id="edge_runtime.errors.{name}"' in page


def test_the_formats_own_text_is_in_the_site(site):
    assert "2-byte length L" in (site / "format.html").read_text()
    assert "What survives what" in (site / "crash.html").read_text()
    for name in ("crash", "format", "results", "security", "trust"):
        assert "The text is in" not in (site / f"{name}.html").read_text()
