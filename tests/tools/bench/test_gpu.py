# SPDX-License-Identifier: Apache-2.0
"""The script for a lent GPU runs to its end where there is none, on the CPU."""

import json
import math

import pytest
import torch
from click.testing import CliRunner

from tools.bench.gpu import main, train_vgg
from tools.paper import reproduce

MLP = ["--device", "cpu", "--network", "mlp", "--form", "float32"]


def test_it_proves_times_and_says_what_it_left_out():
    result = CliRunner().invoke(main, [*MLP, "--json"])
    assert result.exit_code == 0
    record = json.loads(result.stdout)
    masks, ties, full, sparse = record["figures"]
    assert (masks["ours"], ties["ours"]) == (0, 0)
    assert masks["theirs"] == ties["theirs"] == 3343
    assert full["ratio"] > 0 and sparse["ratio"] > 0  # of a real step
    assert "no rounds of the VGG" in result.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    result = CliRunner().invoke(main, [])
    assert result.exit_code == 2
    assert "torch finds no GPU" in result.stderr


def test_rounds_are_trained_while_there_is_time_for_one_more(tmp_path, monkeypatch):
    monkeypatch.setattr(
        reproduce, "train_rows", lambda *_a, **_k: ((m, 0) for m in ("fu", "dpu"))
    )
    assert train_vgg(tmp_path, tmp_path, "x", -math.inf, []) == 1
    assert train_vgg(tmp_path, tmp_path, "x", math.inf, []) == 2
