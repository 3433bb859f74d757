# SPDX-License-Identifier: Apache-2.0
"""Provenance in public formats: what a release is, signed, for anybody's tools."""

from packager.provenance.check import Part, check_provenance
from packager.provenance.facts import Facts, read_facts
from packager.provenance.write import Paths, write_provenance

__all__ = [
    "Facts",
    "Part",
    "Paths",
    "check_provenance",
    "read_facts",
    "write_provenance",
]
