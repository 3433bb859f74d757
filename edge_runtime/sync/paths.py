# SPDX-License-Identifier: Apache-2.0
"""Where the files of a channel lie: a publisher puts them there, devices fetch them."""


def head_path(channel: str) -> str:
    """Return where a channel's head lies."""
    return f"{channel}.head"


def patch_path(sha256: str) -> str:
    """Return where a patch lies."""
    return f"patches/{sha256}.dpu"


def bundle_path(sha256: str) -> str:
    """Return where full weights lie."""
    return f"bundles/{sha256}.zip"


def list_path(number: int) -> str:
    """Return where a key list lies."""
    return f"keys/{number}.root.json"
