# SPDX-License-Identifier: Apache-2.0
import xml.etree.ElementTree as ET

import numpy as np
import pytest
import torch

from tools.paper import adapters
from tools.paper.eight_bits import eight_bits
from tools.paper.reproduce import NETWORKS, RECIPES, main
from tools.paper.reproduction import (
    BASELINES,
    METHODS,
    PAPER,
    SMALLER,
    compare,
    frontier,
    monotone,
    plot,
    read_results,
    table,
    write_result,
)
from trainer.config import as_dict, load_config
from trainer.export.tensors import weights_of
from trainer.networks.models import build_model
from trainer.rounds.methods import check_names


def rows(*tried):
    """Rounds of (validation, test) accuracies, per cent."""
    return [
        {"round": n, "val_tried": val, "test_tried": test, "bytes": 100}
        for n, (val, test) in enumerate(tried)
    ]


RESULTS = {
    ("fu", 1): rows((80, 81), (90, 91), (85, 80)),
    ("dpu", 1): rows((70, 71), (92, 90)),
    ("rpu", 2): rows((1, 1)),
}


def test_post_processing_holds_a_round_that_validates_worse():
    found = monotone(rows((80, 81), (90, 91), (85, 95), (88, 70), (90, 89)))
    assert found == [81, 91, 91, 91, 89]


def test_methods_are_held_against_full_updating_over_common_rounds():
    full, dpu = compare(RESULTS)  # seed 2 has no full updating
    assert (full.method, full.rounds, full.raw) == ("fu", 3, 0)
    assert (dpu.method, dpu.rounds, dpu.raw) == ("dpu", 2, pytest.approx(-5.5))
    assert dpu.mean_bytes == 100


def test_raw_means_count_what_was_discarded():
    results = RESULTS | {("dpu", 1): rows((70, 81), (92, 91), (93, 91))}
    dpu = compare(results)[1]
    assert dpu.raw == pytest.approx(11 / 3)
    assert dpu.monotone == pytest.approx(0)


def test_points_of_equal_rounds_leave_out_runs_that_have_fewer():
    results = RESULTS | {("gcpu", 1): rows((70, 71), (92, 90), (95, 91))}
    assert [point["name"] for point in frontier(results)] == ["dpu", "gcpu"]
    (point,) = frontier(results, rounds=3)
    assert (point["name"], point["points"]) == ("gcpu", pytest.approx(-11 / 3))
    _, two = frontier(results, rounds=2)
    assert two["points"] == pytest.approx(-5.5)


def test_the_table_shows_the_papers_figure():
    assert "| -0.17 |" in "\n".join(table("mnist_mlp", compare(RESULTS)))


def test_a_smaller_protocol_says_that_it_is_one():
    lines = list(table("cifar10_vgg_small", compare(RESULTS)))
    assert lines[0].startswith("Smaller than the paper's protocol: VGG of a quarter")
    assert "(not comparable)" in lines[2]
    assert "| +0.33 |" in lines[-1]


def test_the_plot_has_one_line_a_run_beside_full_updating_of_its_seed():
    root = ET.fromstring(plot(RESULTS))
    full, dpu = root.findall("{*}polyline")  # seed 2 has no full updating
    heights = [point.split(",")[1] for point in full.get("points").split()]
    assert len(set(heights)) == 1 and len(heights) == 3
    lower, higher = (point.split(",")[1] for point in dpu.get("points").split())
    assert float(lower) > float(heights[0]) > 0  # 10 points behind, downwards
    assert float(higher) > float(heights[0])
    assert float(higher) < float(lower)


def test_the_papers_own_chain_is_a_row_beside_dpu(tmp_path):
    for name in ("fu", "dpu", "dpu_paper_chain"):
        about = {"method": name.partition("_")[0], "seeds": {"run": 1}}
        write_result(tmp_path / f"{name}_seed1.json", about, RESULTS["dpu", 1])
    found = compare(read_results(tmp_path))
    assert [row.method for row in found] == ["fu", "dpu", "dpu_paper_chain"]
    assert list(table("mnist_mlp", found))[-1].count("-0.17") == 1


