"""Printing never fails a run: readers that leave, closed streams, full disks, poor encodings."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import ROOT
from tests.helpers.cli import SMALL, TORCHS, runs

PRINTS = """
import sys
from qexp.system import console
console.protect()
for number in range(int(sys.argv[1])):
    print("line", number, flush=number % 2 == 0)
print("FP32 → INT8 ±0.1 − 2× ≥ é 中 \\udcff", flush=True)
print("said", file=sys.stderr)
sys.exit(3)
"""


def printing(lines: int, shell: str = "", **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Run a process that prints, with this text after its command line in a shell."""
    return subprocess.run(
        ["bash", "-c", f'"$@" {shell}', "bash", sys.executable, "-c", PRINTS, str(lines)],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment}, capture_output=True, timeout=60,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("shell", "out", "err"),
    [
        ("| head -n 1; exit ${PIPESTATUS[0]}", b"line 0\n", b"said\n"),
        ("2>&1 | head -n 1; exit ${PIPESTATUS[0]}", b"line 0\n", b""),
        (">&-", b"", b"said\n"),
        ("2>&-", None, b""),
        (">&- 2>&- <&-", b"", b""),
        ("2>/dev/full", None, b""),
        (
            ">/dev/full", b"",
            b"standard output can't be written to (No space left on device): the runs go on without.\nsaid\n",
        ),
    ],
)  # fmt: skip
def test_a_process_whose_output_goes_nowhere_goes_on(shell: str, out: bytes | None, err: bytes) -> None:
    done = printing(20_000, shell)
    assert done.returncode == 3
    if out is None:
        assert done.stdout.count(b"\n") == 20_001
    else:
        assert done.stdout == out
    assert done.stderr == err


def test_a_file_does_not_take_the_place_of_a_closed_stream(tmp_path: Path) -> None:
    code = (
        "import sys; from qexp.system import console; console.protect()\n"
        "with open('file', 'w') as file: print('printed', flush=True); file.write('written')"
    )
    command = ["bash", "-c", '"$@" >&-', "bash", sys.executable, "-c", code]
    subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True, timeout=60)
    assert (tmp_path / "file").read_text() == "written"


@pytest.mark.parametrize(
    ("encoding", "said"),
    [
        ("ascii", "FP32 -> INT8 +/-0.1 - 2x >= e \\u4e2d \\udcff"),
        ("ascii:strict", "FP32 -> INT8 +/-0.1 - 2x >= e \\u4e2d \\udcff"),
        ("latin-1", "FP32 -> INT8 ±0.1 - 2× >= é \\u4e2d \\udcff"),
        ("cp437", "FP32 -> INT8 ±0.1 - 2x ≥ é \\u4e2d \\udcff"),
        ("utf-8", "FP32 → INT8 ±0.1 − 2× ≥ é 中 \\udcff"),
    ],
)
def test_what_an_encoding_lacks_is_spelled_and_the_rest_is_as_it_was(encoding: str, said: str) -> None:
    done = printing(0, PYTHONIOENCODING=encoding, PYTHONUTF8="0")
    assert done.returncode == 3, done.stderr
    assert done.stdout.decode(encoding.partition(":")[0]) == said + "\n"


# ----------------------------------------------------------------------------------- as a user types it


def typed(folder: Path, shell: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python -m qexp` on the smallest model, with this after it in a shell."""
    return subprocess.run(
        ["bash", "-c", f'"$@" {shell}', "bash", sys.executable, "-m", "qexp", *SMALL, *arguments],
        cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["seed=0,1", "-m"], []])
@pytest.mark.parametrize("shell", ["| head -n 1; exit ${PIPESTATUS[0]}", ">&-", ">/dev/full"])
def test_runs_are_finished_whether_or_not_anybody_reads(tmp_path: Path, shell: str, arguments: list[str]) -> None:
    done = typed(tmp_path, shell, *arguments)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert [status for _, status in runs(tmp_path)] == ["FINISHED"] * (3 if arguments else 1)
    logs = list((tmp_path / "outputs").rglob("qexp.log"))
    assert len(logs) == max(1, len(arguments))
    assert all("float model: trained" in log.read_text() for log in logs)


@pytest.mark.slow
def test_a_print_in_a_users_model_fails_no_job_whose_reader_is_gone(tmp_path: Path) -> None:
    (tmp_path / "loud.py").write_text(
        "from qexp.models import architectures\ndef make(num_classes):\n    print('x' * 100_000, flush=True)\n"
        "    return architectures.tiny(num_classes)\n"
    )
    model = ["model=custom", "model._target_=loud.make", "+model.num_classes=10"]
    done = typed(tmp_path, "| head -c 1; exit ${PIPESTATUS[0]}", *model, "seed=0,1", "-m")
    assert done.returncode == 0, done.stderr
    assert [status for _, status in runs(tmp_path)] == ["FINISHED"] * 3


@pytest.mark.slow
def test_the_table_is_printed_in_ascii_where_there_is_no_more(tmp_path: Path) -> None:
    poor = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": ""}
    done = typed(tmp_path, "", "latency=quick", "latency.seconds=0.2", **poor)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout.isascii()
    assert re.search(r"^accuracy +0\.\d{4} -> 0\.\d{4}", done.stdout, re.M)
    assert [status for _, status in runs(tmp_path)] == ["FINISHED"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "code", "status"),
    [(signal.SIG_DFL, 129, "KILLED"), (signal.SIG_IGN, 0, "FINISHED")],  # SIG_IGN: as nohup starts it
)
def test_a_closed_terminal_ends_a_run_as_killed_unless_it_was_told_to_go_on(
    tmp_path: Path, before: signal.Handlers, code: int, status: str
) -> None:
    """All processes of a terminal get SIGHUP when it is closed, and the shell sends another."""
    from tests.helpers.jobs import wait_until

    with subprocess.Popen(
        [sys.executable, "-m", "qexp", "model=tiny", "train=fast", "latency=quick", "latency.seconds=3", TORCHS],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, before),
    ) as process:  # fmt: skip
        wait_until(lambda: "RUNNING" in [status for _, status in runs(tmp_path)], 120)
        for _ in range(2):
            os.killpg(process.pid, signal.SIGHUP)
        out, err = process.communicate(timeout=240)
    assert process.returncode == code, err
    assert [status for _, status in runs(tmp_path)] == [status]
    assert ("Stopped by SIGHUP. To run it again:" in err) == (code != 0)
    assert "Traceback" not in out + err
