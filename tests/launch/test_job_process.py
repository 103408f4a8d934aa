"""A job in a process of its own: its end is reported in a sentence, and nothing leaks or outlives its owner.

The jobs are traps: data sets that crash, hang or raise in the first step of the pipeline.
"""

from __future__ import annotations

import importlib
import logging
import os
import pickle
import pkgutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

import qexp as package
from qexp.config import schema
from qexp.errors import InputError, NotFinite, QexpError, RunError
from qexp.launch import job_process
from qexp.records import Result
from tests.helpers import ROOT
from tests.helpers.cli import runs
from tests.helpers.jobs import wait_until, without_times

Composed = Callable[..., schema.Config]

TRAPS = """
import logging, multiprocessing, os, pathlib, signal, sys, time, warnings

import torch

from qexp.config import schema as config
from qexp.errors import InputError, NotFinite


class Odd(BaseException):
    pass


def crash():
    os.kill(os.getpid(), signal.SIGSEGV)


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def leave():
    os._exit(3)


def odd():
    raise Odd("strange things")


def refuse():
    raise InputError("there is nothing to see.")


def diverge():
    raise NotFinite("it is infinite.")


class Mine(InputError):
    def __init__(self, where, what):
        super().__init__(f"{where} has {what}.")


def own():
    raise Mine("my data", "a hole")


def hang():
    pathlib.Path("pids").write_text(f"{os.getpid()} {os.getppid()}")
    try:
        while True:
            time.sleep(0.05)
    finally:
        pathlib.Path("cleaned").touch()


def soil():
    os.environ["QEXP_TRAP"] = "soiled"
    torch.set_num_threads(1)
    torch.manual_seed(7)
    config.leaked = True
    os.chdir("/")
    logging.root.setLevel(logging.CRITICAL)
    refuse()


def look():
    state = (os.environ.get("QEXP_TRAP"), torch.get_num_threads(), hasattr(config, "leaked"), os.getcwd())
    raise InputError(repr(state))


def compute():
    ones = torch.ones(2000, 500)
    total = int((ones @ ones.T).sum())
    raise InputError(f"{total} by {len(os.listdir('/proc/self/task'))} threads")


def speak():
    print("printed", flush=True)
    log = logging.getLogger("traps")
    log.debug("not asked for")
    log.info("said %d", 1)
    warnings.warn("careful")
    refuse()


def ask():
    raise InputError(f"got {input()}")


def make(split, what):
    globals()[what]()
"""


@pytest.fixture
def trap(composed: Composed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., schema.Config]:
    """trap(what, *overrides) -> the configuration of a job that does that; the current folder is tmp_path."""
    (tmp_path / "traps.py").write_text(TRAPS)
    (tmp_path / "run").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    return lambda what, *overrides: composed(
        "dataset=custom", "dataset._target_=traps.make", f"+dataset.what={what}", *overrides
    )


def failure(config: schema.Config) -> Exception:
    """The error of a job in the folder `run`."""
    with pytest.raises(Exception) as caught:  # noqa: PT011
        job_process.start(config, Path("run")).outcome()
    assert not list(Path("run").glob("*"))  # nothing of its own is left
    return caught.value


@pytest.mark.parametrize(
    ("what", "sentence", "where"),
    [
        ("crash", "the job's process was ended by SIGSEGV, a crash in compiled code.", "traps.py"),
        ("kill", "the job's process was killed (SIGKILL), as Linux does when memory runs out; ", None),
        ("leave", "the job's process ended with exit status 3 before the job was done.", None),
    ],
)
def test_an_end_without_a_word_is_a_sentence(
    trap: Callable[..., schema.Config], what: str, sentence: str, where: str | None
) -> None:
    error = failure(trap(what))
    assert type(error) is RunError
    assert str(error).startswith(sentence)
    if where is None:
        assert error.__cause__ is None
    else:
        assert where in str(error.__cause__)


