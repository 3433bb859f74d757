# SPDX-License-Identifier: Apache-2.0
"""Samples from outside: images, arrays, folders of both, standard input."""

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

from edge_runtime.errors import MALFORMED, ContractError
from edge_runtime.files import read_bounded
from edge_runtime.formats.arrays import read_npy, read_npz
from edge_runtime.formats.contract import InputSpec
from edge_runtime.limits import limits

ARRAYS = {".npy", ".npz"}
IMAGES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tiff", ".webp"}
# What Pillow raises for damaged images, as each format has a parser of its own.
_DAMAGED = (*MALFORMED, OSError, EOFError, SyntaxError, struct.error, zlib.error)
STDIN = Path("-")

Sample = tuple[str, NDArray[Any]]  # where it comes from, and its raw values


def read_samples(paths: Iterable[Path], spec: InputSpec) -> Iterator[Sample]:
    """Yield samples one by one, as the contract takes them.

    Args:
        paths: Image files; ``.npy`` files with one sample or a batch; ``.npz`` files
            with such an array named ``inputs``; folders, whose files of these kinds
            follow in the order of their names; ``-`` for one file on standard input.
        spec: What the model takes. Images become 8-bit values of its channels and size.

    Raises:
        OSError: A file cannot be read.
        ContractError: A file is of no such kind, or does not fit; the message names it.
    """
    for name, data in _files(paths):
        is_array = data[:6] == b"\x93NUMPY" or Path(name).suffix.lower() in ARRAYS
        values = _array(name, data) if is_array else _image(name, data, spec)
        try:
            batch = spec.batch(values)
        except ContractError as err:
            raise ContractError(f"{name}: {err}") from err
        for values in batch:
            yield name, values


def in_batches(
    samples: Iterable[Sample], size: int
) -> Iterator[tuple[list[str], NDArray[Any]]]:
    """Yield names and stacked values of at most ``size`` samples at a time.

    Raises:
        ContractError: Samples of different shapes meet in one batch.
    """
    rest = iter(samples)
    while batch := list(islice(rest, size)):
        names, values = zip(*batch, strict=True)
        try:
            yield list(names), np.stack(values)
        except ValueError as err:
            raise ContractError(
                f"{names[0]} to {names[-1]} differ in shape; use --batch 1"
            ) from err


def _files(paths: Iterable[Path]) -> Iterator[tuple[str, bytes]]:
    for path in paths:
        if path == STDIN:
            most = limits().input_bytes
            data = sys.stdin.buffer.read(most + 1)
            if problem := limits().problem("input_bytes", len(data), "standard input"):
                raise ContractError(problem)
            yield "-", data
        elif path.is_dir():
            known = ARRAYS | IMAGES
            found = sorted(p for p in path.iterdir() if p.suffix.lower() in known)
            if not found:
                raise ContractError(f"{path} holds no image, .npy or .npz file")
            yield from ((str(file), _read(file)) for file in found)
        else:
            yield str(path), _read(path)


def _read(path: Path) -> bytes:
    return read_bounded(path, "input_bytes", str(path), ContractError)


def _array(name: str, data: bytes) -> NDArray[Any]:
    try:
        if data[:4] != b"PK\x03\x04":
            return read_npy(data)
        # As much as the file has, packed or not; a little may be packed well.
        most = max(limits().golden_bytes, 4 * len(data))
        return read_npz(data, ["inputs"], limit=most)["inputs"]
    except (ContractError, KeyError) as err:
        raise ContractError(
            f"{name} is no .npy file, nor an .npz file with an array 'inputs' ({err})"
        ) from err


def _image(name: str, data: bytes, spec: InputSpec) -> NDArray[Any]:
    """Return an image as 8-bit values of shape (C, H, W), or as the input has it.

    It is turned as its camera says, made grey or RGB by the number of channels, scaled
    until it covers the model's height and width, and cropped around its centre.
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
            f"reading {name} needs Pillow: pip install 'dpu-edge[image]'"
        ) from err
    mode = "L" if channels == 1 else "RGB"
    try:
        with Image.open(io.BytesIO(data)) as file:
            size = file.width * file.height  # stated: nothing is unpacked yet
            if problem := limits().problem("image_pixels", size, "it"):
                raise ValueError(problem)
            # In place, and no copy of what is right already: pixels are much memory.
            ImageOps.exif_transpose(file, in_place=True)
            image = file if file.mode == mode else file.convert(mode)
            image.load()
    except (*_DAMAGED, Image.DecompressionBombError) as err:
        # Pillow names the buffer that it was given, not the file.
        reason = str(err).partition(" <")[0]
        raise ContractError(f"{name} is no image that can be read ({reason})") from err
    fitted = ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR)
    pixels = np.asarray(fitted).reshape(height, width, channels)
    return pixels.transpose(2, 0, 1) if spec.channel_axis == 1 else pixels
