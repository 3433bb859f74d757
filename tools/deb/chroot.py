# SPDX-License-Identifier: Apache-2.0
"""A Debian system in a folder that can be logged into, an emulated one too.

It lives in a user namespace of its own, in which binfmt_misc is registered apart
(Linux 6.7 and newer), so this machine never takes aarch64 programs for its own.
"""

import os
import shutil
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import click

from edge_runtime.commandline import say
from edge_runtime.files import Files
from tools.arm64.root import KEYRING, MIRROR, QEMU, describe_cpu

INCLUDED = "python3,adduser,init-system-helpers,ca-certificates"
NEEDED = {
    "mmdebstrap": "mmdebstrap",
    "unshare": "util-linux",
    "chroot": "coreutils",
    QEMU: "qemu-user-static",
}
_SAID = "/root/said"  # inside: what the last command wrote
# ELF, 64 bits, little-endian, executable or shared, machine 183.
_BINFMT = (
    r":qemu-aarch64:M::\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00"
    r"\xb7\x00:\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff"
    r"\xff\xff:{qemu}:OCF"
)
# Waits until its ids are mapped, then does what the rest of its arguments say.
_ENTER = """\
read go
set -e
mount -t proc proc /proc
if [ -n "$1" ]; then
    mount -t binfmt_misc binfmt_misc /proc/sys/fs/binfmt_misc
    printf '%s' "$1" > /proc/sys/fs/binfmt_misc/register
fi
shift
exec "$@"
"""
_LOGIN = """\
mount -t proc proc "$1/proc"
mount --rbind /dev "$1/dev"
if [ -n "$2" ]; then
    mount --bind "$2/proc/cpuinfo" "$1/proc/cpuinfo"
    mount --rbind "$2/sys" "$1/sys"
fi
exec chroot "$1" /bin/sh
"""


def check_host() -> None:
    """Insist on root and on the programs that it needs.

    Raises:
        click.ClickException: Something is missing; says what.
    """
    missing = sorted({p for name, p in NEEDED.items() if not shutil.which(name)})
    if missing:
        raise click.ClickException(
            f"this needs {', '.join(missing)}; on Debian or Ubuntu run: apt-get "
            f"install {' '.join(missing)}"
        )
    if os.geteuid():
        raise click.ClickException("this needs root, for systems of their own users")


def _begin(command: list[str], *, emulated: bool) -> subprocess.Popen[str]:
    """Start a command in namespaces of its own, with the same user ids."""
    words = ["unshare", "--user", "--mount", "--pid", "--fork", "--kill-child"]
    qemu = _BINFMT.format(qemu=shutil.which(QEMU)) if emulated else ""
    process = subprocess.Popen(
        [*words, "sh", "-c", _ENTER, "sh", qemu, *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    own, its = Path("/proc/self/ns/user"), Path(f"/proc/{process.pid}/ns/user")
    while its.readlink() == own.readlink():
        time.sleep(0.01)
    for name in ("uid_map", "gid_map"):
        Path(f"/proc/{process.pid}/{name}").write_text("0 0 65536")
    assert process.stdin is not None
    process.stdin.write("go\n")
    process.stdin.flush()
    return process


def make_system(tar: Path, arch: str, suite: str, *, emulated: bool) -> None:
    """Make a small Debian, once; emulated, that takes 10 to 25 minutes.

    Raises:
        click.ClickException: mmdebstrap failed.
    """
    if tar.exists():
        return
    say(f"making Debian {suite} for {arch} ...")
    tar.parent.mkdir(parents=True, exist_ok=True)
    part = tar.with_name(f"{tar.stem}.part.tar")
    source = f"deb [signed-by={KEYRING}] {MIRROR} {suite} main"
    options = [f"--arch={arch}", "--variant=apt", f"--include={INCLUDED}"]
    options += ["--mode=root", "--skip=chroot/mount/sys"]
    command = ["mmdebstrap", *options, suite, str(part), source]
    said, _ = _begin(command, emulated=emulated).communicate()
    if not part.exists() or "success" not in said:
        raise click.ClickException(f"mmdebstrap failed:\n{said[-2000:]}")
    Files().rename(part, tar)


class System:
    """A system, unpacked and logged into; leaving it ends all that runs there."""

    def __init__(self, tar: Path, root: Path, *, emulated: bool) -> None:
        """Unpack it anew."""
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir(parents=True)
        subprocess.run(["tar", "-xf", tar, "-C", root], check=True)
        for name in ("resolv.conf", "hosts"):
            shutil.copy(f"/etc/{name}", root / "etc" / name)
        # No service may start here, as in every chroot of Debian's own builders.
        (root / "usr/sbin/policy-rc.d").write_text("#!/bin/sh\nexit 101\n")
        (root / "usr/sbin/policy-rc.d").chmod(0o755)
        self.root = root
        board = root.with_name(f"{root.name}-board")
        if emulated:
            describe_cpu(board)
        words = ["sh", "-e", "-c", _LOGIN, "sh", str(root)]
        words.append(str(board) if emulated else "")
        self._shell = _begin(words, emulated=emulated)

    def run(self, command: str) -> tuple[int, str]:
        """Run a command line as root; return its exit code and what it wrote."""
        shell = self._shell
        assert shell.stdin is not None
        assert shell.stdout is not None
        line = f"( {command} ) > {_SAID} 2>&1 < /dev/null; echo $?\n"
        shell.stdin.write(line)
        shell.stdin.flush()
        answer = shell.stdout.readline()
        if not answer.strip().isdecimal():
            raise click.ClickException(f"the system ended: {answer}")
        said = (self.root / _SAID[1:]).read_text(errors="replace")
        return int(answer), said

    def __enter__(self) -> Self:
        """Log in."""
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        """Log out; the namespace's first process takes the others with it."""
        self._shell.kill()
        self._shell.communicate()
