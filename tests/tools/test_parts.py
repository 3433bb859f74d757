# SPDX-License-Identifier: Apache-2.0
"""The servers of the tests of fleets are found, and what is missing is said."""

import subprocess

import pytest

from tools import parts


@pytest.fixture
def bare(monkeypatch, tmp_path):
    """A machine without nginx, whose apt-get is a script of ours."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setattr(parts, "PARTS", tmp_path / "parts")
    monkeypatch.setattr(parts, "ELSEWHERE", str(tmp_path / "bin"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))

    def script(name, text):
        path = tmp_path / "bin" / name
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)

    return script


def test_without_apt_the_command_is_said(bare, capsys):
    assert parts.main() == 1
    err = capsys.readouterr().err
    assert "there is no apt-get here" in err
    assert parts.BY_HAND in err


def test_what_apt_says_is_passed_on_and_nothing_is_left(bare, capsys, tmp_path):
    bare("apt-get", "echo 'E: Unable to locate package' >&2; exit 100")
    bare("dpkg-deb", "exit 0")
    assert parts.main() == 1
    assert "Unable to locate package" in capsys.readouterr().err
    assert not (tmp_path / "parts").exists()


def test_a_program_that_does_not_start_here_is_not_taken(bare, capsys, tmp_path):
    program = tmp_path / "parts" / "usr" / "sbin" / "nginx"
    bare("apt-get", "> nginx.deb")
    lines = "#!/bin/sh\\necho 'libpcre2-8.so.0: no such file' >&2\\nexit 127\\n"
    bare(
        "dpkg-deb",
        f'/bin/mkdir -p {program.parent}; printf "{lines}" > {program}; '
        f"/bin/chmod 755 {program}",
    )
    assert parts.main() == 1
    assert "libpcre2-8.so.0" in capsys.readouterr().err
    assert parts.find("nginx") is None


@pytest.mark.fleet
def test_the_servers_start():
    assert parts.main() == 0
    for command in (["nginx", "-v"], ["weed", "version"]):
        program = parts.find(command[0])
        subprocess.run([program, *command[1:]], check=True, capture_output=True)
