# SPDX-License-Identifier: Apache-2.0
"""What is shown of pip: large downloads with their size, and that it installs."""

from tools.install import shown

PIP = """Collecting torch==2.13.0
  Downloading torch-2.13.0-cp311-cp311-linux_x86_64.whl.metadata (29 kB)
  Downloading https://host/some/torch-2.13.0-cp311-cp311-linux_x86_64.whl (532.0 MB)
Progress 0 of 1000
Progress 504 of 1000
Progress 505 of 1000
Progress 1000 of 1000
  Downloading click-8.5.1-py3-none-any.whl (108 kB)
Progress 0 of 7
Installing collected packages: torch, click
Successfully installed torch-2.13.0 click-8.5.1
""".splitlines()
NAME = "downloading torch-2.13.0-cp311-cp311-linux_x86_64.whl (532.0 MB)"


def test_a_log_has_a_line_for_each_large_file():
    assert list(shown(PIP, live=False)) == [
        f"  {NAME}\n",
        "  installing 2 packages ...\n",
    ]


def test_a_terminal_sees_the_download_grow():
    pieces = list(shown(PIP, live=True))
    assert [piece.partition(NAME)[2] for piece in pieces[:3]] == [
        "  0 %",
        "  50 %",
        "  100 %\n",
    ]
    assert len(pieces) == 4
