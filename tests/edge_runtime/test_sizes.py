# SPDX-License-Identifier: Apache-2.0
"""One way to write sizes, whoever asks for one."""

import pytest

from edge_runtime.errors import ConfigError, LimitError
from edge_runtime.limits import limits
from edge_runtime.sizes import SIZE_WORDS, is_size, parse_size
from packager.cli.pack import pack
from trainer.config import load_config


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("700", 700),
        ("700B", 700),
        ("64KB", 64_000),
        ("1MB", 10**6),
        ("1.5MB", 1_500_000),
        ("1GB", 10**9),
        ("1KiB", 1 << 10),
        ("1.5 MiB", 3 << 19),
        ("2 gib", 2 << 30),
        (" 3  kb ", 3000),
        ("0.1KB", 100),
        ("1.0005KB", 1000),
        ("123456789012345678", 123456789012345678),
    ],
)
def test_a_size_is_a_number_and_a_unit(text, size):
    assert parse_size(text) == size


NONE = [
    "",
    "0",
    "0.4B",
    "KB",
    "1TB",
    "1K",
    "-1KB",
    "1e3",
    "1,5MB",
    "200 bananas",
    "٣KB",
]


@pytest.mark.parametrize("text", NONE)
def test_what_is_no_size_is_told_what_is_one(text):
    assert not is_size(text)
    with pytest.raises(ValueError, match="KB, MB, GB") as caught:
        parse_size(text)
    assert str(caught.value) == f"found {text!r}, expected {SIZE_WORDS}"


@pytest.mark.parametrize("text", ["1GB", "1.5mb", "2 GiB"])
def test_options_recipes_and_limits_take_the_same_sizes(
    text, run, command, monkeypatch
):
    runs = run.path.parent
    code, _, err = command(pack, "round_01", "--runs", runs, "--max-size", text)
    assert (code, err.startswith("wrote")) == (0, True)
    config = load_config("trainer/recipes/digits.toml", [f"update.budget={text}"])
    assert parse_size(config.update.budget) == parse_size(text)
    monkeypatch.setenv("DPU_LIMITS", f"proof_bytes={text.replace(' ', '')}")
    limits.cache_clear()
    try:
        assert limits().proof_bytes == parse_size(text)
    finally:
        limits.cache_clear()


def test_options_recipes_and_limits_refuse_in_the_same_words(run, command, monkeypatch):
    code, _, err = command(
        pack, "round_01", "--runs", run.path.parent, "--max-size", "1TB"
    )
    assert (code, SIZE_WORDS in err) == (2, True)
    with pytest.raises(ConfigError) as caught:
        load_config("trainer/recipes/digits.toml", ["update.budget=1TB"])
    assert SIZE_WORDS in str(caught.value)
    monkeypatch.setenv("DPU_LIMITS", "proof_bytes=1TB")
    limits.cache_clear()
    try:
        with pytest.raises(LimitError) as refused:
            limits()
    finally:
        limits.cache_clear()
    assert SIZE_WORDS in str(refused.value)
