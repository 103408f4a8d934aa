"""Hosts of their own on one machine: namespaces of network, names and processes, as containers have them.

What is timed in them means nothing: they share the machine's cores.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import psutil
import pytest

from tests.helpers.jobs import wait_until

PROGRAMS = ("unshare", "nsenter", "ip")
NAMES = ("node1", "node2")


@dataclass(frozen=True)
class Host:
    """A host. address: which the other one reaches it at; process: one that runs as long as the host does."""

    name: str
    address: str
    process: int

    def command(self, *arguments: str) -> list[str]:
        """The command line that runs these on the host."""
        return ["nsenter", f"--target={self.process}", "--net", "--uts", "--pid", "--mount", *arguments]


@pytest.fixture(scope="module")
def hosts() -> Iterator[tuple[Host, Host]]:
    """Two hosts that reach each other; skips where Linux allows none."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("needs root on Linux, to make namespaces")
    if missing := [program for program in PROGRAMS if not shutil.which(program)]:
        pytest.skip(f"needs {' and '.join(missing)}")
    with contextlib.ExitStack() as opened:
        first, second = (opened.enter_context(_host(name, number)) for number, name in enumerate(NAMES, 1))
        ends = [("eth1", str(first.process)), ("eth2", str(second.process))]
        (left, left_space), (right, right_space) = ends
        _run(
            "ip", "link", "add", left, "netns", left_space, "type", "veth", "peer", "name", right, "netns", right_space
        )
        for host, (end, _) in zip((first, second), ends, strict=True):
            _run(*host.command("ip", "address", "add", f"{host.address}/24", "dev", end))
            _run(*host.command("ip", "link", "set", end, "up"))
            _run(*host.command("ip", "link", "set", "lo", "up"))
        yield first, second


@contextlib.contextmanager
def _host(name: str, number: int) -> Iterator[Host]:
    command = ["unshare", "--net", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
    waits = "import socket, time; socket.sethostname(%r); print(flush=True); time.sleep(3600)" % name  # noqa: UP031
    process = subprocess.Popen(
        [*command, sys.executable, "-c", waits], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        assert process.stdout
        if said := process.stdout.readline().strip():
            pytest.skip(f"namespaces can't be had: {said}")
        wait_until(lambda: bool(psutil.Process(process.pid).children()))
        yield Host(name, f"10.97.0.{number}", psutil.Process(process.pid).children()[0].pid)
    finally:
        process.kill()
        process.wait()


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"the hosts can't be connected: {' '.join(command)}: {done.stderr.strip()}")
