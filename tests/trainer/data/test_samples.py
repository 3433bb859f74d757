# SPDX-License-Identifier: Apache-2.0
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from edge_runtime.errors import ConfigError
from edge_runtime.formats.contract import InputSpec
from trainer.data.samples import (
    DataSource,
    LazyInputs,
    Samples,
    batch_sizes,
    batches,
    generator,
    split_source,
)
from trainer.data.sources import load_source
from trainer.recipe.schema import DataConfig

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def digits():
    return load_source(DataConfig(set="digits", initial=200, growth=150))


def split_of(source, *, seed=0, rounds=7, **options):
    options = {"initial": 200, "growth": 150, "validation": 250} | options
    config = DataConfig(set="digits", **options)
    return split_source(source, config, seed=seed, rounds=rounds)


def contents(samples):
    return {
        (x.numpy().tobytes(), int(y))
        for x, y in zip(samples.inputs, samples.labels, strict=True)
    }


def test_digits_are_raw_bytes_with_a_scale(digits):
    assert digits.input_shape == (1, 8, 8)
    assert digits.train.inputs.dtype == torch.uint8
    assert (len(digits.train), len(digits.test)) == (1397, 400)
    assert int(digits.train.inputs.max()) * digits.scale == 1.0
    assert digits.classes == tuple("0123456789")


def test_normalised_digits_have_mean_0_and_deviation_1(digits):
    inputs = digits.prepared(digits.train).inputs
    assert inputs.dtype == torch.float32
    assert abs(inputs.mean()) < 0.01
    assert abs(inputs.std() - 1) < 0.01


def test_normalisation_is_the_contract_in_float32(digits):
    raw = digits.train.inputs[:9]
    scale, mean, std = map(np.float32, (digits.scale, digits.mean[0], digits.std[0]))
    expected = (raw.numpy().astype(np.float32) * scale - mean) / std
    assert np.array_equal(digits.normalise(raw).numpy(), expected)


RAW = ["?", "i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f2", "f4", "f8"]


@pytest.mark.parametrize("statistics", [((), ()), ((17.0,) * 3, (0.3, 0.7, 5.0))])
@pytest.mark.parametrize("scale", [1.0, 1e-7])
@pytest.mark.parametrize("dtype", RAW)
def test_networks_train_on_the_bits_that_devices_compute(
    digits, monkeypatch, dtype, scale, statistics
):
    """Of every raw type, also where its values are far from 0 and near each other."""
    monkeypatch.setattr("trainer.data.samples.DOUBLES_AT_ONCE", 50)
    kind = np.dtype(dtype)
    most = 1 if kind.kind == "b" else 1 << min(60, 8 * kind.itemsize - 2)
    steps = np.arange(7 * 3 * 2 * 2).reshape(7, 3, 2, 2)
    raw = np.abs(most - steps).astype(dtype)
    source = replace(digits, scale=scale, mean=statistics[0], std=statistics[1])
    spec = InputSpec("x", "float32", (None, 3, 2, 2), scale, *statistics)
    found = source.normalise(torch.from_numpy(raw))
    assert found.dtype == torch.float32
    assert found.numpy().tobytes() == spec.prepare(raw).tobytes()


def test_without_normalisation_inputs_are_only_scaled():
    config = DataConfig(set="digits", initial=2, growth=0, normalise=False)
    source = load_source(config)
    assert float(source.normalise(source.train.inputs).max()) == 1.0
    assert float(source.normalise(source.train.inputs).min()) == 0.0


def test_data_too_large_for_memory_is_normalised_in_batches(digits, monkeypatch):
    whole = digits.prepared(digits.test)
    monkeypatch.setattr("trainer.data.samples.MAX_NORMALISED_BYTES", 0)
    lazy = digits.prepared(digits.test)
    assert lazy.inputs.dtype == torch.uint8
    (first, _), *_ = batches(lazy[:50], 20)
    assert torch.equal(first, whole.inputs[:20])


def test_the_split_is_disjoint_and_leaves_the_test_set_alone(digits):
    split = split_of(digits)
    assert (len(split.pool), len(split.validation)) == (1147, 250)
    assert torch.equal(split.test.inputs, digits.test.inputs)
    assert not contents(split.pool) & contents(split.validation)


