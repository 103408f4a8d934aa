"""The machine's description, limits and CPUs, and the identity of processes."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from qexp.system import machine


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("flags", "tag"),
    [
        ("avx2 avx512f avx512bw avx512vl avx512_vnni amx_int8", "amx"),
        ("avx2 avx512f avx512bw avx512vl avx512_vnni avx_vnni", "avx512_vnni"),
        ("avx2 avx_vnni", "avx_vnni"),
        ("avx2 avx512f avx512bw avx512vl", "avx512"),
        ("sse4_1 avx2", "avx2"),
        ("sse4_1 avx", "sse4"),
        ("fp asimd asimddp", "neon_dotprod"),
        ("fp asimd", "neon"),
        ("rv64imafdc", "unknown"),
        ("", "unknown"),
    ],
)
def test_isa_is_the_most_capable_instruction_set(flags: str, tag: str) -> None:
    assert machine.isa(set(flags.split())) == tag


def test_a_machine_is_described_from_proc_and_sys(tmp_path: Path) -> None:
    cpu = "sys/devices/system/cpu"
    files = {
        "proc/cpuinfo": "processor\t: 0\ncpu family\t: 6\nmodel\t\t: 143\nmodel name\t: Intel Xeon 8481C\n"
        "flags\t\t: fpu avx2 avx512f avx512bw avx512vl avx512_vnni amx_int8 hypervisor\n",
        "proc/meminfo": "MemTotal:       16384 kB\n",
        "proc/self/cgroup": "0::/job\n",
        "sys/fs/cgroup/job/cpu.max": "150000 100000\n",
        "sys/fs/cgroup/job/memory.max": "1073741824\n",
        "sys/fs/cgroup/memory.max": "max\n",
        f"{cpu}/smt/active": "1\n",
        f"{cpu}/intel_pstate/no_turbo": "1\n",
        f"{cpu}/cpu0/cpufreq/scaling_governor": "performance\n",
    } | {
        f"{cpu}/cpu{thread}/topology/{name}": value
        for thread in range(4)
        for name, value in (("core_id", str(thread % 2)), ("physical_package_id", "0"))
    }
    found = machine.describe(tree(tmp_path, files))
    assert found.cpu == "Intel Xeon 8481C (family 6, model 143)"
    assert (found.isa, found.virtual, found.smt, found.turbo, found.governor) == (
        "amx",
        "yes",
        "on",
        "off",
        "performance",
    )
    assert (found.physical_cores, found.memory, found.memory_limit, found.cpu_limit) == (2, 16384 * 1024, 1 << 30, 1.5)
    assert found.allowed_cores == 1
    assert machine.core_siblings(tmp_path) == ((0, 2), (1, 3))


def test_what_cannot_be_read_is_unknown_and_not_an_error(tmp_path: Path) -> None:
    found = machine.describe(tmp_path)
    assert (found.smt, found.governor, found.turbo, found.virtual) == ("unknown",) * 4
    assert (found.physical_cores, found.memory, found.memory_limit, found.cpu_limit) == (None,) * 4


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, None),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "50000 100000\n"}, 0.5),
        # A child can't have more than its parent.
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/cpu.max": "200000 100000\n",
                "sys/fs/cgroup/a/b/cpu.max": "400000 100000\n",
            },
            2.0,
        ),
        # In a container the name is the host's.
        ({"proc/self/cgroup": "0::/docker/3f\n", "sys/fs/cgroup/cpu.max": "300000 100000\n"}, 3.0),
        # Version 1.
        (
            {
                "proc/self/cgroup": "4:cpu,cpuacct:/x\n3:memory:/y\n",
                "sys/fs/cgroup/cpu/x/cpu.cfs_quota_us": "250000\n",
                "sys/fs/cgroup/cpu/x/cpu.cfs_period_us": "100000\n",
            },
            2.5,
        ),
        ({"proc/self/cgroup": "4:cpu:/x\n", "sys/fs/cgroup/cpu/x/cpu.cfs_quota_us": "-1\n"}, None),
        ({}, None),
    ],
)
def test_the_cpu_limit_is_the_tightest_of_all_control_groups(
    tmp_path: Path, files: dict[str, str], limit: float | None
) -> None:
    assert machine.cpu_limit(tree(tmp_path, files)) == limit


def test_allowed_cores_are_those_of_the_affinity_mask() -> None:
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("this system has no affinity masks")
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        assert machine.allowed_cpus() == (min(before),)
        assert machine.allowed_cores() == 1
    finally:
        os.sched_setaffinity(0, before)


def test_a_process_is_pinned_with_all_its_threads() -> None:
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("this system has no affinity masks")
    before, seen, pinned = os.sched_getaffinity(0), [], threading.Event()

    def wait() -> None:
        pinned.wait(10)
        seen.append(os.sched_getaffinity(0))  # of the calling thread

    thread = threading.Thread(target=wait)
    thread.start()
    try:
        machine.pin([max(before)])
        pinned.set()
        thread.join()
        assert [os.sched_getaffinity(0), *seen] == [{max(before)}] * 2
    finally:
        machine.pin(sorted(before))


def test_this_machine_has_a_cpu_and_memory() -> None:
    found = machine.describe()
    assert found.cpu
    assert 1 <= found.allowed_cores <= found.logical_cores
    assert found.memory is None or found.memory > 2**28


def test_a_process_is_told_from_one_that_has_its_id_now() -> None:
    own = psutil.Process()
    started = machine.since_boot(own)
    assert machine.is_running(own.pid, started)
    assert not machine.is_running(own.pid, started - 60)
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    started = machine.since_boot(psutil.Process(child.pid))
    assert machine.is_running(child.pid, started)
    child.kill()
    deadline = time.monotonic() + 20
    while machine.is_running(child.pid, started) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not machine.is_running(child.pid, started)  # a zombie, since nobody has waited for it
    assert psutil.pid_exists(child.pid)
    child.communicate()
    assert not machine.is_running(child.pid, started)