def test_a_crash_in_a_library_names_it_and_what_to_do() -> None:
    where = 'File "/home/me/qexp/runtimes/openvino.py", line 105 in compiled'
    said = job_process.exit_sentence(-signal.SIGSEGV, where)
    assert said.endswith("a crash in compiled code that openvino called: take openvino out of runtimes.")


def test_what_a_job_raises_is_raised_with_its_traceback(trap: Callable[..., schema.Config]) -> None:
    ours = failure(trap("refuse"))
    assert type(ours) is InputError
    assert str(ours) == "there is nothing to see."
    assert "in refuse" in str(ours.__cause__)
    for what, kind, sentence in (("diverge", NotFinite, "it is infinite."), ("own", InputError, "my data has a hole.")):
        error = failure(trap(what))
        assert type(error) is kind
        assert str(error) == sentence
    other = failure(trap("odd"))
    assert isinstance(other, Exception)
    assert (type(other).__module__, type(other).__name__, str(other)) == ("traps", "Odd", "strange things")
    assert "in odd" in str(other.__cause__)
    assert "traps" not in sys.modules  # what is the user's is imported there
    again = pickle.loads(pickle.dumps(other))
    assert (type(again).__module__, type(again).__name__, str(again)) == ("traps", "Odd", "strange things")


def exceptions() -> list[type[BaseException]]:
    """Every class of exception that a module of qexp defines."""
    names = [module.name for module in pkgutil.walk_packages(package.__path__, "qexp.")]
    programs = ("qexp.__main__",)  # which do something when they are imported
    modules = [importlib.import_module(name) for name in names if name not in programs]
    values = [(module, value) for module in modules for value in vars(module).values() if isinstance(value, type)]
    return [kind for module, kind in values if issubclass(kind, BaseException) and kind.__module__ == module.__name__]


def test_every_exception_survives_pickle() -> None:
    given = {
        "UntraceableError": ("layer1.0", "BasicBlock", "an if"),
        "UnsafeWriteError": (("layer1.0", "BasicBlock"), "a write"),
        "Stop": (signal.SIGINT,),
    }
    kinds = exceptions()
    assert {RunError, NotFinite, InputError, QexpError, job_process.RemoteTraceback} <= set(kinds)
    assert set(given) <= {kind.__name__ for kind in kinds}
    for kind in kinds:
        error = kind(*given.get(kind.__name__, ("what happened",)))
        again = pickle.loads(pickle.dumps(error))
        assert type(again) is kind or isinstance(error, job_process._NamedError)
        assert (str(again), vars(again)) == (str(error), vars(error))


@pytest.mark.slow
def test_a_job_that_takes_too_long_is_ended_and_cleans_up(trap: Callable[..., schema.Config], tmp_path: Path) -> None:
    error = failure(trap("hang", "job.timeout=5"))
    assert type(error) is RunError
    assert str(error) == "job.timeout=5: the job was not done after 5 s, and was ended."
    assert "in hang" in str(error.__cause__)
    assert (tmp_path / "cleaned").exists()
    pid = int((tmp_path / "pids").read_text().split()[0])
    assert not psutil.pid_exists(pid)


