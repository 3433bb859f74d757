# SPDX-License-Identifier: Apache-2.0
"""The whole path on real data: train, pack, apply, verify, infer.

    python -m tools.demo

trains a small network on scikit-learn's handwritten digits, round by round. Each round
is packed, applied to a device's store through the real ``dpu-edge`` code, and then held
against the server: the weight files by SHA-256, the predictions of ONNX Runtime with
torch's. Then three devices follow a channel by themselves (``tools.demo_fleet``). Ends
with 1 if anything differs.
"""

import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edge_runtime.commandline import CONTEXT, Command, emit, json_option, say
from edge_runtime.formats.model_folder import WEIGHTS_NAME, round_name
from edge_runtime.reading import strangers
from tools.demo_fleet import BOARDS, Fetched, Fleet, follow

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from edge_runtime import Device, Weights
    from trainer.folder.record import RoundRecord

KEPT = "demo"
PAGE = "fleet.html"
BUILT = Path(
    "dist"
)  # where the page goes if nothing else is kept; make clean removes it
REMOVED = (
    "rounds, patches and devices are removed; 'make demo KEEP=1' leaves them in "
    f"{KEPT}/,\nwith commands to go on with"
)
TOLERANCE = 1e-4  # of the largest output, as in the contract


@dataclass(frozen=True, slots=True)
class Row:
    """What one round came to.

    Attributes:
        round: Its number.
        outcome: ``updated`` or ``kept_base``; ``re-init`` where it began anew.
        changed: Weights that differ from the round's parent.
        patch_bytes: Size of the patch file, 0 where nothing had to be sent.
        full_bytes: Size of the weight file.
        server_accuracy: Of torch, on the test samples.
        device_accuracy: Of ONNX Runtime on the device's store, on the same.
        difference: Largest difference of their outputs, relative to the largest.
        same_weights: Whether the device's weight file is the server's, by SHA-256.
    """

    round: int
    outcome: str
    changed: int
    patch_bytes: int
    full_bytes: int
    server_accuracy: float
    device_accuracy: float
    difference: float
    same_weights: bool

    @property
    def verified(self) -> bool:
        """Whether weights and predictions are the server's."""
        return self.same_weights and self.difference <= TOLERANCE


class Demo:
    """A server, a device, and the comparison between them."""

    def __init__(self, folder: Path, overrides: Sequence[str] = ()) -> None:
        """Prepare it; ``overrides`` change the recipe, as with ``--set``."""
        from trainer.config import load_config
        from trainer.data.samples import split_source
        from trainer.data.sources import load_source

        self.run = folder / "runs" / "digits"
        self.store = folder / "device"
        self.config = load_config(
            Path(str(files("trainer"))) / "recipes" / "digits.toml", overrides
        )
        source = load_source(self.config.data)
        split = split_source(
            source,
            self.config.data,
            seed=self.config.run.seed,
            rounds=self.config.run.rounds,
        )
        self.source, self.test = source, split.test

    def train(self) -> "list[RoundRecord]":
        """Train all rounds, with a progress bar."""
        from trainer.progress import shown_progress
        from trainer.rounds.schedule import run_rounds

        with shown_progress(quiet=False) as progress:
            return run_rounds(self.config, self.run.parent, progress=progress)

    def deliver(self, record: "RoundRecord") -> Row:
        """Pack a round, update the device with it, compare the two."""
        from edge_runtime import Device
        from packager.build import pack_round, write_file
        from packager.bundles.from_round import write_bundle
        from packager.rounds.folder import read_round

        folder = self.run / round_name(record.round)
        round_ = read_round(folder)
        patch = pack_round(round_)
        if patch is not None:
            write_file(patch.data, folder.with_suffix(".dpu"))
        if record.round == 0:
            bundle = self.run / "round_00.bundle.zip"
            write_bundle(round_, bundle)
            device = Device.install(self.store, bundle)
        else:
            device = Device.open(self.store)
            if patch is not None:
                device.update(folder.with_suffix(".dpu"))
        return self._compare(record, len(patch.data) if patch else 0, device)

    def _compare(self, record: "RoundRecord", sent: int, device: "Device") -> Row:
        import numpy as np

        from edge_runtime import fingerprint_file, read_weights
        from edge_runtime.update.golden import relative_difference

        server = self.run / round_name(record.round) / WEIGHTS_NAME
        found = device.predictor().predict(self.test.read().numpy())
        wanted = self._torch_outputs(read_weights(server))
        labels = self.test.labels.numpy()
        local = self.store / "current" / WEIGHTS_NAME
        return Row(
            round=record.round,
            outcome="re-init" if record.reinitialised else str(record.outcome),
            changed=int(record.metrics["changed"]),
            patch_bytes=sent,
            full_bytes=server.stat().st_size,
            server_accuracy=float(np.mean(wanted.argmax(1) == labels)),
            device_accuracy=float(np.mean(found.argmax(1) == labels)),
            difference=relative_difference(found, wanted),
            same_weights=fingerprint_file(local) == fingerprint_file(server),
        )

    def _torch_outputs(self, weights: "Weights") -> "NDArray[np.float32]":
        import torch

        from trainer.export.tensors import load_weights
        from trainer.networks.models import build_model

        classes = len(self.source.classes)
        model = build_model(self.config.model, self.source.input_shape, classes)
        load_weights(model, weights)
        with torch.inference_mode():
            outputs = model.eval()(self.source.normalise(self.test.read()))
        found: NDArray[np.float32] = outputs.numpy()
        return found


