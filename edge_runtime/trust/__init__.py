# SPDX-License-Identifier: Apache-2.0
"""Key lists: whose releases a device takes, replaced and revoked without a visit."""

from edge_runtime.trust.keylist import KeyList, Listed
from edge_runtime.trust.root import (
    Root,
    SignedRoot,
    is_list,
    list_number,
    load_list,
    read_root,
    tuf_key,
    tuf_key_id,
)
from edge_runtime.trust.rules import first_root, next_root

__all__ = [
    "KeyList",
    "Listed",
    "Root",
    "SignedRoot",
    "first_root",
    "is_list",
    "list_number",
    "load_list",
    "next_root",
    "read_root",
    "tuf_key",
    "tuf_key_id",
]
