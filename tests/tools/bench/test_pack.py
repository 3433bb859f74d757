# SPDX-License-Identifier: Apache-2.0
"""The benchmark of packing measures what it says, on files of a few kilobytes."""

from tools.bench import pack
from tools.bench.pack import Memory, Time


def test_memory_and_time_are_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(pack, "_ROWS", 64)
    monkeypatch.setattr(pack, "_PIECE", 64 * 4096)
    memory = pack.measure_memory(tmp_path, 1e6, 0.1)
    assert memory.file_bytes > 500_000
    assert 0 < memory.patch_bytes < memory.file_bytes
    assert 10 << 20 < memory.anonymous_bytes < memory.peak_bytes
    found = pack.measure_time(tmp_path, 50)
    assert min(found.read_s, found.pack_s, found.read_cpu_s, found.pack_cpu_s) > 0
    text = pack.section([memory], found, {"cores": 2})
    assert text.startswith("## Packing\n")
    assert "50 small tensors" in text


def test_bars_are_missed_by_name():
    mib = 1 << 20
    assert not list(Memory(5 * 10**8, 0.1, 1, 1, 512 * mib, 800 * mib).missed())
    assert len(list(Memory(5 * 10**8, 0.1, 1, 1, 0, 801 * mib).missed())) == 1
    assert not list(Memory(4 * 10**9, 0.1, 1, 1, 0, 801 * mib).missed())
    assert len(list(Memory(4 * 10**9, 0.1, 1, 1, 513 * mib, 0).missed())) == 1
    assert not list(Time(9, 9, 9, 1.0, 20.0, 1.0, 20.0).missed())
    assert list(Time(9, 9, 9, 1.0, 20.0, 1.0, 21.0).missed()) == [
        "packing 9 tensors took 21.0 times the CPU time of reading and hashing them, "
        "bar 20"
    ]