def test_the_split_depends_on_the_seed_alone(digits):
    assert torch.equal(split_of(digits).pool.inputs, split_of(digits).pool.inputs)
    other = split_of(digits, seed=1)
    assert not torch.equal(split_of(digits).pool.labels, other.pool.labels)


def test_the_pool_grows_every_round(digits):
    split = split_of(digits)
    assert [split.size_at(n) for n in (0, 1, 6)] == [200, 350, 1100]


def test_the_papers_protocol_takes_validation_from_the_test_set(digits):
    split = split_of(digits, validation_from="test", validation=100)
    assert len(split.pool) == len(digits.train)
    assert (len(split.validation), len(split.test)) == (100, 300)
    assert not contents(split.test) & contents(split.validation)


def test_refuses_more_rounds_than_there_are_samples(digits):
    with pytest.raises(ConfigError) as caught:
        split_of(digits, rounds=9)
    (problem,) = caught.value.problems
    assert problem == (
        "9 rounds need 1650 training samples, those for validation included, digits "
        "has 1397; set run.rounds = 7, or data.initial = 169, data.growth = 126, "
        "data.validation = 211"
    )


@pytest.mark.parametrize("found", [3, 4, 10, 100, 399])
@pytest.mark.parametrize("half", ["train", "test"])
def test_what_a_small_data_set_is_told_to_set_fits_it(digits, half, found):
    small = replace(digits, train=digits.train[:found], test=digits.test[:found])
    asked = {"validation": 1000, "initial": 1000, "growth": 1000}
    with pytest.raises(ConfigError) as caught:
        split_of(small, rounds=5, validation_from=half, **asked)
    told = re.findall(r"data\.(\w+) = (\d+)", str(caught.value.problems))
    assert {key for key, _ in told} == asked.keys()
    fitting = {key: int(size) for key, size in told}
    split = split_of(small, rounds=5, validation_from=half, **fitting)
    assert split.size_at(4) <= len(split.pool)


def test_a_data_set_without_test_samples_is_refused_as_that(digits):
    with pytest.raises(ConfigError) as caught:
        split_of(replace(digits, test=digits.test[:0]))
    (problem,) = caught.value.problems
    assert problem == "expected at least one test sample, digits has none"


def test_batches_follow_the_order_and_cover_it_once(digits):
    samples = digits.prepared(digits.test)
    order = torch.from_numpy(generator(0, "order", 0, 0).permutation(400))
    found = list(batches(samples, 150, order))
    assert [len(labels) for _, labels in found] == [150, 150, 100]
    assert torch.equal(
        torch.cat([labels for _, labels in found]), samples.labels[order]
    )


def test_no_training_batch_has_a_single_sample(digits):
    samples = digits.prepared(digits.test)[:9]
    sizes = [len(labels) for _, labels in batches(samples, 4, torch.arange(9))]
    assert sizes == [4, 4]
    assert [len(labels) for _, labels in batches(samples, 4)] == [4, 4, 1]


def test_streams_of_different_purposes_differ():
    draws = {
        tuple(generator(0, *p).integers(0, 9, 8)) for p in [("a", 1), ("a", 2), ("b",)]
    }
    assert len(draws) == 3
    assert np.array_equal(generator(3, "a").random(4), generator(3, "a").random(4))


def colour_source(images):
    samples = Samples(images, torch.zeros(len(images), dtype=torch.long))
    means, stds = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    return DataSource(samples, samples, ("a",), 1 / 255, means, stds)


def test_augmentation_crops_and_flips_each_image_on_its_own():
    images = torch.randint(0, 256, (40, 3, 8, 6), dtype=torch.uint8)
    source = colour_source(images)
    inputs = source.normalise(images)
    found = source.augmentation("crop_flip", generator(0, "augment"), [len(inputs)])(
        inputs
    )
    padded = torch.nn.functional.pad(images, (4, 4, 4, 4))  # raw zeros
    crops = {
        source.normalise(p)[0].numpy().tobytes(): (dy, dx, flipped)
        for dy in range(9)
        for dx in range(9)
        for flipped in (False, True)
        for image in padded
        for p in [image[None, :, dy : dy + 8, dx : dx + 6]]
        for p in [p.flip(3) if flipped else p]
    }
    where = [crops.get(image.numpy().tobytes()) for image in found]
    assert None not in where
    assert len(set(where)) > 20


