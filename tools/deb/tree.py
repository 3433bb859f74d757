# SPDX-License-Identifier: Apache-2.0
"""The tree that a package installs: wheels, unpacked for each Python that may come.

``/opt/dpu-edge`` is a virtual environment that nobody has to make: ``bin/python3``
leads to Debian's own, ``pyvenv.cfg`` says so, and Python takes the ``lib/python3.X`` of
its own version. So a new Debian, with a new Python, finds its modules without a
network, without pip, and without anything to be made anew; dpkg knows every file. What
both have in common lies there once: the files are hard links.
"""

import hashlib
import os
import zipfile
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

PREFIX = "opt/dpu-edge"
# What a device never imports. RECORD would list it too, and nothing reads that.
LEFT_OUT = (
    *("trainer/*", "packager/*"),
    *("*/tests/*", "*.pyi", "*.h", "*.a", "*.dist-info/RECORD", "*/.gitignore"),
    *("numpy/f2py/*", "numpy/distutils/*", "numpy/_core/include/*"),
    *("onnxruntime/transformers/*", "onnxruntime/quantization/*"),
    "onnxruntime/tools/*",
    "zstandard/_cffi.*",  # the C backend is what is imported
)


def wheels_for(folder: Path, python: str) -> list[Path]:
    """Return the wheels of a folder that fit a version of Python, such as 3.13."""
    tag = "cp" + python.replace(".", "")
    return [path for path in sorted(folder.glob("*.whl")) if _fits(path, tag)]


def _fits(wheel: Path, tag: str) -> bool:
    # NAME-VERSION[-BUILD]-PYTHON-ABI-PLATFORM; abi3 fits all that are newer.
    pythons, abi, _ = wheel.stem.split("-")[-3:]
    return abi in ("none", "abi3") or tag in pythons.split(".")


def oldest_glibc(wheels: list[Path]) -> str:
    """Return the oldest C library that all the wheels run with, such as 2.34."""
    minors = [0]
    for wheel in wheels:
        tags = [t for t in wheel.stem.split("-")[-1].split(".") if "manylinux_" in t]
        if tags:
            minors.append(min(int(tag.split("_")[2]) for tag in tags))
    return f"2.{max(minors)}"


def unpack(wheels: list[Path], folder: Path) -> None:
    """Unpack wheels into a site-packages folder, less what no device needs."""
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            for info in archive.infolist():
                name = _place(info.filename)
                if name and not info.is_dir():
                    target = folder / name
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(archive.read(info))


def _place(name: str) -> str:
    """Return where a file of a wheel goes; nothing for what is left out."""
    parts = PurePosixPath(name).parts
    if parts[0].endswith(".data"):  # scripts and headers are for developers
        if parts[1] not in ("purelib", "platlib"):
            return ""
        parts = parts[2:]
    place = "/".join(parts)
    if ".." in parts or place.startswith("/"):
        raise ValueError(f"a wheel holds {name!r}, which would leave its folder")
    return "" if any(fnmatch(place, pattern) for pattern in LEFT_OUT) else place


def share(root: Path) -> int:
    """Make equal files below a folder one file with several names.

    Returns:
        The bytes that this saves.
    """
    known: dict[bytes, Path] = {}
    saved = 0
    for path in files_of(root):
        data = path.read_bytes()
        if not data:
            continue
        first = known.setdefault(hashlib.sha256(data).digest(), path)
        if first is not path:
            path.unlink()
            path.hardlink_to(first)
            saved += len(data)
    return saved


def files_of(root: Path) -> Iterator[Path]:
    """Yield the ordinary files below a folder, in the order of their names."""
    for path in sorted(root.rglob("*")):
        if path.is_file() and not path.is_symlink():
            yield path


def settle(root: Path, seconds: int, programs: frozenset[str]) -> None:
    """Give all that is below a folder the modes and the time of a package.

    Args:
        root: The folder.
        seconds: Since 1970.
        programs: Names of files that are run.
    """
    for path in sorted(root.rglob("*"), reverse=True):
        if not path.is_symlink():
            runs = path.is_dir() or str(path.relative_to(root)) in programs
            path.chmod(0o755 if runs else 0o644)
        os.utime(path, (seconds, seconds), follow_symlinks=False)
    root.chmod(0o755)
    os.utime(root, (seconds, seconds))
