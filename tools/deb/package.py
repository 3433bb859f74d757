# SPDX-License-Identifier: Apache-2.0
"""A Debian package, from a wheelhouse.

:mod:`tools.deb.tree` describes what it installs. Nothing is compiled, so ``dpkg-deb``
alone makes it, for every machine on any; debhelper's helpers for Python would bind it
to one Python. Two builds of one commit are equal byte for byte.
"""

import gzip
import hashlib
import os
import re
import shutil
import sys
import tempfile
from dataclasses import dataclass
from email.utils import formatdate
from functools import cache
from itertools import pairwise
from pathlib import Path

import click

from tools.deb import tree
from tools.wheels import CHECKOUT, PYTHONS, run

MACHINES = {"arm64": "aarch64", "amd64": "x86_64"}
SCRIPTS = Path(__file__).parent / "debian"
MAINTAINER = "The dpu-edge maintainers <maintainers@dpu-edge.invalid>"
SCRIPT_NAMES = ("postinst", "prerm", "postrm")
VERSION_FORM = r"[0-9][A-Za-z0-9.+~]*"
# In the package -> in SCRIPTS.
PROGRAMS = {
    "usr/bin/dpu-edge": "dpu-edge",
    f"{tree.PREFIX}/lib/compile": "compile",
    "usr/share/python3/runtime.d/dpu-edge.rtupdate": "rtupdate",
}
DOCS = "usr/share/doc/dpu-edge"
FILES = {
    f"{tree.PREFIX}/pyvenv.cfg": "pyvenv.cfg",
    f"{DOCS}/copyright": "copyright",
    "usr/share/lintian/overrides/dpu-edge": "lintian-overrides",
}
UNITS = {
    "agent": ("--user", "dpu-edge"),
    "sync": ("--user", "dpu-edge-sync", "--sync", "${DPU_URL}"),
}
_CONTROL = """\
Package: dpu-edge
Version: {version}
Architecture: {arch}
Maintainer: {maintainer}
Installed-Size: {size}
Depends: {depends}
Recommends: ca-certificates
Section: science
Priority: optional
Description: New neural-network weights for edge devices behind thin links
 Applies small patches to the weights of a model, tries them before they count,
 goes back where they fail, and proves by SHA-256 what it runs. dpu-edge-agent@
 applies what lies in a folder, dpu-edge-sync@ fetches it.
 .
 Models and keys lie in /var/lib/dpu-edge, which is kept when this is purged.
"""


@dataclass(frozen=True, slots=True)
class Built:
    """A package.

    Attributes:
        path: The file.
        size: Its bytes.
        installed: Bytes of its files.
        shared: Bytes that are in it once instead of twice.
    """

    path: Path
    size: int
    installed: int
    shared: int


def check_host() -> None:
    """Insist on what packages are built with.

    Raises:
        click.ClickException: It is not there; says what to install.
    """
    if not shutil.which("dpkg-deb"):
        raise click.ClickException(
            "dpkg-deb is missing: it is part of Debian and Ubuntu; elsewhere install "
            "the package dpkg"
        )


def source_date() -> int:
    """Return the time that a build claims: SOURCE_DATE_EPOCH, or the commit's."""
    given = os.environ.get("SOURCE_DATE_EPOCH", "")
    if given.isdecimal():
        return int(given)
    return int(run("git", "-C", CHECKOUT, "log", "-1", "--format=%ct"))


def our_version(wheels: Path) -> str:
    """Return the version of our wheel in a folder, which has the commit in it.

    Raises:
        click.ClickException: None is there, or several.
    """
    found = [path.name for path in wheels.glob("dpu_edge-*.whl")]
    if len(found) != 1:
        raise click.ClickException(
            f"{wheels} has {len(found)} wheels of dpu-edge, expected one: "
            "make wheelhouse"
        )
    return found[0].split("-")[1]


