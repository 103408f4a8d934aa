"""No run writes into the folder of another."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from qexp.errors import ConfigError
from qexp.launch import folders
from tests.helpers import ROOT


def test_each_job_gets_the_folder_that_is_wanted_or_the_next_that_is_free(tmp_path: Path) -> None:
    assert folders.claim(tmp_path, ["0", "1", "2"]) == ["0", "1", "2"]
    assert folders.claim(tmp_path, ["0", "1"]) == ["3", "4"]
    assert folders.claim(tmp_path, ["x=1", "a/x=1", "x=1", "a/x=1"]) == ["x=1", "a/x=1", "x=1-2", "a/x=1-2"]
    assert folders.claim(tmp_path, [".", ""]) == ["5", "6"]
    assert all((tmp_path / name).is_dir() for name in ("0", "4", "x=1-2", "a/x=1-2", "6"))


def test_sweeps_that_begin_at_the_same_moment_share_no_folder(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        claimed = list(pool.map(lambda _: folders.claim(tmp_path, ["0", "1", "2"]), range(8)))
    assert sorted(int(name) for names in claimed for name in names) == list(range(24))


def test_a_folder_that_no_job_has_used_is_removed(tmp_path: Path) -> None:
    claimed = folders.claim(tmp_path, ["0", "1", "a/b"])
    (tmp_path / "0" / "qexp.log").touch()
    folders.remove_unused(tmp_path, claimed)
    assert [path.name for path in tmp_path.iterdir()] == ["0"]


def test_a_name_that_is_too_long_is_refused_in_a_sentence_and_nothing_is_left(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"^hydra.sweep.subdir: .* can't be made \(File name too long\); give another"
    ):
        folders.claim(tmp_path, ["0", "x" * 300])
    assert not list(tmp_path.iterdir())


def test_a_sweeps_own_file_is_written_beside_an_earlier_ones(tmp_path: Path) -> None:
    for text in "abc":
        folders.save_beside(tmp_path / "multirun.yaml", text)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "multirun.yaml": "a", "multirun-2.yaml": "b", "multirun-3.yaml": "c",
    }  # fmt: skip


HOLD = "import sys; from pathlib import Path; from qexp.launch import folders; folders.hold(Path(sys.argv[1]))"


def test_a_folder_is_one_runs_at_a_time(tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}

    def hold() -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", HOLD, tmp_path], env=env, capture_output=True, text=True)

    assert hold().returncode == 0  # and let go of when its process ended
    descriptor = folders.hold(tmp_path)
    assert descriptor is not None
    assert "another run is writing there; give another folder." in hold().stderr
    os.close(descriptor)
    assert hold().returncode == 0
    assert not list(tmp_path.iterdir())


def test_the_folder_of_a_finished_run_is_not_free(tmp_path: Path) -> None:
    folders.check_free("hydra.run.dir", tmp_path)
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / folders.RESULT).touch()
    folders.check_free("hydra.run.dir", tmp_path)
    for folder, pattern in ((tmp_path / "0", folders.RESULT), (tmp_path, f"**/{folders.RESULT}")):
        with pytest.raises(ConfigError, match=rf"^hydra.run.dir={folder}: a finished run's files are there"):
            folders.check_free("hydra.run.dir", folder, pattern)


FAST = ("latency=off", "per_layer.images=0", "saturation.exact_images=0", "calib=small")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_what_is_finished_stays_as_it_is_where_folders_are_fixed(
    qexp: Callable[..., subprocess.CompletedProcess[str]], checkpoint: Path, tmp_path: Path
) -> None:
    given = (*FAST, f"model.checkpoint={checkpoint}")
    fixed = tmp_path / "fixed"

    def sweep(*arguments: str) -> subprocess.CompletedProcess[str]:
        before = contents(fixed)
        done = qexp(*given, f"hydra.sweep.dir={fixed}", *arguments, "-m")
        assert done.returncode == 0, done.stderr
        after = contents(fixed)
        assert {name: after[name] for name in before} == before
        return done

    sweep("study=s", "calib.seed=0,1")
    sweep("study=s", "calib.seed=0,1,2")
    assert {path.parent.name for path in fixed.rglob(folders.RESULT)} == {"0", "1", "2"}
    sweep("calib.seed=7")
    assert {path.parent.name for path in fixed.rglob(folders.RESULT)} == {"0", "1", "2", "3"}
    # Two jobs of one name, and what a sweep gives to its jobs is no part of it, whatever else is left out.
    left_out = (
        "[calib,latency,latency.seconds,model,model.checkpoint,outputs,per_layer.images,runtimes,saturation.exact_images,"
        "train]"
    )
    named = ("hydra.sweep.subdir=${engine}-${hydra.job.override_dirname}", "calib.seed=0,1", "engine=x86")
    exclude = f"hydra.job.config.override_dirname.exclude_keys={left_out.replace('[', '[calib.seed,')}"
    sweep("seed=5", *named, exclude)
    assert {path.parent.name for path in fixed.rglob(folders.RESULT)} - set("0123") == {
        "x86-engine=x86,seed=5", "x86-engine=x86,seed=5-2",
    }  # fmt: skip

    single = (*given, f"hydra.run.dir={tmp_path / 'run'}")
    assert qexp(*single).returncode == 0
    before = contents(tmp_path / "run")
    refused = qexp(*single)
    assert refused.returncode == 1
    assert refused.stderr.startswith(f"hydra.run.dir={tmp_path / 'run'}: a finished run's files are there")
    assert contents(tmp_path / "run") == before