def test_a_crop_is_the_same_without_the_flip():
    images = torch.randint(0, 256, (20, 3, 8, 6), dtype=torch.uint8)
    source = colour_source(images)
    found = source.augmentation("crop", generator(0, "a"), [len(images)])(
        source.normalise(images)
    )
    padded = torch.nn.functional.pad(images, (4, 4, 4, 4))
    for image, canvas in zip(found, padded, strict=True):
        crops = [
            source.normalise(canvas[None, :, dy : dy + 8, dx : dx + 6])[0]
            for dy in range(9)
            for dx in range(9)
        ]
        assert any(torch.equal(image, crop) for crop in crops)


def test_digits_are_shifted_by_a_fourteenth_of_their_side_and_never_turned():
    images = torch.zeros(300, 1, 28, 28, dtype=torch.uint8)
    images[:, :, 13, 14] = 200
    source = DataSource(
        *(Samples(images, torch.zeros(300)),) * 2, ("a",), 1 / 255, (0.1,), (0.3,)
    )
    found = source.augmentation("shift", generator(0, "a"), [len(images)])(
        source.normalise(images)
    )
    where = {tuple(int(i) for i in im[0].flatten().argmax()[None]) for im in found}
    expected = {(28 * (13 + y) + 14 + x,) for y in range(-2, 3) for x in range(-2, 3)}
    assert where == expected
    assert len(found.unique()) == 2  # the dot, and the background everywhere else


def write_images(folder, count, size=(10, 8)):
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            colour = (i * 20, 100, 200 if name == "dog" else 0)
            Image.new("RGB", size, colour).save(folder / name / f"{i}.png")


def folder_config(root, **options):
    return DataConfig(set="folder", root=str(root), initial=2, growth=0, **options)


@pytest.mark.parametrize("held_out", ["test", "val"])
def test_reads_an_image_folder(tmp_path, held_out):
    write_images(tmp_path / "train", 3)
    write_images(tmp_path / held_out, 1)
    source = load_source(folder_config(tmp_path))
    assert source.train.inputs.shape == (6, 3, 8, 10)
    assert source.classes == ("cat", "dog")
    assert source.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert len(source.test) == 2
    assert source.mean[1] == round(100 / 255, 4)


def test_brings_images_of_different_shapes_to_one_size(tmp_path):
    write_images(tmp_path / "train", 1)
    write_images(tmp_path / "test", 1, size=(20, 30))
    Image.new("RGB", (20, 9)).save(tmp_path / "train" / "cat" / "odd.png")
    with pytest.raises(ConfigError, match=r"set data\.size"):
        load_source(folder_config(tmp_path))
    source = load_source(folder_config(tmp_path, size=6))
    assert source.input_shape == (3, 6, 6)


def test_a_folder_too_large_for_memory_gives_the_same_batches(tmp_path):
    write_images(tmp_path / "train", 6)
    write_images(tmp_path / "val", 2)
    whole = load_source(folder_config(tmp_path))
    source = load_source(folder_config(tmp_path, memory="1KB"))
    assert isinstance(source.train.inputs, LazyInputs)
    assert (source.mean, source.std) == (whole.mean, whole.std)
    order = torch.from_numpy(generator(0, "order").permutation(12))
    found, expected = [
        batches(
            s.prepared(s.train),
            5,
            order,
            s.augmentation("crop_flip", generator(0, "augment"), batch_sizes(12, 5)),
        )
        for s in (source, whole)
    ]
    for (x, y), (a, b) in zip(found, expected, strict=True):
        assert torch.equal(x, a)
        assert torch.equal(y, b)


def test_an_odd_image_is_found_when_it_is_read(tmp_path):
    write_images(tmp_path / "train", 2)
    write_images(tmp_path / "val", 1)
    Image.new("RGB", (20, 9)).save(tmp_path / "train" / "dog" / "odd.png")
    with pytest.raises(ConfigError, match=r"sample 4 has shape \(3, 9, 20\)"):
        load_source(folder_config(tmp_path, memory="1KB"))


def test_says_how_an_image_folder_should_look(tmp_path):
    with pytest.raises(ConfigError, match=r"expected train/CLASS"):
        load_source(folder_config(tmp_path))
