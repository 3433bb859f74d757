# SPDX-License-Identifier: Apache-2.0
"""What the emulated device is given: three networks, their bundles and their patches.

    python -m tools.arm64.samples FOLDER digits

``digits`` is the demo's network with all its rounds, ``int8`` a convolutional one that
computes in int8 on the device. ``mobilenet`` is MobileNetV2 for
224x224 images, of a size that people do run on a board of 512 MB; it is hardly trained,
which changes neither memory nor bits. This is a program of its own because it needs
torch, whose memory would hide that of what is measured.
"""

import hashlib
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import click

from edge_runtime.commandline import CONTEXT, Command, say
from edge_runtime.formats.model_folder import WEIGHTS_NAME, round_name
from edge_runtime.reading import strangers
from tools.wheels import CHECKOUT

NAMES = ("digits", "int8", "mobilenet")
GOLDEN = 2  # images of mobilenet: each takes seconds under emulation
RATIO = 0.01


@dataclass(frozen=True, slots=True)
class Sample:
    """A network as it travels.

    Attributes:
        name: One of ``NAMES``.
        run: The run's folder, with its rounds.
        bundle: What installs its first round.
        patches: The later rounds that were sent, in order.
    """

    name: str
    run: Path
    bundle: Path
    patches: tuple[Path, ...]

    def weights(self, patch: Path) -> Path:
        """Return the server's weights that a patch (or the bundle) leads to."""
        return self.run / patch.name.split(".")[0] / WEIGHTS_NAME


def find_sample(folder: Path, name: str) -> Sample:
    """Return the sample of a name, trained and packed where it is not yet.

    What other code has made is made anew: the patch format may have changed.

    Raises:
        click.ClickException: Training or packing failed.
    """
    run = folder / name / "runs" / name
    done, made_by = folder / name / "made_by", _sources()
    if not done.exists() or done.read_text() != made_by:
        say(f"training and packing {name} on this machine ...")
        command = [sys.executable, "-m", "tools.arm64.samples", str(folder), name]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        if ended.returncode:
            raise click.ClickException(f"{name}: {ended.stderr.strip()}")
        done.write_text(made_by)
    bundle, patches = run / "round_00.bundle.zip", sorted(run.glob("round_*.dpu"))
    later = tuple(path for path in patches if path.name != "round_00.dpu")
    return Sample(name, run, bundle, later)


def _sources() -> str:
    """Return a digest of the code that the samples come from."""
    digest = hashlib.sha256()
    for package in ("edge_runtime", "packager", "trainer", "tools"):
        for path in sorted((CHECKOUT / package).rglob("*")):
            if path.suffix in (".py", ".toml"):
                digest.update(path.read_bytes())
    return digest.hexdigest()


def make_int8(run: Path) -> None:
    """Train three rounds of the CNN for digits in int8, and pack them."""
    from packager import build_bundle, pack_round, read_round, write_file
    from trainer import load_config, run_rounds

    config = load_config(
        CHECKOUT / "trainer" / "recipes" / "digits_cnn.toml",
        ['model.deploy="int8"', f'run.name="{run.name}"', "run.rounds=3"],
    )
    for record in run_rounds(config, run.parent):
        round_ = read_round(run / round_name(record.round))
        if record.round == 0:
            write_file(build_bundle(round_).data, run / "round_00.bundle.zip")
        elif packed := pack_round(round_):
            write_file(packed.data, run / f"{round_name(record.round)}.dpu")


def make_mobilenet(run: Path) -> None:
    """Train two short rounds of MobileNetV2 on noise, and pack them."""
    import numpy as np
    import torch

    from packager import build_bundle, pack_round, read_round, write_file
    from trainer import PartialUpdater, make_contract, publish_round, start_run
    from trainer.data.vision import torchvision

    torch.manual_seed(0)
    torch.set_num_threads(1)
    noise = np.random.default_rng(0)
    raw = noise.integers(0, 256, (GOLDEN, 3, 224, 224)).astype(np.uint8)
    labels = torch.arange(GOLDEN)
    model = start_run(
        run,
        lambda: torchvision.models.mobilenet_v2(num_classes=1000),
        contract=make_contract(
            (3, 224, 224), [str(n) for n in range(1000)], scale=1e-2
        ),
        golden_inputs=raw,
        golden_labels=labels.numpy(),
    )

    def step(optimizer: torch.optim.Optimizer) -> None:
        model.train()
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(
            model(torch.from_numpy(raw) * 1e-2), labels
        )
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    for number in range(2):
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        updater = PartialUpdater(model.named_parameters(), ratio=RATIO)
        updater.attach(optimizer)
        step(optimizer)
        updater.select()
        step(optimizer)
        publish_round(run, model, updater.finish())
        round_ = read_round(run / round_name(number))
        if number == 0:
            write_file(build_bundle(round_).data, run / "round_00.bundle.zip")
        packed = pack_round(round_)
        if packed is not None:
            write_file(packed.data, run / f"{round_name(number)}.dpu")


@click.command(cls=Command, context_settings=CONTEXT)
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.argument("name", type=click.Choice(NAMES))
def main(folder: Path, name: str) -> None:
    """Train and pack the network NAME into FOLDER/NAME, from the beginning."""
    found = strangers(folder / name)
    if found and not (folder / name / "runs").is_dir():  # as each sample has
        raise click.UsageError(
            f"{folder / name} holds {found}; remove it, or choose another folder"
        )
    shutil.rmtree(folder / name, ignore_errors=True)  # of a run that was cut off
    if name == "digits":
        from tools.demo import main as demo

        demo.main(["--folder", str(folder / name), "--json"])
    else:
        make = make_int8 if name == "int8" else make_mobilenet
        make(folder / name / "runs" / name)


if __name__ == "__main__":
    main()
