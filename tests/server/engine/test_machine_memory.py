"""What is left of the machine's memory, read from what Linux says."""

from __future__ import annotations

from pathlib import Path

import pytest

from server.engine.machine_memory import available_memory, whole_memory

GIB = 1 << 30


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A machine with 8 GiB left, whose process is in no group of its own."""
    write(tmp_path / "proc/meminfo", f"MemTotal: 99 kB\nMemAvailable:   {8 * GIB // 1024} kB\n")
    write(tmp_path / "proc/self/cgroup", "0::/\n")
    return tmp_path


def write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def group(directory: Path, limit: str, used: int, cached: int) -> None:
    write(directory / "memory.max", f"{limit}\n")
    write(directory / "memory.current", f"{used}\n")
    write(directory / "memory.stat", f"anon 5\ninactive_file {cached}\n")


def test_the_machine_alone(machine: Path) -> None:
    assert available_memory(machine) == 8 * GIB
    group(machine / "sys/fs/cgroup", "max", 5 * GIB, 0)
    assert available_memory(machine) == 8 * GIB


def test_the_tightest_group_counts_and_its_cache_gives_way(machine: Path) -> None:
    write(machine / "proc/self/cgroup", "0::/outer/inner\n")
    outer = machine / "sys/fs/cgroup/outer"
    group(outer / "inner", str(6 * GIB), GIB, 0)
    assert available_memory(machine) == 5 * GIB
    group(outer, str(4 * GIB), 3 * GIB, GIB)
    assert available_memory(machine) == 2 * GIB
    group(outer, str(4 * GIB), 5 * GIB, 0)
    assert available_memory(machine) == 0


def test_a_container_that_sees_its_own_group_at_the_root(machine: Path) -> None:
    write(machine / "proc/self/cgroup", "0::/kubepods/pod7/abc\n")
    group(machine / "sys/fs/cgroup", str(3 * GIB), GIB, 0)
    assert available_memory(machine) == 2 * GIB


def test_the_first_version_of_groups(machine: Path) -> None:
    write(machine / "proc/self/cgroup", "9:cpu:/x\n4:memory:/x\n0::/\n")
    memory = machine / "sys/fs/cgroup/memory"
    for directory, limit in ((memory, 1 << 62), (memory / "x", 2 * GIB)):
        write(directory / "memory.limit_in_bytes", f"{limit}\n")
        write(directory / "memory.usage_in_bytes", f"{GIB}\n")
        write(directory / "memory.stat", "total_inactive_file 4096\n")
    assert available_memory(machine) == GIB + 4096


def test_elsewhere_nobody_says(tmp_path: Path) -> None:
    assert available_memory(tmp_path) is None


def test_the_whole_of_it_is_what_a_container_may_take(machine: Path) -> None:
    whole = whole_memory(machine)
    assert whole > 10**8
    write(machine / "proc/self/cgroup", "0::/pod/one\n7:memory:/\n")
    groups = machine / "sys/fs/cgroup"
    group(groups / "pod/one", "max", 0, 0)
    assert whole_memory(machine) == whole
    group(groups / "pod", "70000000", 69_000_000, 0)
    assert whole_memory(machine) == 70_000_000
    write(groups / "memory/memory.limit_in_bytes", "60000000\n")
    assert whole_memory(machine) == 60_000_000
