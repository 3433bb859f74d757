# SPDX-License-Identifier: Apache-2.0
"""What the trainer is measured against: official selection, usual loader and loop."""

from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader

from trainer.data.samples import Samples
from trainer.data.vision import torchvision
from trainer.method.scores import Evidence


def select_as_the_official_code(seen: Evidence, k: int) -> dict[str, Tensor]:
    """Select as the paper's code does: sort each layer, join, sort everything.

    It keeps all of each layer here; theirs cuts at 65 %, which loses weights.
    """
    moved = {n: (seen.current[n] - b) ** 2 for n, b in seen.base.items()}
    gc_sum = sum(part.sum().item() for part in moved.values())
    lc_sum = sum(part.sum().item() for part in seen.loss_drop.values())
    rows = torch.empty(0, 3)  # layer, flat index, score
    for layer, name in enumerate(moved):
        score = 0.5 * moved[name] / gc_sum + 0.5 * seen.loss_drop[name] / lc_sum
        order = torch.argsort(score.view(-1), descending=True)
        added = torch.empty(len(order), 3)
        added[:, 0], added[:, 1] = layer, order
        added[:, 2] = score.view(-1)[order]
        rows = torch.cat((rows, added))
    best = rows[torch.argsort(rows[:, 2], descending=True)[:k]]
    masks = {}
    for layer, (name, base) in enumerate(seen.base.items()):
        mask = torch.zeros(base.numel(), dtype=torch.bool)
        mask[best[best[:, 0] == layer][:, 1].long()] = True
        masks[name] = mask.view(base.shape)
    return masks


def image_loader(samples: Samples, batch: int) -> DataLoader[Any]:
    """Return the usual loader: image by image, through PIL and torchvision."""
    steps = torchvision.transforms
    transform = steps.Compose([steps.ToTensor(), steps.Normalize((0.1307,), (0.3081,))])

    inputs = samples.read()

    class Images:  # as torchvision.datasets.MNIST does it
        def __len__(self) -> int:
            return len(samples)

        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            image = Image.fromarray(inputs[index, 0].numpy())
            made: Tensor = transform(image)
            return made, int(samples.labels[index])

    images: Any = Images()
    return DataLoader(images, batch, shuffle=True, num_workers=0)


def plain_mlp() -> nn.Module:
    """Return the paper's MLP of torch's own layers."""
    return nn.Sequential(
        nn.Flatten(),
        *(nn.Linear(784, 512), nn.ReLU()),
        *(nn.Linear(512, 512), nn.ReLU()),
        nn.Linear(512, 10),
    )


def plain_epoch(
    model: nn.Module, optimizer: torch.optim.Optimizer, loader: DataLoader[Any]
) -> None:
    """Train an epoch as tutorials do."""
    model.train()
    for inputs, labels in loader:
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(inputs), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
