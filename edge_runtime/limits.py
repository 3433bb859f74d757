# SPDX-License-Identifier: Apache-2.0
"""What readers accept at most: one table, looked at before the work is done.

A file of a few kilobytes must not take the machine, whoever sent it. The limits are far
above what real models need. Whoever needs more says so in the environment::

    DPU_LIMITS="tensors=300000 weight_header_bytes=200MB" dpu-edge apply ...

CRASH.md has the same table, and what else is looked at.
"""

import os
from dataclasses import dataclass, fields
from functools import cache

from edge_runtime.errors import LimitError
from edge_runtime.sizes import SIZE_WORDS, is_size, parse_size

VARIABLE = "DPU_LIMITS"
KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


@dataclass(frozen=True, slots=True)
class Limits:
    """What a reader accepts.

    Attributes:
        json_values: Values in any JSON: commas and opening brackets.
        patch_bytes: A patch file. It may not have more than twice the bytes of the
            weight file that it is for either, and 4 MiB.
        signature_bytes: A signature block.
        key_bytes: A key file.
        key_list_bytes: A key list; TUF's own client takes as much.
        head_bytes: The head of a channel, with a way for each patch that it offers.
        tuf_bytes: TUF metadata but roots and timestamps, which are less.
        list_keys: Keys in a key list, or that a bundle carries: the signature block of
            a patch has room for all.
        list_signatures: Signatures of a key list.
        weight_header_bytes: The header of a weight file, as safetensors has it.
        tensors: Tensors of a weight file, an init recipe, or that a patch counts.
        checkpoint_header_bytes: The header of a file that is packed or compared.
        checkpoint_tensors: Tensors of such a file.
        metadata_values: What its header holds beside the usual of its tensors.
        shown_tensors: Tensors of files that are compared one by one.
        recipe_bytes: An init recipe (``init.json``).
        contract_bytes: A contract (``contract.json``).
        bundle_members: Members of a bundle.
        bundle_index_bytes: What a bundle says of its members, at its end.
        manifest_bytes: The manifest of a bundle.
        member_bytes: A member of a bundle.
        golden_bytes: Golden inputs, unpacked (``golden.npz``).
        trial_bytes: Memory of a trial beside 8 times the weight file; less where the
            system has less to give.
        input_bytes: A file of inputs for ``infer``, packed and unpacked.
        image_pixels: An image for ``infer``.
        proof_bytes: A device's proof.
        report_bytes: A device's report.
        state_bytes: ``state.json``.
        agent_bytes: ``agent.json``.
        agent_files: Patch files that an agent looks at, the newest ones.
        live_bytes: What a predictor tells in ``live/``.
        live_files: Files in ``live/`` that are looked at.
        record_bytes: A round's record (``round.json``).
        run_bytes: The name of a run (``run.json``).
        ledger_bytes: A ledger of releases (``releases.jsonl``).
    """

    json_values: int = 1_000_000
    patch_bytes: int = GIB
    signature_bytes: int = 4 * KIB
    key_bytes: int = 64 * KIB
    key_list_bytes: int = 512_000
    head_bytes: int = 64 * KIB
    tuf_bytes: int = MIB
    list_keys: int = 32
    list_signatures: int = 128
    weight_header_bytes: int = 100_000_000
    tensors: int = 100_000
    checkpoint_header_bytes: int = 16 * MIB
    checkpoint_tensors: int = 40_000
    metadata_values: int = 20_000
    shown_tensors: int = 10_000
    recipe_bytes: int = 64 * MIB
    contract_bytes: int = 4 * MIB
    bundle_members: int = 4096
    bundle_index_bytes: int = MIB
    manifest_bytes: int = MIB
    member_bytes: int = 2 * GIB
    golden_bytes: int = 64 * MIB
    trial_bytes: int = 2 * GIB
    input_bytes: int = GIB
    image_pixels: int = 16_000_000
    proof_bytes: int = 16 * MIB
    report_bytes: int = 64 * KIB
    state_bytes: int = MIB
    agent_bytes: int = MIB
    agent_files: int = 2000
    live_bytes: int = MIB
    live_files: int = 4096
    record_bytes: int = 16 * MIB
    run_bytes: int = 4 * KIB
    ledger_bytes: int = 64 * MIB

    def problem(self, name: str, found: int, what: str) -> str:
        """Say that something is over a limit; nothing if it is not.

        Args:
            name: Of the limit.
            found: How much there is, or how much there is at least.
            what: What has it, for example ``the patch``.
        """
        limit: int = getattr(self, name)
        if found <= limit:
            return ""
        unit = "bytes" if name.endswith("_bytes") else name.rpartition("_")[2]
        return (
            f"{what} has {found} {unit}, {limit} are accepted; if it is meant to be "
            f"so large, set {VARIABLE}={name}={found}"
        )


@cache
def limits() -> Limits:
    """Return the limits of this process: the defaults, and what the environment says.

    Raises:
        LimitError: The environment names no limit, or no number.
    """
    known = {field.name for field in fields(Limits)}
    found: dict[str, int] = {}
    for text in os.environ.get(VARIABLE, "").replace(",", " ").split():
        name, _, number = text.partition("=")
        value = _number(name, number)
        if name not in known or value is None:
            raise LimitError(
                f"{VARIABLE} holds {text[:80]!r}, expected NAME=NUMBER; the names are "
                f"{', '.join(sorted(known))}; bytes are {SIZE_WORDS}"
            )
        found[name] = value
    return Limits(**found)


def _number(name: str, text: str) -> int | None:
    if text.isascii() and text.isdecimal():
        return int(text[:19])  # more digits than any file has bytes
    return parse_size(text) if name.endswith("_bytes") and is_size(text) else None