def test_a_job_finds_what_its_owner_has_and_nothing_of_the_job_before(
    trap: Callable[..., schema.Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failure(trap("soil"))
    (tmp_path / "elsewhere" / "run").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert str(failure(trap("look", "compute.threads=2"))) == repr((None, 2, False, str(Path.cwd())))
    monkeypatch.setenv("QEXP_TRAP", "set late")
    assert str(failure(trap("look", "compute.threads=1"))) == repr(("set late", 1, False, str(Path.cwd())))


def test_every_child_computes_with_as_many_threads_as_asked_for(trap: Callable[..., schema.Config]) -> None:
    """A child that waited for OpenMP threads of the process that it was forked from would never end."""
    for _ in range(3):
        total, _, threads, _ = str(failure(trap("compute", "compute.threads=2", "job.timeout=60"))).split()
        assert int(total) == 2000 * 2000 * 500
        assert int(threads) >= 2


def test_records_are_handled_here_and_warnings_shown_once(
    trap: Callable[..., schema.Config],
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(job_process, "_warned", set())
    caplog.set_level(logging.INFO)
    for _ in range(2):
        failure(trap("speak"))
    assert [(r.name, r.getMessage()) for r in caplog.records if r.name == "traps"] == [("traps", "said 1")] * 2
    out, err = capfd.readouterr()
    assert out.count("printed") == 2
    assert err.count("UserWarning: careful") == 1
    assert "said" not in out + err


def test_a_job_reads_what_its_owner_could(trap: Callable[..., schema.Config]) -> None:
    """A debugger in a user's model needs it."""
    reading, writing = os.pipe()
    os.write(writing, b"typed\n")
    before = os.dup(0)
    os.dup2(reading, 0)
    try:
        assert str(failure(trap("ask"))) == "got typed"
    finally:
        os.dup2(before, 0)
        for descriptor in (reading, writing, before):
            os.close(descriptor)


OWNER = """
import pickle, sys
from pathlib import Path
from qexp.launch import job_process, signals
with signals.until_stopped():
    job_process.start(pickle.loads(Path(sys.argv[1]).read_bytes()), Path("run")).outcome()
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_nothing_outlives_the_owner(trap: Callable[..., schema.Config], tmp_path: Path, number: signal.Signals) -> None:
    (tmp_path / "config").write_bytes(pickle.dumps(trap("hang")))
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])}
    command = [sys.executable, "-c", OWNER, "config"]
    with subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True, start_new_session=True) as owner:
        wait_until(lambda: (tmp_path / "pids").exists() and len((tmp_path / "pids").read_text().split()) == 2)
        family = psutil.Process(owner.pid).children(recursive=True)
        assert {int(pid) for pid in (tmp_path / "pids").read_text().split()} <= {process.pid for process in family}
        # As a terminal does with Ctrl-C: all of its processes get it.
        os.killpg(owner.pid, number) if number is signal.SIGINT else owner.send_signal(number)
        said = owner.communicate(timeout=60)[1]
    wait_until(lambda: not any(alive(process) for process in family))
    assert "Traceback" not in said
    if number is not signal.SIGKILL:
        assert owner.returncode == 128 + number
        assert (tmp_path / "cleaned").exists()


@pytest.mark.slow
def test_a_stop_while_the_server_starts_is_not_held_up_and_no_job_begins(
    trap: Callable[..., schema.Config], tmp_path: Path
) -> None:
    (tmp_path / "config").write_bytes(pickle.dumps(trap("hang")))
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])}
    command = [sys.executable, "-c", OWNER, "config"]
    with subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True) as owner:
        family = psutil.Process(owner.pid)
        wait_until(lambda: any("forkserver" in " ".join(child.cmdline()) for child in family.children()))
        children = family.children(recursive=True)
        owner.send_signal(signal.SIGTERM)
        said = owner.communicate(timeout=60)[1]
    assert owner.returncode == 143
    assert "Traceback" not in said
    wait_until(lambda: not any(alive(process) for process in children))
    assert not (tmp_path / "pids").exists()


def alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


MANY = """
import pickle, sys
from pathlib import Path
import psutil
from qexp.launch import job_process
from qexp.errors import InputError
config, me, seen = pickle.loads(Path(sys.argv[1]).read_bytes()), psutil.Process(), []
for _ in range(40):
    try:
        job_process.start(config, Path("run")).outcome()
    except InputError:
        seen.append((me.num_fds(), me.num_threads(), len(me.children()), me.memory_info().rss))
few, many = seen[10], seen[-1]
assert few[:3] == many[:3], seen
assert many[3] < 1.02 * few[3], seen
assert not {"torch", "traps"} & set(sys.modules)
"""


@pytest.mark.slow
def test_the_owner_does_not_grow_and_imports_no_torch(trap: Callable[..., schema.Config], tmp_path: Path) -> None:
    (tmp_path / "config").write_bytes(pickle.dumps(trap("refuse")))
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])}
    subprocess.run([sys.executable, "-c", MANY, "config"], env=env, check=True, timeout=120)


ORDINARY = """
import pickle, sys
from pathlib import Path
from qexp.launch import job_process
config = pickle.loads(Path("config").read_bytes())
job_process.check_inputs_in_child([config])
assert job_process.provenance_tags_in_child([config])[0]["torch"]
assert job_process.start(config, Path("run")).outcome().metrics["accuracy/int8"] > 0.6
assert "torch" not in sys.modules
"""


def test_whoever_has_a_job_checked_and_run_needs_no_torch(composed: Composed, checkpoint: Path, tmp_path: Path) -> None:
    config = composed("model=tiny", f"model.checkpoint={checkpoint}", "latency=off")
    (tmp_path / "config").write_bytes(pickle.dumps(config))
    (tmp_path / "run").mkdir()
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", ORDINARY], env=env, cwd=tmp_path, check=True, timeout=120)


IMPORTS = """
import pickle, sys
from pathlib import Path
from qexp.launch import fork_preload
from qexp.pipeline.run import run_experiment
known = set(sys.modules)
run_experiment(pickle.loads(Path("config").read_bytes()), Path("run"))
new = sorted(set(sys.modules) - known)
assert len(new) < 10, (len(new), new[:20])
"""


@pytest.mark.parametrize("flow", ["eager", "fx", "dynamic"])
def test_a_job_imports_next_to_nothing_that_its_server_has_not(
    composed: Composed, checkpoint: Path, tmp_path: Path, flow: str
) -> None:
    config = composed("model=tiny", f"model.checkpoint={checkpoint}", f"flow={flow}", "latency=quick", "calib=small")
    (tmp_path / "config").write_bytes(pickle.dumps(config))
    (tmp_path / "run").mkdir()
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", IMPORTS], env=env, cwd=tmp_path, check=True, timeout=120)


PT2E_IMPORTS = """
import os, sys
from qexp.launch import fork_preload
threads = os.listdir("/proc/self/task")
from qexp.launch import fork_preload_pt2e
assert os.listdir("/proc/self/task") == threads  # no other could be forked
assert {"torchao", "torch._dynamo"} <= set(sys.modules)
"""


@pytest.mark.long
def test_what_jobs_of_pt2e_import_is_imported_silently_and_without_threads() -> None:
    pytest.importorskip("torchao", reason="pip install 'qexp[pt2e]'")
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", PT2E_IMPORTS], env=env, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.slow
def test_three_jobs_in_a_row_give_the_same(composed: Composed, checkpoint: Path, tmp_path: Path) -> None:
    config = composed(
        "model=tiny", f"model.checkpoint={checkpoint}", "latency=off", "compute.threads=2", "cache.enabled=false"
    )
    results: list[Result] = []
    for number in range(3):
        (tmp_path / f"{number}").mkdir()
        results.append(job_process.start(config, tmp_path / f"{number}").outcome())
    first, *others = [without_times(result.metrics) for result in results]
    assert others == [first, first]
    assert first["accuracy/int8"] > 0.6


JOBLIB = """
import multiprocessing, pickle
from pathlib import Path
from joblib import Parallel, delayed


def one(folder):
    from qexp.launch import job_process
    config = pickle.loads(Path("config").read_bytes())
    try:
        job_process.start(config, Path(folder)).outcome()
    except Exception as error:
        return type(error).__name__, str(error), multiprocessing.get_start_method()


print(Parallel(n_jobs=2, backend="loky")(delayed(one)(folder) for folder in ("run", "other")))
"""


def test_a_job_runs_in_a_worker_of_joblibs(trap: Callable[..., schema.Config], tmp_path: Path) -> None:
    """joblib's workers pass a start method of joblib's own to the processes that they start."""
    (tmp_path / "config").write_bytes(pickle.dumps(trap("refuse")))
    (tmp_path / "other").mkdir()
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])}
    done = subprocess.run([sys.executable, "-c", JOBLIB], env=env, capture_output=True, text=True, timeout=120)
    assert done.stdout == f"{[('InputError', 'there is nothing to see.', 'loky')] * 2}\n", done.stderr


NETS = """
import os, signal, time, torch


class Trapped(torch.nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 8, 3, stride=4)
        self.fc = torch.nn.Linear(8, num_classes)

    def forward(self, x):
        if len(x) == 5:
            os.kill(os.getpid(), signal.SIGSEGV)
        if len(x) == 6:
            os.kill(os.getpid(), signal.SIGKILL)
        if len(x) == 7:
            raise RuntimeError("seven images are too many")
        if len(x) == 9:
            time.sleep(600)
        return self.fc(self.conv(x).mean((2, 3)))

    def fuse_model(self, is_qat=False):
        pass  # nothing to fuse, and nothing to trace for
"""


@pytest.mark.slow
def test_each_of_a_sweeps_jobs_fails_alone(
    qexp: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    (tmp_path / "nets.py").write_text(NETS)
    result = qexp(
        "flow=eager", "model=custom", "model._target_=nets.Trapped", "+model.num_classes=10", "latency=off",
        "job.timeout=30", "calib.batch_size=16,5,6,7,9,8", "calib.batches=2", "-m",
    )  # fmt: skip
    assert result.returncode == 1
    sentences = {
        5: "the job's process was ended by SIGSEGV",
        6: "the job's process was killed (SIGKILL)",
        7: "RuntimeError: seven images are too many",
        9: "job.timeout=30: the job was not done after 30 s",
    }
    for number, (size, sentence) in enumerate(sentences.items(), start=2):
        # Once as a line when it ends, and, of the first three, once below the table.
        assert f"#{number}  FAILED  batch_size={size}: {sentence}" in result.stdout
        assert result.stdout.count(f"FAILED  batch_size={size}: {sentence}") == (2 if number <= 4 else 1)
    assert "and 1 more run that did not finish" in result.stdout
    assert "Traceback" not in result.stdout + result.stderr
    statuses = dict(runs(tmp_path))
    assert [statuses[f"batch_size={size}"] for size in (16, 5, 6, 7, 9, 8)] == [
        "FINISHED", *["FAILED"] * 4, "FINISHED",
    ]  # fmt: skip
    for trace, line in (("ended", "time.sleep(600)"), ("RuntimeError", "in forward")):
        texts = [path.read_text() for path in (tmp_path / "outputs" / "artifacts").rglob("traceback.txt")]
        assert any(trace in text and line in text for text in texts)


@pytest.mark.slow
def test_a_single_run_that_crashes_has_failed(
    qexp: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    (tmp_path / "nets.py").write_text(NETS)
    arguments = ["flow=eager", "model=custom", "model._target_=nets.Trapped", "+model.num_classes=10", "latency=off"]
    result = qexp(*arguments, "calib.batch_size=5")
    assert result.returncode == 1
    assert result.stderr == "the job's process was ended by SIGSEGV, a crash in compiled code.\n"
    result = qexp(*arguments, "calib.batch_size=7")
    assert result.returncode == 1
    assert "in forward" in result.stderr
    assert "seven images are too many" in result.stderr
    assert [status for _, status in runs(tmp_path)] == ["FAILED", "FAILED"]


def test_a_job_that_is_ended_in_a_finalizer_ends_after_it_without_a_traceback() -> None:
    program = """
import os, signal, time
from qexp.launch import job_process

class Held:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)

job_process._end_by_signal()
try:
    held = Held()
    del held
    time.sleep(60)
except job_process._Terminated:
    print("ended")
"""
    ended = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert (ended.stdout, ended.stderr) == ("ended\n", "")
