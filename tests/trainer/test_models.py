import pytest
import torch

from edge_runtime.errors import ConfigError
from trainer.config import ModelConfig
from trainer.models import build_model, option_problems

torch.set_num_threads(1)


def build(name, shape, classes=10, **options):
    return build_model(ModelConfig(name=name, options=options), shape, classes)


def weights(model):
    return sum(p.numel() for p in model.parameters() if p.dim() > 1)


@pytest.mark.parametrize(
    ("name", "shape", "options", "count"),
    [
        ("mlp", (1, 28, 28), {}, 668_672),
        ("mlp", (1, 8, 8), {"hidden": [256, 256], "batch_norm": True}, 84_480),
        ("small_cnn", (1, 8, 8), {"channels": [4, 8], "hidden": 16}, 996),
        ("vgg", (3, 32, 32), {}, 14_022_016),
        ("resnet56", (3, 32, 32), {}, 848_944),
        ("squeezenet1_1", (3, 64, 64), {}, 724_672),
    ],
)
def test_builds_the_network_with_its_number_of_weights(name, shape, options, count):
    model = build(name, shape, **options).eval()
    assert weights(model) == count
    assert model(torch.zeros(2, *shape)).shape == (2, 10)


def test_the_papers_mlp_has_no_batchnorm_unless_asked():
    kinds = [type(m).__name__ for m in build("mlp", (1, 8, 8)).modules()]
    assert "BatchNorm1d" not in kinds
    kinds = [
        type(m).__name__ for m in build("mlp", (1, 8, 8), batch_norm=True).modules()
    ]
    assert kinds.count("BatchNorm1d") == 2


def test_names_what_is_wrong_with_options():
    assert list(option_problems("mlp", {"hidden": (8,)}))  # TOML gives lists
    assert list(option_problems("mlp", {"batch_norm": 1}))
    assert list(option_problems("resnet56", {"depth": 3})) == [
        "[model] depth is unknown; resnet56 has no options"
    ]
    assert not list(option_problems("mobilenet_v2", {"width_mult": 0.5}))


def test_refuses_options_that_torchvision_does_not_take():
    with pytest.raises(ConfigError, match="cannot build mobilenet_v2"):
        build("mobilenet_v2", (3, 32, 32), depth=3)
