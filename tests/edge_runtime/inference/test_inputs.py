# SPDX-License-Identifier: Apache-2.0
"""Samples from files: what a camera or a script leaves becomes what the model takes."""

import io
import json
import sys

import numpy as np
import pytest
from PIL import Image

from edge_runtime.errors import ContractError
from edge_runtime.formats.contract import Contract, InputSpec
from edge_runtime.inference.inputs import (
    STDIN,
    in_batches,
    in_samples,
    read_calls,
)
from edge_runtime.limits import limits

RGB = InputSpec("x", "float32", (None, 3, 4, 6))
GREY = InputSpec("x", "float32", (None, 1, 4, 6))


def photo(path, width=6, height=4, mode="RGB", **options):
    """An image whose left half is dark and whose right half is bright."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, width // 2 :] = (250, 150, 50)
    Image.fromarray(pixels).convert(mode).save(path, **options)
    return path


def read(spec, *paths):
    """Where each sample comes from, and what the only input gets."""
    return [(name, values["x"]) for name, values in samples(Contract((spec,)), *paths)]


def samples(contract, *paths):
    return list(in_samples(read_calls(paths, contract), contract))


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


@pytest.mark.parametrize("name", ["a.png", "a.tiff", "a.pgm"])
def test_an_image_of_16_bits_is_as_bright_as_of_8(tmp_path, name):
    deep = np.array([[0, 255, 256, 32768, 65280, 65535]] * 4, np.uint16)
    Image.fromarray(deep).save(tmp_path / name)
    ((_, values),) = read(GREY, tmp_path / name)
    assert values[0, 0].tolist() == [0, 0, 1, 128, 255, 255]
    ((_, values),) = read(RGB, tmp_path / name)
    assert values[2, 0].tolist() == [0, 0, 1, 128, 255, 255]


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_an_image_that_does_not_say_what_is_white_is_refused(tmp_path, kind):
    Image.fromarray(np.ones((4, 6), kind)).save(tmp_path / "a.tiff")
    with pytest.raises(ContractError, match=r"a\.tiff has pixels of 32 bits.*\.npy"):
        read(GREY, tmp_path / "a.tiff")


@pytest.mark.parametrize("kind", ["ICO", "EPS"])
def test_a_file_of_another_kind_is_not_opened_by_the_name_of_an_image(tmp_path, kind):
    photo(tmp_path / "a.png", 16, 16, format=kind)
    with pytest.raises(ContractError, match="no image that can be read"):
        read(RGB, tmp_path / "a.png")


def test_what_inputs_unpack_to_has_the_limit_of_inputs(tmp_path, monkeypatch):
    np.savez(tmp_path / "a.npz", inputs=np.zeros((90, 3, 4, 6)))
    try:
        limits.cache_clear()
        monkeypatch.setenv("DPU_LIMITS", "golden_bytes=1000")
        assert len(read(RGB, tmp_path / "a.npz")) == 90
        limits.cache_clear()
        np.savez_compressed(tmp_path / "a.npz", inputs=np.zeros((90, 3, 4, 6)))
        monkeypatch.setenv("DPU_LIMITS", "input_bytes=10000")
        with pytest.raises(ContractError, match="DPU_LIMITS=input_bytes="):
            read(RGB, tmp_path / "a.npz")
    finally:
        limits.cache_clear()


def test_samples_without_values_are_refused_however_many_they_are(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((1 << 60, 0), "u1"))
    with pytest.raises(ContractError, match="hold no values"):
        read(InputSpec("x", "uint8", (None, None)), tmp_path / "a.npy")


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
    (tmp_path / "._a.png").write_bytes(b"\0\5\x16\7")  # as a Mac leaves it on a stick
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
    words = str(refusal.value)
    assert words.startswith(f"reading {path} needs Pillow; it is in the extra")
    assert "pip install -e '.[image]'" in words


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
        ("a.txt", b"text", r"no image .*identify image file\); inputs are .*\.npy"),
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


def batches_of(spec, path, size):
    contract = Contract((spec,))
    found = in_batches(samples(contract, path), size, contract)
    return [(names, values["x"]) for names, values in found]


def test_batches_keep_the_order_and_end_with_the_rest(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(5 * 72).reshape(5, 3, 4, 6))
    batches = batches_of(RGB, tmp_path / "a.npy", 2)
    assert [len(names) for names, _ in batches] == [2, 2, 1]
    joined = np.concatenate([values for _, values in batches])
    assert np.array_equal(joined, np.load(tmp_path / "a.npy"))


def test_samples_of_different_shapes_do_not_share_a_batch(tmp_path):
    free = InputSpec("x", "float32", (None, None))
    np.save(tmp_path / "a.npy", np.ones(3))
    np.save(tmp_path / "b.npy", np.ones(4))
    with pytest.raises(ContractError, match="--batch 1"):
        batches_of(free, tmp_path, 2)
    assert len(batches_of(free, tmp_path, 1)) == 2


TWO = Contract(
    (
        InputSpec("x", "float32", (None, 2)),
        InputSpec("mask", "bool", (None, None)),
        InputSpec("heat", "float32", ()),
    )
)
GIVEN = {"x": [[1, 2], [3, 4]], "mask": [[True, False, True]] * 2, "heat": 0.5}


def as_npz(path):
    np.savez(path, **{name: np.asarray(value) for name, value in GIVEN.items()})


def as_lines(path):
    rows = zip(GIVEN["x"], GIVEN["mask"], strict=True)
    lines = [json.dumps({"x": x, "mask": mask, "heat": 0.5}) for x, mask in rows]
    path.write_text("\n".join(lines) + "\n\n")


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("in.npz", as_npz),
        ("in.jsonl", as_lines),
        ("in.json", lambda path: path.write_text(json.dumps(GIVEN, indent=1))),
    ],
)
def test_several_inputs_come_by_name(tmp_path, name, write):
    write(tmp_path / name)
    for path in (tmp_path / name, tmp_path):
        found = [values for _, values in samples(TWO, path)]
        assert [values["x"].tolist() for values in found] == GIVEN["x"]
        assert [values["mask"].tolist() for values in found] == GIVEN["mask"]
        assert [float(values["heat"]) for values in found] == [0.5, 0.5]


def test_lines_of_json_come_from_standard_input_too(tmp_path, monkeypatch):
    as_lines(tmp_path / "in.jsonl")
    stream = io.TextIOWrapper(io.BytesIO((tmp_path / "in.jsonl").read_bytes()))
    monkeypatch.setattr(sys, "stdin", stream)
    assert [name for name, _ in samples(TWO, STDIN)] == ["-, line 1", "-, line 2"]


def test_a_batch_has_one_value_of_what_knows_no_batch(tmp_path):
    as_npz(tmp_path / "a.npz")
    ((_, values),) = in_batches(samples(TWO, tmp_path), 2, TWO)
    assert values["x"].tolist() == GIVEN["x"]
    assert values["heat"] == 0.5
    np.savez(tmp_path / "b.npz", x=[[1, 2]], mask=[[True] * 3], heat=0.25)
    with pytest.raises(ContractError, match="'heat', which has no batch"):
        list(in_batches(samples(TWO, tmp_path), 3, TWO))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.npz", {"x": [[1, 2]]}, "holds x of x, mask, heat; expected an array for"),
        ("a.npz", GIVEN | {"mask": [[True]]}, "as many samples .* 'x' 2, 'mask' 1"),
        ("a.npz", GIVEN | {"mask": [["a"], ["b"]]}, "'mask' takes numbers .* got <U1"),
        ("a.json", {"x": [[1, 2], [3]]}, "'x' is no array of numbers"),
        ("a.json", {"x": [[1, 2]]}, "by name, x, mask, heat; got x"),
        ("a.jsonl", {"x": 1}, "a.jsonl, line 1: .*got x"),
        ("a.npy", [[1, 2]], "one array, the model takes x, mask, heat"),
    ],
)
def test_what_lacks_an_input_is_named(tmp_path, name, content, words):
    path = tmp_path / name
    if path.suffix == ".npz":
        np.savez(path, **{k: np.asarray(v) for k, v in content.items()})
    elif path.suffix == ".npy":
        np.save(path, np.asarray(content))
    else:
        path.write_text(json.dumps(content))
    with pytest.raises(ContractError, match=words):
        samples(TWO, path)
