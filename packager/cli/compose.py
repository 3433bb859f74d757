# SPDX-License-Identifier: Apache-2.0
"""``dpu-patch compose``: several patches become one."""

from contextlib import ExitStack
from pathlib import Path

import click

from edge_runtime.commandline import emit, json_option, say
from edge_runtime.parameters import NewFile
from packager.cli.files import read_parent
from packager.cli.options import MODEL, PATCH, insist_apart, level_option


@click.command()
@click.argument("paths", metavar="PATCH...", nargs=-1, required=True, type=PATCH)
@click.option(
    "--base",
    required=True,
    type=MODEL,
    metavar="FILE",
    help="The weights that the first patch leads from.",
)
@click.option(
    "-o",
    "--output",
    required=True,
    metavar="FILE",
    type=NewFile(),
    help="Where to write the patch.",
)
@level_option
@click.option(
    "--force", is_flag=True, help="Replace a file that is signed, or no patch."
)
@json_option
def compose(
    paths: tuple[Path, ...],
    *,
    base: Path,
    output: Path,
    level: int,
    force: bool,
    as_json: bool,
) -> None:
    """Make one patch of several that follow each other.

    Its result equals applying them in order. It is unsigned, with round and release
    counter of the last one.
    """
    from edge_runtime.errors import prefix_errors
    from edge_runtime.formats.patch import open_patch
    from packager.compose import compose_patches
    from packager.ledger import publish_file
    from packager.report.words import percent, spaced

    with ExitStack() as stack:
        opened = []
        for path in paths:
            with prefix_errors(path):
                opened.append(stack.enter_context(open_patch(path)))
        model = read_parent(base, opened[0].header)
        insist_apart(output, *model.files)  # a patch, --force or not, may be replaced
        weights = model.weights
        total = sum(patch.size for patch in opened)
        named = list(zip(map(str, paths), opened, strict=True))
        packed = compose_patches(weights, named, level=level)
        target = opened[-1].header.target
    record = {
        "patches": [str(path) for path in paths],
        "sum_bytes": total,
        "parent": weights.fingerprint,
        "target": target,
        "path": str(output) if packed else None,
        "bytes": len(packed.data) if packed else 0,
        "counter": packed.header.counter if packed else None,
        "written": packed is not None,
    }
    if packed is None:
        text = f"they lead back to {base}: nothing to send, nothing written"
        emit(record, as_json=as_json, text=text)
        return
    record["written"] = publish_file(packed.data, output, force=force, say=say)
    size = len(packed.data)
    text = (
        f"{len(paths)} patches  {weights.fingerprint[:12]}  →  {target[:12]}, release "
        f"counter {packed.header.counter}\n"
        f"  together {spaced(total):>11} bytes\n"
        f"  composed {spaced(size):>11} bytes   {percent(size, total)} of the sum "
        "(lower is better)\n"
        f"  checked  applied to {base}, result identical; unsigned"
    )
    emit(record, as_json=as_json, text=text)
    if record["written"]:
        say(f"wrote {output}")