def test_its_recipe_differs_in_the_chain_alone():
    dpu, own = (
        as_dict(load_config(RECIPES / "mnist_mlp" / f"{name}.toml", name="same"))
        for name in ("dpu", "dpu_paper_chain")
    )
    own["update"].pop("chain"), dpu["update"].pop("chain")
    assert own == dpu


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"seeds": {"run": 1}, "rou', "not valid JSON"),
        ('{"seeds": {"run": 1}}', "rounds"),
        ('{"seeds": {"run": 1}, "rounds": [{"round": 0}]}', "val_tried"),
    ],
)
def test_a_damaged_result_is_named_with_what_is_wrong(tmp_path, command, text, problem):
    path = tmp_path / "mnist_mlp" / "dpu_seed1.json"
    path.parent.mkdir()
    path.write_text(text)
    code, _, err = command(main, "report", "--results", tmp_path)
    assert (code, str(path) in err, problem in err) == (2, True, True)


def test_results_come_back_as_they_were_written(tmp_path):
    path = tmp_path / "dpu_seed1.json"
    about = {"method": "dpu", "seeds": {"run": 1}}
    write_result(path, about, RESULTS["dpu", 1])
    assert read_results(tmp_path) == {("dpu", 1): RESULTS["dpu", 1]}


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("method", METHODS)
def test_each_row_of_the_papers_table_has_a_valid_recipe(network, method):
    config = load_config(RECIPES / network / f"{method}.toml")
    assert config.update.method == method
    assert config.data.validation_from == "test"
    column = SMALLER[network][0] if network in SMALLER else network
    assert method == "fu" or method in PAPER[column]


@pytest.mark.parametrize("network", ["mnist_mlp", *SMALLER])
@pytest.mark.parametrize("method", BASELINES)
def test_each_baseline_has_a_recipe_that_names_tensors_of_its_network(network, method):
    config = load_config(RECIPES / network / f"{method}.toml")
    shape = (1, 28, 28) if network == "mnist_mlp" else (3, 16, 16)
    check_names(build_model(config.model, shape, 10), config.update)
    full = as_dict(load_config(RECIPES / network / "fu.toml"))
    assert as_dict(config)["train"] == full["train"]
    assert as_dict(config)["data"] == full["data"]


def test_an_adapter_adds_nothing_at_first_and_few_weights():
    torch.manual_seed(0)
    model = adapters.vgg((3, 16, 16), 10, width=8, rank=2).eval()
    inputs = torch.randn(4, 3, 16, 16)
    with_adapters = model(inputs)
    for module in model.modules():
        if isinstance(module, adapters.Adapted):
            module.up.get_parameter("weight").detach().zero_()
    torch.testing.assert_close(model(inputs), with_adapters, rtol=0, atol=0)
    named = dict(model.named_parameters())
    own = sum(p.numel() for n, p in named.items() if ".down." in n or ".up." in n)
    assert 0 < own < 0.15 * sum(p.numel() for p in named.values())


def test_in_eight_bits_a_layer_has_at_most_255_values_and_init_keeps_its_own():
    torch.manual_seed(0)
    init = weights_of(torch.nn.Linear(200, 100))
    layer = torch.nn.Linear(200, 100)
    with torch.no_grad():
        layer.weight[:50].copy_(torch.from_numpy(np.array(init["weight"][:50])))
    found = eight_bits(weights_of(layer), init)
    new = found["weight"][50:]
    assert len(np.unique(new)) <= 255
    np.testing.assert_array_equal(found["weight"][:50], init["weight"][:50])
    step = np.abs(weights_of(layer)["weight"]).max() / 127
    assert np.abs(new - weights_of(layer)["weight"][50:]).max() <= step
