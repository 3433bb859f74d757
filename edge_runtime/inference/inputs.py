# SPDX-License-Identifier: Apache-2.0
"""Samples from outside: images, arrays, JSON, folders of these, standard input."""

import io
import struct
import sys
import zlib
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_runtime.errors import MALFORMED, ContractError, how_to_install
from edge_runtime.formats.arrays import read_npy, read_npz
from edge_runtime.formats.contract import Contract, InputSpec
from edge_runtime.formats.json_file import parse_record
from edge_runtime.limits import limits
from edge_runtime.reading import read_bounded

ARRAYS = {".npy", ".npz"}
JSONS = {".json", ".jsonl"}
# What their names say; a file of another kind is not opened, whatever its name says:
# Pillow starts other programs for some.
FORMATS = ("BMP", "GIF", "JPEG", "PPM", "PNG", "TIFF", "WEBP")
IMAGES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tiff", ".webp"}
# What Pillow raises for damaged images, as each format has a parser of its own.
_DAMAGED = (*MALFORMED, OSError, EOFError, SyntaxError, struct.error, zlib.error)
_FILL_16_BITS = {("I", "PNG"), ("I", "PPM")}
STDIN = Path("-")

Values = dict[str, NDArray[Any]]  # by the names of the inputs
Sample = tuple[str, Values]  # where it comes from, and its raw values


def read_calls(paths: Iterable[Path], contract: Contract) -> Iterator[Sample]:
    """Yield what each file, or each line of JSON, holds for all inputs.

    Args:
        paths: ``.npz`` files with an array for each input, by its name; ``.jsonl``
            files with an object for each call, by the names of the inputs; for models
            of one input also image files, ``.npy`` files, and ``.npz`` files with an
            array named ``inputs``. Folders, whose files of these kinds follow in the
            order of their names; ``-`` for one file on standard input.
        contract: What the model takes. Images become 8-bit values of its channels and
            size. A batch axis that is missing is added.

    Raises:
        OSError: A file cannot be read.
        ContractError: A file is of no such kind, or does not fit; the message names it.
    """
    for file, data in _files(paths):
        for name, raw in _raw(file, data, contract):
            try:
                given = contract.by_name(raw)
                values = {s.name: s.batch(given[s.name]) for s in contract.inputs}
            except ContractError as err:
                raise ContractError(f"{name}: {err}") from err
            yield name, values


def rows_of(contract: Contract) -> list[str]:
    """Return the inputs that have samples on their first axis.

    Of a model that takes a fixed number of samples it is the only input.
    """
    if contract.by_rows and len(contract.inputs) == 1:
        return [spec.name for spec in contract.inputs if spec.shape]
    return [spec.name for spec in contract.inputs if spec.has_batch]


def in_samples(calls: Iterable[Sample], contract: Contract) -> Iterator[Sample]:
    """Yield each sample of calls, without the batch axis.

    An input that has none goes with every sample.

    Raises:
        ContractError: Inputs of one call have different numbers of samples.
    """
    for name, values in calls:
        rows = rows_of(contract)
        counts = {input_name: len(values[input_name]) for input_name in rows}
        if len(set(counts.values())) > 1:
            found = ", ".join(f"{name!r} {count}" for name, count in counts.items())
            raise ContractError(
                f"{name}: each input needs as many samples as the others, found {found}"
            )
        empty = [input_name for input_name in rows if not values[input_name].size]
        if empty and any(counts.values()):
            shape = list(values[empty[0]].shape)
            raise ContractError(
                f"{name}: the samples of {empty[0]!r} hold no values (shape {shape}); "
                "expected one or more in each"
            )
        for row in range(next(iter(counts.values()), 1)):
            yield name, {n: v[row] if n in counts else v for n, v in values.items()}


def in_batches(
    samples: Iterable[Sample], size: int, contract: Contract
) -> Iterator[tuple[list[str], Values]]:
    """Yield names and stacked values of at most ``size`` samples at a time.

    Raises:
        ContractError: Samples of different shapes meet in one batch, or different
            values of an input that has no batch axis.
    """
    batched = rows_of(contract)
    rest = iter(samples)
    while batch := list(islice(rest, size)):
        names, values = zip(*batch, strict=True)
        found = {}
        for name in values[0]:
            arrays = [sample[name] for sample in values]
            alike = all(array.shape == arrays[0].shape for array in arrays)
            if name not in batched:
                alike = alike and all(np.array_equal(a, arrays[0]) for a in arrays)
            if not alike:
                what = "shape" if name in batched else f"{name!r}, which has no batch"
                raise ContractError(
                    f"{names[0]} to {names[-1]} differ in {what}; use --batch 1"
                )
            found[name] = np.stack(arrays) if name in batched else arrays[0]
        yield list(names), found


def _raw(name: str, data: bytes, contract: Contract) -> Iterator[tuple[str, Any]]:
    """Yield the raw values in a file, by input or for the only one."""
    suffix = Path(name).suffix.lower()
    if data[:4] == b"PK\x03\x04" or suffix == ".npz":
        yield name, _arrays(name, data, contract)
    elif suffix == ".json":
        yield name, _json(name, data)
    elif suffix == ".jsonl" or data.lstrip()[:1] == b"{":
        for number, line in enumerate(data.splitlines(), 1):
            if line.strip():
                title = f"{name}, line {number}"
                yield title, _json(title, line)
    else:
        yield name, _only(name, data, contract)