def build(
    wheels: Path,
    arch: str,
    version: str,
    folder: Path,
    seconds: int,
    compression: str = "xz",
) -> Built:
    """Make a package.

    Args:
        wheels: Those of its machine.
        arch: ``arm64`` or ``amd64``.
        version: Of the package.
        folder: Where to.
        seconds: What its files are dated with, since 1970.
        compression: As dpkg-deb calls it; gzip is fast.

    Raises:
        click.ClickException: dpkg-deb failed, or a wheel is missing.
    """
    with tempfile.TemporaryDirectory() as name:
        root = Path(name) / "root"
        pythons = [p for p in PYTHONS if tree.wheels_for(wheels, p)]
        if not pythons:
            raise click.ClickException(f"no wheels are in {wheels}: make wheelhouse")
        for python in pythons:
            site = root / tree.PREFIX / f"lib/python{python}/site-packages"
            tree.unpack(tree.wheels_for(wheels, python), site)
            if not (site / "edge_runtime").is_dir():
                raise click.ClickException(f"no wheel of dpu-edge is in {wheels}")
        _lay_out(root, version, seconds)
        shared = tree.share(root / tree.PREFIX)
        tree.settle(root, seconds, frozenset(PROGRAMS))
        size = sum(p.stat().st_size for p in tree.files_of(root)) - shared
        glibc = tree.oldest_glibc(list(wheels.glob("*.whl")))
        _write_control(root, arch, version, size, pythons, glibc)
        tree.settle(root / "DEBIAN", seconds, frozenset(SCRIPT_NAMES))
        folder.mkdir(parents=True, exist_ok=True)
        target = folder / f"dpu-edge_{version}_{arch}.deb"
        # One thread: what several write depends on how many there are.
        how = (f"-Z{compression}", "--threads-max=1", "--root-owner-group")
        environment = os.environ | {"SOURCE_DATE_EPOCH": str(seconds)}
        run("dpkg-deb", *how, "--build", root, target, env=environment)
        return Built(target, target.stat().st_size, size, shared)


def depends(pythons: list[str], glibc: str) -> str:
    """Return what the package needs: Pythons whose modules are in it, and no others."""
    minors = [int(python.split(".")[1]) for python in pythons]
    ranges = [f"python3 (>= 3.{minors[0]}~)"]
    # "Not 3.12" is "older than 3.12, or 3.13 and newer": each gap is such a pair.
    for before, after in pairwise(minors):
        if after > before + 1:
            gap = f"python3 (<< 3.{before + 1}~) | python3 (>= 3.{after}~)"
            ranges.append(gap)
    ranges.append(f"python3 (<< 3.{minors[-1] + 1}~)")
    libraries = [f"libc6 (>= {glibc})", "libgcc-s1", "libstdc++6"]
    return ", ".join([*libraries, *ranges, "adduser"])


@cache
def unit_text(kind: str) -> str:
    """Return a unit of many instances, as ``dpu-edge service --name %i`` writes it."""
    command = (sys.executable, "-m", "edge_runtime", "service", "--name", "%i")
    text = run(*command, *UNITS[kind])
    own = re.compile(r"^ExecStart=.* -- edge_runtime\.__main__ ", re.MULTILINE)
    text, found = own.subn("ExecStart=/usr/bin/dpu-edge ", text)
    if found != 1:
        raise click.ClickException(f"the unit of {kind} starts something else: {text}")
    return text


def _lay_out(root: Path, version: str, seconds: int) -> None:
    """Write all that is not of the wheels."""
    for place, name in (PROGRAMS | FILES).items():
        _write(root / place, (SCRIPTS / name).read_bytes())
    for kind in UNITS:
        unit = root / f"usr/lib/systemd/system/dpu-edge-{kind}@.service"
        _write(unit, unit_text(kind).encode())
    stanza = (
        f"dpu-edge ({version}) unstable; urgency=medium\n\n"
        "  * The changes are in CHANGELOG.md of the sources.\n\n"
        f" -- {MAINTAINER}  {formatdate(seconds)}\n"
    )
    packed = gzip.compress(stanza.encode(), 9, mtime=0)
    _write(root / DOCS / "changelog.gz", packed)
    (root / "etc/dpu-edge").mkdir(parents=True)
    python = root / tree.PREFIX / "bin/python3"
    python.parent.mkdir()
    python.symlink_to("/usr/bin/python3")


def _write_control(
    root: Path, arch: str, version: str, size: int, pythons: list[str], glibc: str
) -> None:
    sums = (
        f"{hashlib.md5(path.read_bytes()).hexdigest()}  {path.relative_to(root)}\n"
        for path in tree.files_of(root)
    )
    _write(root / "DEBIAN/md5sums", "".join(sums).encode())
    control = _CONTROL.format(
        version=version,
        arch=arch,
        maintainer=MAINTAINER,
        size=-(-size // 1024),
        depends=depends(pythons, glibc),
    )
    _write(root / "DEBIAN/control", control.encode())
    for name in SCRIPT_NAMES:
        _write(root / "DEBIAN" / name, (SCRIPTS / name).read_bytes())


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
