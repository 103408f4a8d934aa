"""Two hosts with one tracking server and one shared folder, where one host's sweep is killed in the middle.

They are one machine in truth, so their timings are marked.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qexp import tracking
from qexp.report.study import studies
from qexp.system import machine
from tests.helpers import ROOT
from tests.helpers.cli import TORCHS
from tests.helpers.hosts import Host
from tests.helpers.jobs import wait_until
from tests.helpers.stores import GROUP, jobs_of, settings, sweeps_of

SECONDS = 180
PORT = 5000

WAIT_FOR = """
import sys, time, urllib.request
until = time.monotonic() + float(sys.argv[2])
while True:
    try:
        urllib.request.urlopen(sys.argv[1] + "/health", timeout=2)
        break
    except OSError:
        if time.monotonic() > until:
            raise
        time.sleep(0.2)
"""


@contextlib.contextmanager
def serving(host: Host, outputs: Path) -> Iterator[str]:
    """Within the context a tracking server runs on the host, with the store outputs/mlflow.db; yields its address."""
    address = f"http://{host.address}:{PORT}"
    command = [
        sys.executable, "-m", "mlflow", "server", "--host", host.address, "--port", str(PORT), "--workers", "1",
        "--backend-store-uri", f"sqlite:///{outputs / 'mlflow.db'}", "--artifacts-destination", str(outputs / "kept"),
    ]  # fmt: skip
    with (outputs / "server.log").open("w") as log:
        process = subprocess.Popen(host.command(*command), stdout=log, stderr=log, start_new_session=True)
    try:
        subprocess.run(host.command(sys.executable, "-c", WAIT_FOR, address, str(SECONDS)), check=True)
        yield address
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def of(name: str, runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of the runs that were started on this host."""
    return [run for run in runs if run["tags"].get("host", "").startswith(f"{name} pid:[")]


@pytest.mark.slow
def test_each_runs_its_half_and_knows_its_own_orphans(
    hosts: tuple[Host, Host],
    checkpoint: Path,
    empty: Path,
    tmp_path: Path,
) -> None:
    first, second = hosts
    outputs = tmp_path / "outputs"
    outputs.mkdir()
    shutil.copy(empty, outputs)
    os.chown(outputs, -1, GROUP)
    outputs.chmod(0o2775)

    def start(host: Host, seeds: str) -> subprocess.Popen[str]:
        given = [
            "model=tiny", "train=fast", TORCHS, f"model.checkpoint={checkpoint}", "calib=small", "per_layer.images=0",
            "compute.threads=1", "saturation.exact_images=0", f"outputs={outputs}", "study=both", "latency=quick",
            "latency.seconds=0.1", f"tracking.uri={address}",
        ]  # fmt: skip
        command = host.command(sys.executable, "-m", "qexp", "-m", *given, f"calib.seed={seeds}")
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.Popen(
            command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True, umask=0o002,
        )  # fmt: skip

    with serving(first, outputs) as address:
        killed, other = start(first, "0,1"), start(second, "2,3")
        try:
            wait_until(lambda: bool(of(first.name, jobs_of(tmp_path))) or killed.poll() is not None, SECONDS)
            os.killpg(killed.pid, signal.SIGKILL)
            said, _ = other.communicate(timeout=SECONDS)
            assert other.returncode == 0, said
            orphans = of(first.name, jobs_of(tmp_path))
            # Another host can't know whether they run: a process of that number may run there, and means nothing.
            assert orphans
            assert {run["status"] for run in orphans} == {"RUNNING"}
            assert [run["status"] for run in of(second.name, jobs_of(tmp_path))] == ["FINISHED"] * 2

            again = start(first, "0,1")
            said, _ = again.communicate(timeout=SECONDS)
            assert again.returncode == 0, said
        finally:
            for process in (killed, other):
                process.kill()
    assert "runs whose process is gone were still open, and are closed as KILLED" in said
    runs = jobs_of(tmp_path)
    for orphan in [run for run in runs if run["id"] in {run["id"] for run in orphans}]:
        where = f"process {orphan['tags']['pid']} on {orphan['tags']['host']}"
        assert (orphan["status"], orphan["tags"]["error"]) == ("KILLED", f"{where} ended without closing the run.")
    finished = {name: of(name, [run for run in runs if run["status"] == "FINISHED"]) for name in ("node1", "node2")}
    assert sorted(run["name"] for run in finished["node1"]) == ["seed=0", "seed=1"]  # nothing twice
    assert sorted(run["name"] for run in finished["node2"]) == ["seed=2", "seed=3"]
    assert len({run["tags"]["host"] for run in runs}) == 2
    assert {run["tags"]["boot"] for run in runs} == {machine.boot()}  # of one machine, in truth
    assert {run["status"] for run in sweeps_of(tmp_path)} <= {"FINISHED", "KILLED"}
    # The runs of the second that the first one's killed run was open beside: neither had the machine for itself.
    records = tracking.of_study(tracking.connect(settings(), outputs), "both", ["qexp/digits"])
    (found,) = studies([record for record in records if tracking.SWEEP_TAG not in record.tags])
    timings = [one for record in found.finished if record.name in ("seed=2", "seed=3")
               for one in found.latencies[record.run_id]]  # fmt: skip
    assert timings
    assert all("is the same machine as node2" in one.reasons[-1] for one in timings)
    # Both have made entries of the cache that they share.
    signed = [lock.read_text() for lock in (outputs / "cache").rglob("*.lock")]
    holders = [re.fullmatch(r"process \d+ on (node[12]) pid:\[\d+\], boot [0-9a-f]{8}", text) for text in signed]
    assert {holder[1] for holder in holders if holder} == {"node1", "node2"}
    assert all(holders)
    # Others of the group may use whatever they have written.
    written = [path for name in ("cache", "sweeps", "reports") for path in (outputs / name).rglob("*")]
    assert {path.stat().st_gid for path in written} == {GROUP}
    assert [path for path in written if path.stat().st_mode & 0o060 != 0o060] == []
