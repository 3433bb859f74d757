# SPDX-License-Identifier: Apache-2.0
"""Acting as another user, whom files and folders of ours can be closed to."""

import contextlib
import os


@contextlib.contextmanager
def somebody_else():
    """Act as nobody where this is root; else as this user, for whom modes count."""
    before = os.geteuid()
    if not before:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(before)
