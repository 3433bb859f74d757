# SPDX-License-Identifier: Apache-2.0
"""Every source file says its licence."""

from tools.licence_line import LINE, lacking, sources
from tools.wheels import CHECKOUT


def test_every_source_file_begins_with_its_licence():
    assert len(sources(CHECKOUT)) > 200
    assert lacking(CHECKOUT) == []


def test_a_file_without_it_is_found(tmp_path):
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "good.py").write_text(LINE + "x = 1\n")
    bad = tmp_path / "tools" / "bad.py"
    bad.write_text("x = 1\n" + LINE)
    assert lacking(tmp_path) == [bad]