@click.command(cls=Command, context_settings=CONTEXT)
@click.option(
    "--folder",
    type=click.Path(file_okay=False, path_type=Path),
    help="Where to work and leave it all.  [default: a temporary folder, removed]",
)
@click.option("--keep", is_flag=True, help=f"The same as --folder {KEPT}.")
@json_option
def main(folder: Path | None, *, keep: bool, as_json: bool) -> None:
    """Train, pack, apply, verify and infer on real handwritten digits; then a fleet."""
    if keep or folder:
        _run(folder or Path(KEPT), kept=True, as_json=as_json)
        return
    with tempfile.TemporaryDirectory(prefix="dpu-demo-") as made:
        _run(Path(made), kept=False, as_json=as_json)


def _run(folder: Path, *, kept: bool, as_json: bool) -> None:
    if found := strangers(folder):
        raise click.UsageError(f"{folder} holds {found}; remove it, or choose another")
    with _step("loading torch and the digits"):
        demo = Demo(folder)
    with _step(f"training {demo.config.run.rounds} rounds"):
        records = demo.train()
    rows = []
    with _step("packing, applying and comparing each round"):
        for record in records:
            rows.append(demo.deliver(record))
    page = (folder if kept else BUILT) / PAGE
    with _step("three devices follow a channel, one of them misses a round"):
        rounds = [row.round for row in rows if row.patch_bytes]
        fleet = follow(folder, demo.run, rounds, page)
    steps = _next_steps(demo, rows) if kept else [REMOVED]
    text = "\n".join([*table(rows, fleet), "", *steps])
    verified = all(row.verified for row in rows) and fleet.proved == BOARDS
    emit(
        {
            "folder": str(folder) if kept else None,
            "verified": verified,
            "rounds": [asdict(row) | {"verified": row.verified} for row in rows],
            "boards": [{"fetched": taken} for taken in fleet.fetched],
            "proved": fleet.proved,
            "page": str(fleet.page),
        },
        as_json=as_json,
        text=text,
    )
    if not verified:
        say("error: a device does not hold what the server sent")
        sys.exit(1)


@contextmanager
def _step(what: str) -> Iterator[None]:
    say(f"{what} ...")
    start = time.monotonic()
    yield
    say(f"  {time.monotonic() - start:.1f} s")


def table(rows: list[Row], fleet: Fleet) -> Iterator[str]:
    """Yield the rounds as lines of a table, with what each board fetched."""
    yield (
        "round  outcome   changed  patch B  full B  smaller  server  device  verified"
        + "".join(f"  board {n + 1}" for n in range(len(fleet.fetched)))
    )
    for row in rows:
        smaller = f"{row.full_bytes / row.patch_bytes:.0f}x" if row.patch_bytes else "-"
        yield (
            f"{row.round:>5}  {row.outcome:<9}{row.changed:>8}{row.patch_bytes:>9}"
            f"{row.full_bytes:>8}{smaller:>9}{row.server_accuracy:>8.2%}"
            f"{row.device_accuracy:>8.2%}  {'yes' if row.verified else 'NO':<8}"
            + "".join(f"{_board(taken, row.round):>9}" for taken in fleet.fetched)
        )
    updates = [row for row in rows if row.patch_bytes]
    sent = sum(row.patch_bytes for row in updates)
    full = sum(row.full_bytes for row in updates)
    yield (
        f"{len(updates)} updates in {sent} bytes instead of {full}: "
        f"{full / sent:.0f} times smaller"
    )
    if all(row.verified for row in rows):
        yield (
            "verified: the device's weight file has the server's SHA-256, and ONNX "
            f"Runtime answers\nas torch does within {TOLERANCE:g} of the largest output"
        )
    for row in rows:
        if row.outcome == "re-init":
            yield f"round {row.round} began anew from the init weights"
        if row.outcome == "kept_base":
            yield f"round {row.round} got no better than its base: nothing was sent"
    yield from _of_boards(fleet)


def _board(fetched: Fetched, number: int) -> str:
    if number == 0:
        return "bundle"
    sizes = fetched.get(number, [])
    return "away" if sizes is None else str(sum(sizes) or "-")


def _of_boards(fleet: Fleet) -> Iterator[str]:
    """Tell what the boards did, in the words that the table has no room for."""
    count, last = len(fleet.fetched), fleet.fetched[-1]
    yield "the boards followed a channel by themselves; each signature has 76 bytes"
    for number, sizes in last.items():
        if sizes and last.get(number - 1, []) is None:
            what = "one patch" if len(sizes) == 1 else f"{len(sizes)} patches"
            others = fleet.fetched[0]
            both = sum(others[number - 1] or []) + sum(others[number] or [])
            yield (
                f"board {count} missed round {number - 1}, and caught up in round "
                f"{number} by {what} of {sum(sizes)} bytes instead of {both}"
            )
    yield f"{fleet.proved} of {count} boards prove that they run the newest release"
    yield f"the fleet's page: {fleet.page}"


def _next_steps(demo: Demo, rows: list[Row]) -> Iterator[str]:
    store = f"--store {demo.store}"
    sent = max(row.round for row in rows if row.patch_bytes)
    final = demo.run / round_name(sent)
    yield f"rounds and patches   {demo.run}"
    yield f"device               {demo.store}"
    yield ""
    yield "next (in .venv/bin, or after 'source .venv/bin/activate'):"
    yield f"  sha256sum {final}/weights.safetensors {demo.store}/current/*.safetensors"
    yield f"  dpu-edge status {store}"
    yield f"  dpu-edge infer --golden {store}"
    yield f"  dpu-edge rollback {store}"
    yield f"  dpu-patch info {final}.dpu"
    yield f"  dpu-patch report {demo.run} -o report.html"
    folder = demo.store.parent
    yield f"  dpu-fleet show --db {folder}/fleet.db"
    trusted = f"--trust {folder}/release.pub.pem"
    yield f"  dpu-fleet check {folder}/www/{demo.run.name} {trusted}"


if __name__ == "__main__":
    main()
