# SPDX-License-Identifier: Apache-2.0
"""Samples from files: what a camera or a script leaves becomes what the model takes."""

import io
import sys

import numpy as np
import pytest
from PIL import Image

from edge_runtime.errors import ContractError
from edge_runtime.formats.contract import InputSpec
from edge_runtime.inference.inputs import STDIN, in_batches, read_samples

RGB = InputSpec("x", "float32", (None, 3, 4, 6))
GREY = InputSpec("x", "float32", (None, 1, 4, 6))


def photo(path, width=6, height=4, mode="RGB", **options):
    """An image whose left half is dark and whose right half is bright."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, width // 2 :] = (250, 150, 50)
    Image.fromarray(pixels).convert(mode).save(path, **options)
    return path


def read(spec, *paths):
    return list(read_samples(paths, spec))


def test_an_image_becomes_channels_first_8_bit_values(tmp_path):
    ((name, values),) = read(RGB, photo(tmp_path / "a.png"))
    assert (name, values.dtype) == (str(tmp_path / "a.png"), np.uint8)
    assert values[:, 0, 0].tolist() == [0, 0, 0]
    assert values[:, 0, 5].tolist() == [250, 150, 50]


def test_an_image_stays_channels_last_where_the_model_takes_it_so(tmp_path):
    last = InputSpec("x", "float32", (None, 4, 6, 3), layout="NHWC")
    path = photo(tmp_path / "a.png")
    ((_, values),) = read(last, path)
    ((_, first),) = read(RGB, path)
    assert np.array_equal(values, first.transpose(1, 2, 0))


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P"])
@pytest.mark.parametrize("spec", [RGB, GREY])
def test_every_image_gets_the_models_number_of_channels(tmp_path, mode, spec):
    ((_, values),) = read(spec, photo(tmp_path / "a.png", mode=mode))
    assert values.shape == spec.shape[1:]
    assert values[:, :, 5].min() > 40


def test_an_image_of_another_size_is_scaled_and_cropped_around_its_centre(tmp_path):
    # Twice as large and far too wide: what remains is the middle.
    ((_, values),) = read(RGB, photo(tmp_path / "a.png", width=60, height=8))
    assert values.shape == (3, 4, 6)
    assert values[0, :, :2].max() == 0
    assert values[0, :, 4:].min() == 250


def test_an_image_is_turned_as_its_camera_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    ((_, values),) = read(RGB, photo(tmp_path / "a.png", exif=exif))
    assert values[0, 0, 0] == 250
    assert values[0, 0, 5] == 0


def test_an_image_that_takes_much_memory_is_not_unpacked(tmp_path):
    # 4 bytes a pixel, twice while it is turned or changes its colours: 130 MB at most.
    Image.new("1", (4001, 4000)).save(tmp_path / "large.png")
    with pytest.raises(ContractError, match="DPU_LIMITS=image_pixels=16004000"):
        read(RGB, tmp_path / "large.png")


def test_arrays_hold_one_sample_or_a_batch(tmp_path):
    np.save(tmp_path / "one.npy", np.ones((3, 4, 6)))
    np.savez(tmp_path / "two.npz", inputs=np.zeros((2, 3, 4, 6)))
    found = read(RGB, tmp_path / "one.npy", tmp_path / "two.npz")
    assert [values.mean() for _, values in found] == [1, 0, 0]
    assert [values.shape for _, values in found] == [(3, 4, 6)] * 3


def test_a_folder_gives_its_images_and_arrays_by_name(tmp_path):
    photo(tmp_path / "b.JPG")
    photo(tmp_path / "a.png")
    np.save(tmp_path / "c.npy", np.ones((2, 3, 4, 6)))
    (tmp_path / "notes.txt").write_text("no sample")
    names = [name.rsplit("/", 1)[1] for name, _ in read(RGB, tmp_path)]
    assert names == ["a.png", "b.JPG", "c.npy", "c.npy"]


@pytest.mark.parametrize("kind", ["array", "image"])
def test_standard_input_is_one_file_of_either_kind(tmp_path, monkeypatch, kind):
    if kind == "array":
        np.save(tmp_path / "file", np.full((3, 4, 6), 9, np.uint8))
        data = (tmp_path / "file.npy").read_bytes()
    else:
        data = photo(tmp_path / "file.png").read_bytes()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    ((name, values),) = read(RGB, STDIN)
    assert (name, values.shape) == ("-", (3, 4, 6))


def test_without_pillow_one_sentence_says_what_to_install(tmp_path, monkeypatch):
    path = photo(tmp_path / "a.png")
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ContractError) as refusal:
        read(RGB, path)
    assert str(refusal.value) == (
        f"reading {path} needs Pillow: pip install 'dpu-edge[image]'"
    )


def test_arrays_need_no_pillow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    np.save(tmp_path / "one.npy", np.ones((3, 4, 6)))
    assert len(read(RGB, tmp_path / "one.npy")) == 1


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.npy", b"text", r"a\.npy is no \.npy file"),
        ("a.npz", b"PK\3\4", r"a\.npz is no \.npy file"),
        ("a.png", b"\x89PNG", r"a\.png is no image that can be read"),
        ("a.txt", b"text", r"a\.txt is no image .*identify image file\)$"),
    ],
)
def test_what_is_no_sample_is_refused_by_name(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ContractError, match=message):
        read(RGB, tmp_path / name)


def test_what_does_not_fit_is_refused_with_the_name_of_the_file(tmp_path):
    np.save(tmp_path / "a.npy", np.ones((3, 4, 5)))
    np.savez(tmp_path / "b.npz", other=np.ones((3, 4, 6)))
    with pytest.raises(ContractError, match=r"a\.npy: input 'x' takes numbers"):
        read(RGB, tmp_path / "a.npy")
    with pytest.raises(ContractError, match=r"b\.npz is no .*'inputs'"):
        read(RGB, tmp_path / "b.npz")


def test_images_go_into_models_of_images_only(tmp_path):
    flat = InputSpec("x", "float32", (None, 12))
    for spec in (flat, InputSpec("x", "float32", (None, 5, 4, 6))):
        with pytest.raises(ContractError, match=r"give it \.npy files"):
            read(spec, photo(tmp_path / "a.png"))


def test_a_folder_without_samples_is_refused(tmp_path):
    with pytest.raises(ContractError, match="holds no image"):
        read(RGB, tmp_path)


def test_batches_keep_the_order_and_end_with_the_rest(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(5 * 72).reshape(5, 3, 4, 6))
    batches = list(in_batches(read_samples([tmp_path / "a.npy"], RGB), 2))
    assert [len(names) for names, _ in batches] == [2, 2, 1]
    joined = np.concatenate([values for _, values in batches])
    assert np.array_equal(joined, np.load(tmp_path / "a.npy"))


def test_samples_of_different_shapes_do_not_share_a_batch(tmp_path):
    free = InputSpec("x", "float32", (None, None))
    np.save(tmp_path / "a.npy", np.ones(3))
    np.save(tmp_path / "b.npy", np.ones(4))
    with pytest.raises(ContractError, match="--batch 1"):
        list(in_batches(read_samples([tmp_path], free), 2))
    assert len(list(in_batches(read_samples([tmp_path], free), 1))) == 2
