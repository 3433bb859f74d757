# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from edge_runtime.errors import ConfigError
from edge_runtime.formats.weights import write_weights
from trainer.export.init_recipe import make_init_spec
from trainer.export.tensors import weights_of
from trainer.networks.models import build_model, option_problems
from trainer.recipe.schema import ModelConfig

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
        ("resnet34", (3, 64, 64), {}, 21_272_768),
        ("mobilenet_v2", (3, 64, 64), {}, 2_202_560),
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
        "[model] depth is unknown; resnet56 has width"
    ]
    assert not list(option_problems("mobilenet_v2", {"width_mult": 0.5}))


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_loads_pretrained_weights_except_another_number_of_classes(tmp_path, suffix):
    torch.manual_seed(1)
    source = build("small_cnn", (1, 8, 8), classes=7, channels=[4], hidden=8)
    path = tmp_path / f"pretrained.{suffix}"
    if suffix == "pt":
        torch.save(source.state_dict(), path)
    else:
        write_weights(weights_of(source), path)
    options = {"channels": [4], "hidden": 8}
    config = ModelConfig(name="small_cnn", weights=str(path), options=options)
    model = build_model(config, (1, 8, 8), 10)
    expected = source.state_dict()
    found = model.state_dict()
    assert len(found["7.weight"]) == 10
    for name in found.keys() - {"7.weight", "7.bias"}:
        if "num_batches" not in name:
            assert torch.equal(found[name], expected[name])


def test_pretrained_weights_travel_with_the_bundle(tmp_path):
    torch.manual_seed(1)
    path = tmp_path / "pretrained.pt"
    torch.save(build("mlp", (1, 8, 8), hidden=[16]).state_dict(), path)
    config = ModelConfig(name="mlp", weights=str(path), options={"hidden": [16]})
    recipe = make_init_spec(lambda: build_model(config, (1, 8, 8), 10), seed=0)
    assert {init.kind for init in recipe.tensors.values()} == {"file"}


def test_refuses_pretrained_weights_of_another_network(tmp_path):
    path = tmp_path / "other.pt"
    torch.save(build("mlp", (1, 8, 8), hidden=[9]).state_dict(), path)
    config = ModelConfig(name="mlp", weights=str(path), options={"hidden": [16]})
    with pytest.raises(ConfigError, match=r"of another network.*1\.weight"):
        build_model(config, (1, 8, 8), 10)
    path.write_bytes(b"no pickle")
    with pytest.raises(ConfigError, match="no state dict of tensors"):
        build_model(config, (1, 8, 8), 10)


def test_refuses_options_that_torchvision_does_not_take():
    with pytest.raises(ConfigError, match="cannot build mobilenet_v2"):
        build("mobilenet_v2", (3, 32, 32), depth=3)
