# SPDX-License-Identifier: Apache-2.0
import os

import pytest

from edge_runtime.errors import ContractError
from edge_runtime.reading import open_regular, read_bounded


def test_a_file_is_read_no_further_than_its_limit():
    # Which never ends, and says that it has no bytes.
    with pytest.raises(ContractError, match="contract_bytes"):
        read_bounded("/dev/zero", "contract_bytes", "it", ContractError)


@pytest.mark.parametrize("kind", ["fifo", "link", "folder", "device"])
def test_what_only_has_a_files_name_is_refused_and_not_waited_for(tmp_path, kind):
    path, aim = tmp_path / "x.json", tmp_path / "aim"
    aim.write_text("{}")
    path = {"device": "/dev/zero"}.get(kind, path)
    make = {
        "fifo": os.mkfifo,
        "link": lambda p: p.symlink_to(aim),
        "folder": os.mkdir,
        "device": lambda _: None,
    }
    make[kind](path)
    with pytest.raises(OSError, match=r"no ordinary file|a link|directory"):
        open_regular(path)