def _json(name: str, data: bytes) -> dict[str, NDArray[Any]]:
    found = parse_record(data, "input_bytes", name, ContractError).values
    arrays = {}
    for key, value in found.items():
        try:
            arrays[key] = np.asarray(value)
        except (ValueError, OverflowError) as err:  # rows of different lengths
            raise ContractError(
                f"{name}: {key!r} is no array of numbers: {err}"
            ) from err
    return arrays


def _only(name: str, data: bytes, contract: Contract) -> NDArray[Any]:
    """Return the values of the only input."""
    if len(contract.inputs) != 1:
        names = ", ".join(spec.name for spec in contract.inputs)
        raise ContractError(
            f"{name} holds one array, the model takes {names}: give a .npz file with "
            "an array for each, or lines of JSON with an object of them"
        )
    if data[:6] == b"\x93NUMPY" or Path(name).suffix.lower() in ARRAYS:
        return _array(name, data)
    return _image(name, data, contract.inputs[0])


def _files(paths: Iterable[Path]) -> Iterator[tuple[str, bytes]]:
    for path in paths:
        if path == STDIN:
            most = limits().input_bytes
            data = sys.stdin.buffer.read(most + 1)
            if problem := limits().problem("input_bytes", len(data), "standard input"):
                raise ContractError(problem)
            yield "-", data
        elif path.is_dir():
            known = ARRAYS | IMAGES | JSONS
            files = (p for p in path.iterdir() if p.suffix.lower() in known)
            # Sticks that were in a Mac have a hidden ._NAME beside each file.
            found = sorted(p for p in files if not p.name.startswith("."))
            if not found:
                raise ContractError(f"{path} holds no image, .npy, .npz or .jsonl file")
            yield from ((str(file), _read(file)) for file in found)
        else:
            yield str(path), _read(path)


def _read(path: Path) -> bytes:
    return read_bounded(path, "input_bytes", str(path), ContractError)


def _array(name: str, data: bytes) -> NDArray[Any]:
    try:
        return read_npy(data)
    except ContractError as err:
        raise ContractError(
            f"{name} is no .npy file, nor an .npz file with an array 'inputs' ({err})"
        ) from err


def _arrays(name: str, data: bytes, contract: Contract) -> Any:
    """Return the arrays of a ``.npz`` file by input, or the one for the only input."""
    names = [spec.name for spec in contract.inputs]
    try:
        found = read_npz(data, {*names, "inputs"}, limit="input_bytes")
    except ContractError as err:
        raise ContractError(
            f"{name} is no .npy file, nor an .npz file with an array 'inputs' ({err})"
        ) from err
    if len(names) == 1 and names[0] not in found and "inputs" in found:
        return found["inputs"]
    if len(names) == 1 and names[0] not in found:
        raise ContractError(
            f"{name} is no .npy file, nor an .npz file with an array 'inputs' or "
            f"{names[0]!r}"
        )
    if "inputs" not in names:
        found.pop("inputs", None)
    if set(found) != set(names):
        raise ContractError(
            f"{name} is an .npz file that holds {', '.join(found) or 'none'} of "
            f"{', '.join(names)}; expected an array for each input, by its name"
        )
    return found


def _image(name: str, data: bytes, spec: InputSpec) -> NDArray[Any]:
    """Return an image as 8-bit values of shape (C, H, W), or as the input has it.

    Of 16 bits the upper 8 are taken. It is turned as its camera says, made grey or RGB
    by the number of channels, scaled until it covers the model's height and width, and
    cropped around its centre.
    """
    sizes = spec.shape[1:] if len(spec.shape) == 4 else (0, 0, 0)
    channels, height, width = (
        sizes if spec.channel_axis == 1 else (*sizes[-1:], *sizes[:-1])
    )
    if channels not in (1, 3) or not height or not width:
        raise ContractError(
            f"{name}: images go into a model of shape [batch, 1 or 3, height, width], "
            "or [batch, height, width, 1 or 3] with the layout NHWC; this one takes "
            f"{list(spec.shape)}, {spec.layout}: give it .npy files"
        )
    try:
        from PIL import Image, ImageOps
    except ImportError as err:
        raise ContractError(
            f"reading {name} needs Pillow; {how_to_install('image')}"
        ) from err
    mode = "L" if channels == 1 else "RGB"
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as file:
            size = file.width * file.height  # stated: nothing is unpacked yet
            if problem := limits().problem("image_pixels", size, "it"):
                raise ValueError(problem)
            # In place, and no copy of what is right already: pixels are much memory.
            ImageOps.exif_transpose(file, in_place=True)
            image = _of_8_bits(name, file)
            image = image if image.mode == mode else image.convert(mode)
            image.load()
    except (*_DAMAGED, Image.DecompressionBombError) as err:
        # Pillow names the buffer that it was given, not the file.
        reason = str(err).partition(" <")[0]
        raise ContractError(
            f"{name} is no image that can be read ({reason}); inputs are images, .npy, "
            ".npz, .json or .jsonl"
        ) from err
    fitted = ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR)
    pixels = np.asarray(fitted).reshape(height, width, channels)
    return pixels.transpose(2, 0, 1) if spec.channel_axis == 1 else pixels


def _of_8_bits(name: str, image: Any) -> Any:
    """Return an image with 8 bits a channel; Pillow itself would cut off the rest."""
    from PIL import Image

    # Pillow's mode I has 32 bits; these formats fill 16 of them.
    if image.mode.startswith("I;16") or (image.mode, image.format) in _FILL_16_BITS:
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode.startswith(("I", "F")):
        raise ContractError(
            f"{name} has pixels of 32 bits (Pillow's mode {image.mode}), and does not "
            "say which of them is white; expected 8 or 16 bits: give it as a .npy file"
        )
    return image
