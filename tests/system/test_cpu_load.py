"""Counters of processor time tell this process's work from that of others."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from qexp.system import cpu_load
from qexp.system.cpu_load import CpuCounters


def test_work_by_others_is_what_the_machine_did_less_what_this_process_did() -> None:
    before = CpuCounters(clock=10.0, busy=100.0, steal=5.0, own=2.0)
    after = CpuCounters(clock=14.0, busy=107.0, steal=5.4, own=5.0)
    assert cpu_load.others(before, after) == 1.0
    assert cpu_load.stolen(before, after) == pytest.approx(0.1)
    # Own time is finer than the system's ticks.
    assert cpu_load.others(before, CpuCounters(14.0, 102.99, None, 5.0)) == 0
    assert cpu_load.stolen(before, CpuCounters(14.0, 107.0, None, 5.0)) is None


def test_a_busy_process_beside_this_one_is_seen_and_this_one_is_not() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", "print(flush=True)\nwhile True: pass"], stdout=subprocess.PIPE
    ) as loop:
        assert loop.stdout is not None
        loop.stdout.readline()
        before = cpu_load.cpu_counters()
        time.sleep(0.5)
        after = cpu_load.cpu_counters()
        loop.kill()
    assert cpu_load.others(before, after) > 0.1
    assert after.busy > before.busy
    own = cpu_load.cpu_counters()
    while time.process_time() < own.own + 0.2:
        pass
    assert cpu_load.cpu_counters().own >= own.own + 0.2
