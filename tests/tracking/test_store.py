"""Real stores only: SQLite files, and a real `mlflow server` on 127.0.0.1."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient

from qexp import tracking
from qexp.config.schema import Config
from qexp.data.loading import load_data, normalise
from qexp.errors import InputError, RunError
from tests.helpers import ROOT
from tests.helpers.cli import Run
from tests.helpers.stores import begin, free_port, settings


@pytest.fixture(scope="module")
def outputs(empty: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("local")
    shutil.copy(empty, folder)
    return folder


@pytest.fixture
def store(outputs: Path) -> tracking.Store:
    return tracking.connect(settings(), outputs)


def artifact(store: tracking.Store, run: tracking.Run, path: str) -> str:
    return Path(store.client.download_artifacts(run.id, path)).read_text()


# ------------------------------------------------------------------------------------------- what a run records


def test_a_run_has_its_tags_from_its_first_moment(store: tracking.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is killed before its params are logged must be known for the job that it was."""
    seen: dict[str, str] = {}
    monkeypatch.setattr(tracking.Run, "log_params", lambda run, *_: seen.update(store.client.get_run(run.id).data.tags))
    tags = {"study": "s", "config_hash": "0123", "long": "x" * 10_000}
    tracking.start_run(store, experiment="x", name="n", params={"a": "1"}, tags=tags).finish()
    assert seen["pid"] == str(os.getpid())
    assert (seen["study"], seen["config_hash"]) == ("s", "0123")
    assert seen["long"].endswith("... (10000 characters)")


def test_a_run_holds_what_was_logged(store: tracking.Store, outputs: Path, tmp_path: Path) -> None:
    (tmp_path / "samples.bin").write_bytes(b"\x00\x01")
    with tracking.start_run(
        store,
        experiment=store.experiment_name("digits"),
        name="per_channel minmax 32",
        params={"qconfig.weight.bits": "8", "empty": ""},
        tags={"git_sha": "abc123"},
        description="one run",
    ) as run:
        run.log_result(
            {"accuracy/int8": 0.98, "latency/int8_ms": np.float32(0.5)},
            {"verdict": "no loss"},
            {"raw/samples.bin": tmp_path / "samples.bin", "a/b.json": {"scale": np.float32(2), "x": [1, None]}},
            [tracking.DatasetUse("digits", "d" * 64, "sklearn.datasets.load_digits", "evaluation", {"images": 899})],
        )
    got = store.client.get_run(run.id)
    assert got.info.status == "FINISHED"
    assert got.info.end_time >= got.info.start_time
    assert got.data.params == {"qconfig.weight.bits": "8", "empty": ""}
    assert got.data.metrics == {"accuracy/int8": 0.98, "latency/int8_ms": 0.5}
    assert got.data.tags["verdict"] == "no loss"
    assert got.data.tags["mlflow.source.git.commit"] == "abc123"
    assert got.data.tags["mlflow.note.content"] == "one run"
    assert got.inputs.dataset_inputs[0].dataset.name == "digits"
    assert json.loads(artifact(store, run, "a/b.json")) == {"scale": 2.0, "x": [1, None]}
    assert (outputs / "artifacts" / run.id / "artifacts" / "raw" / "samples.bin").read_bytes() == b"\x00\x01"
    assert store.client.get_experiment(run.experiment_id).name == "qexp/digits"


def test_runs_that_record_a_data_set_for_the_first_time_at_the_same_moment_all_do(store: tracking.Store) -> None:
    runs = [begin(store, f"run {number}") for number in range(6)]
    ready = threading.Barrier(len(runs))

    def log(run: tracking.Run, digest: str) -> None:
        ready.wait()
        run.log_result({}, datasets=[tracking.DatasetUse("digits", digest, "sklearn", "evaluation")])

    with ThreadPoolExecutor(len(runs)) as pool:
        for attempt in range(5):
            for done in [pool.submit(log, run, f"digest {attempt}") for run in runs]:
                done.result()
    for run in runs:
        logged = store.client.get_run(run.id).inputs.dataset_inputs
        assert sorted(one.dataset.digest for one in logged) == [f"digest {attempt}" for attempt in range(5)]
        run.finish()


def test_metrics_that_are_not_finite_are_left_out_and_named(store: tracking.Store) -> None:
    with begin(store) as run:
        run.log_result({"a": math.nan, "b": math.inf, "c": 1.0}, artifacts={"x.json": {"a": math.nan, "b": [math.inf]}})
    got = store.client.get_run(run.id)
    assert got.data.metrics == {"c": 1.0}
    assert got.data.tags["not_finite"] == "a=nan, b=inf"
    assert json.loads(artifact(store, run, "x.json")) == {"a": None, "b": [None]}


def test_names_that_mlflow_refuses_are_mended_without_losing_one(store: tracking.Store) -> None:
    odd = {"a[0]": "1", "a(0)": "2", "x=1,y@z": "3", "/lead": "4", "../up": "5", "a//b": "6", "n" * 300: "7", "é": "8"}
    with begin(store, **odd) as run:
        run.log_result({"p[50]": 1.0}, {"tag(1)": "t"})
    got = store.client.get_run(run.id)
    assert sorted(got.data.params.values()) == sorted(odd.values())
    assert got.data.params["a_0_"] == "1"
    assert got.data.metrics == {"p_50_": 1.0}
    assert got.data.tags["tag_1_"] == "t"


def test_more_params_than_one_request_takes_are_all_logged(store: tracking.Store) -> None:
    params = {f"model.p{number}": str(number) for number in range(230)}
    with tracking.start_run(store, experiment=store.experiment_name("digits"), name="n", params=params, tags={}) as run:
        pass
    assert store.client.get_run(run.id).data.params == params


def test_a_long_param_says_that_it_is_cut_and_stands_whole_in_an_artifact(store: tracking.Store) -> None:
    long = "x" * 6001
    with begin(store, whole="y" * 6000, long=long) as run:
        pass
    params = store.client.get_run(run.id).data.params
    assert params["whole"] == "y" * 6000
    assert len(params["long"]) <= 6000
    assert params["long"].endswith("... (6001 characters, all in long_params.json)")
    assert json.loads(artifact(store, run, "long_params.json")) == {"long": long}


def test_more_entries_than_one_request_takes(store: tracking.Store) -> None:
    with begin(store, **{f"p{i}": str(i) for i in range(250)}) as run:
        run.log_result({f"m{i}": float(i) for i in range(1100)}, {f"t{i}": str(i) for i in range(150)})
    data = store.client.get_run(run.id).data
    assert len(data.params) == 250
    assert len(data.metrics) == 1100
    assert sum(name.startswith("t") for name in data.tags) == 150


def test_two_runs_at_once_do_not_mix(store: tracking.Store) -> None:
    first, second = begin(store, "first"), begin(store, "second")
    second.log_result({"m": 2.0})
    first.log_result({"m": 1.0})
    second.finish()
    assert store.client.get_run(first.id).info.status == "RUNNING"
    first.finish()
    assert [store.client.get_run(run.id).data.metrics["m"] for run in (first, second)] == [1.0, 2.0]


# ------------------------------------------------------------------------------------------------- how a run ends


def test_a_failed_run_has_its_sentence_and_its_traceback(store: tracking.Store) -> None:
    with pytest.raises(RunError), begin(store) as run:
        raise RunError("layer1.0.conv1 differs.")
    got = store.client.get_run(run.id)
    assert got.info.status == "FAILED"
    assert got.data.tags["error"] == "layer1.0.conv1 differs."
    assert "Traceback" in artifact(store, run, "traceback.txt")


def test_an_unforeseen_error_is_named_with_its_type(store: tracking.Store) -> None:
    with pytest.raises(KeyError), begin(store) as run:
        raise KeyError("scale")
    assert store.client.get_run(run.id).data.tags["error"] == "KeyError: 'scale'"


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_an_interrupted_run_is_killed(store: tracking.Store, kind: type[BaseException]) -> None:
    with pytest.raises(kind), begin(store) as run:
        raise kind
    assert store.client.get_run(run.id).info.status == "KILLED"


def test_the_first_end_counts(store: tracking.Store) -> None:
    run = begin(store)
    run.kill()
    run.finish()
    run.fail("late", "late")
    assert store.client.get_run(run.id).info.status == "KILLED"


def test_an_interrupt_while_the_store_makes_the_run_leaves_none_running(
    store: tracking.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The signal comes after the store has the run and before its id is known here: the worst moment."""
    create = store.client.create_run
    made: list[str] = []

    def interrupted(*args: object, **kwargs: object) -> object:
        run = create(*args, **kwargs)
        made.append(run.info.run_id)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.3)
        return run

    monkeypatch.setattr(store.client, "create_run", interrupted)
    # A shell's background jobs ignore SIGINT, and so would these tests there.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            begin(store)
    finally:
        signal.signal(signal.SIGINT, before)
    assert [store.client.get_run(run_id).info.status for run_id in made] == ["KILLED"]


def test_an_end_that_a_lost_server_does_not_take_is_said_and_not_waited_for(
    store: tracking.Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = begin(store, "lost")
    address = f"http://127.0.0.1:{free_port()}"
    run.store = dataclasses.replace(store, uri=address, client=MlflowClient(address))
    monkeypatch.setattr(tracking.run, "END_SECONDS", 0.5)
    start = time.monotonic()
    run.kill()
    assert time.monotonic() - start < 10
    assert f"MLflow at {address} did not take that run lost ended as KILLED" in caplog.text


def test_a_process_that_leaves_without_ending_its_run_does_not_make_it_finished(outputs: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from tests.helpers.stores import begin, settings;"
        "from qexp import tracking; store = tracking.connect(settings(), Path(sys.argv[1]));"
        "print(begin(store).id); raise SystemExit(3)"
    )
    done = subprocess.run([sys.executable, "-c", code, outputs], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 3, done.stderr
    store = tracking.connect(settings(), outputs)
    assert store.client.get_run(done.stdout.strip()).info.status != "FINISHED"


# ------------------------------------------------------------------------------------------------------- sweeps


def test_a_parent_holds_the_table_and_counts_and_its_children_are_found(store: tracking.Store) -> None:
    parent = tracking.open_parent(store, experiment="qexp/digits", name="sweep", tags={"study": "granularity"})
    for index in range(3):
        with begin(store, f"job {index}", parent.id, index=str(index)) as run:
            run.log_result({"accuracy/int8": index / 10})
    begin(store, "stranger").finish()
    tracking.close_parent(parent, "FAILED", {"finished": 2, "failed": 1, "killed": 0})
    rows = tracking.children(store, parent.id)
    assert [row.name for row in rows] == ["job 0", "job 1", "job 2"]
    assert [row.params for row in rows] == [{"index": str(index)} for index in range(3)]
    assert rows[2].metrics == {"accuracy/int8": 0.2}
    assert all(row.status == "FINISHED" and row.end is not None and row.end >= row.start for row in rows)
    got = store.client.get_run(parent.id)
    assert got.info.status == "FAILED"
    assert got.data.metrics == {"jobs/finished": 2, "jobs/failed": 1, "jobs/killed": 0}


def test_children_are_read_past_the_first_page(store: tracking.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking.query, "PAGE", 3)
    parent = tracking.open_parent(store, experiment="qexp/digits", name="sweep", tags={})
    names = [f"job {index}" for index in range(8)]
    for name in names:
        begin(store, name, parent.id).finish()
    assert [row.name for row in tracking.children(store, parent.id)] == names


def test_children_of_several_experiments_are_found(store: tracking.Store) -> None:
    parent = tracking.open_parent(store, experiment="qexp/digits", name="sweep", tags={})
    for experiment in ("qexp/digits", "qexp/mnist"):
        tracking.start_run(store, experiment=experiment, name=experiment, params={}, tags={}, parent=parent.id).finish()
    rows = tracking.children(store, parent.id, ["qexp/digits", "qexp/mnist", "qexp/none"])
    assert {row.name for row in rows} == {"qexp/digits", "qexp/mnist"}


def test_the_ui_command_quotes_its_store_and_filters_on_the_sweep(store: tracking.Store) -> None:
    parent = tracking.open_parent(store, experiment="qexp/digits", name="sweep", tags={})
    parent.finish()
    ui = tracking.ui(store, parent)
    assert ui.command is not None
    assert store.uri in ui.command
    query = urllib.parse.parse_qs(urllib.parse.urlsplit(ui.url.replace("#", "")).query)
    assert query["searchFilter"] == [f"tags.`mlflow.parentRunId` = '{parent.id}'"]
    assert query["orderByKey"] == ["metrics.`accuracy/int8`"]

    single = begin(store)
    single.finish()
    assert tracking.ui(store, single).url.split("?")[0].endswith(f"/runs/{single.id}")


# ------------------------------------------------------------------------------------- which store, and which not


def test_environment_variables_count_and_settings_win(
    store: tracking.Store, outputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "from environment")
    local = tracking.connect(settings(), outputs)
    assert local.uri == store.uri
    assert local.experiment_name("digits") == "from environment"
    assert tracking.connect(settings(experiment="mine"), outputs).experiment_name("digits") == "mine"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.uri)
    elsewhere = tracking.connect(settings(), tmp_path)
    assert elsewhere.uri == store.uri
    assert not (tmp_path / "mlflow.db").exists()


def test_the_experiment_may_be_named_by_its_id(
    store: tracking.Store, outputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = begin(store)
    run.finish()
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", run.experiment_id)
    assert tracking.connect(settings(), outputs).experiment_name("mnist") == "qexp/digits"
    for wrong in ("987654", "mine"):
        monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", wrong)
        with pytest.raises(InputError, match=rf"^MLFLOW_EXPERIMENT_ID={wrong} can't be used") as refused:
            tracking.connect(settings(), outputs)
        assert "MLFLOW_TRACKING_URI" not in str(refused.value)  # which nobody has set
        assert tracking.connect(settings(experiment="mine"), outputs).experiment == "mine"


@pytest.mark.parametrize(
    ("variable", "value", "uri"),
    [
        ("MLFLOW_SQLALCHEMYSTORE_POOL_SIZE", "many", None),
        ("MLFLOW_TRACKING_INSECURE_TLS", "maybe", "http://127.0.0.1:9"),
        ("MLFLOW_TRACKING_CLIENT_CERT_PATH", "/no/such/file", "https://127.0.0.1:9"),
        ("REQUESTS_CA_BUNDLE", "/no/such/file", "https://127.0.0.1:9"),
    ],
)
def test_an_environment_variable_of_a_library_is_blamed_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, uri: str | None
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(InputError, match=f"^the environment variable {variable} can't be used: "):
        tracking.connect(settings(uri), tmp_path)


def test_a_proxy_that_is_not_there_is_blamed(outputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with pytest.raises(InputError, match="can't be reached through the proxy that HTTP_PROXY or HTTPS_PROXY names"):
        tracking.connect(settings("http://mlflow.example:5000"), outputs)


def test_a_single_run_resumes_and_a_sweeps_run_does_not(store: tracking.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    first = begin(store, a="1")
    first.fail("too bad.", "")
    monkeypatch.setenv("MLFLOW_RUN_ID", first.id)
    swept = begin(store, parent=first.id, a="2")
    assert swept.id != first.id
    swept.finish()
    again = tracking.start_run(store, experiment="x", name="n", params={"a": "1", "b": "2"}, tags={}, resume=True)
    assert again.id == first.id
    again.finish()
    resumed = store.client.get_run(first.id)
    assert resumed.data.params == {"a": "1", "b": "2"}
    assert (resumed.info.status, "error" in resumed.data.tags) == ("FINISHED", False)


def whole(outputs: Path) -> dict[str, list[tuple[object, ...]]]:
    """All that the store holds, by table."""
    with contextlib.closing(sqlite3.connect(outputs / "mlflow.db")) as connection:
        names = [name for (name,) in connection.execute("select name from sqlite_master where type = 'table'")]
        return {name: sorted(map(repr, connection.execute(f'select * from "{name}"'))) for name in names}


@pytest.mark.parametrize(
    ("kind", "params", "experiment", "reason"),
    [
        ("finished", {"a": "1"}, None, "is FINISHED, and its result would be written over"),
        ("finished", {"a": "2"}, None, "is FINISHED, and its result would be written over"),
        ("failed", {"a": "2"}, None, "has other settings: a=1, not 2;"),
        ("killed", {"a": "2", "c": "2"}, None, "has other settings: a=1, not 2 and 1 more settings;"),
        ("failed", {"a": "1"}, "another", "is of the experiment qexp/digits, and another is asked for"),
        ("deleted", {"a": "1"}, None, "was deleted"),
        ("sweep", {}, None, "is a whole sweep's"),
        ("elsewhere", {"a": "1"}, None, "is still being run, by process 7 on another machine"),
        ("none", {"a": "1"}, None, "has no such run"),
    ],
)
def test_a_run_that_cannot_go_on_is_refused_and_stays_as_it_was(
    outputs: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    params: dict[str, str],
    experiment: str | None,
    reason: str,
) -> None:
    store = tracking.connect(settings(experiment=experiment), outputs)
    if kind == "sweep":
        run = tracking.open_parent(store, experiment="qexp/digits", name="s", tags={})
        run.fail("too bad.", "")
    else:
        run = begin(store, a="1", c="1")
    if kind == "elsewhere":
        store.client.set_tag(run.id, "host", "another machine")
        store.client.set_tag(run.id, "pid", "7")
    elif kind == "failed":
        run.fail("too bad.", "")
    elif kind == "killed":
        run.kill()
    elif kind != "sweep":
        run.finish()
    if kind == "deleted":
        store.client.delete_run(run.id)
    run_id = "0" * 32 if kind == "none" else run.id
    monkeypatch.setenv("MLFLOW_RUN_ID", run_id)
    before = whole(outputs)
    with pytest.raises(InputError) as refused:
        tracking.start_run(store, experiment="x", name="n", params=params, tags={"new": "tag"}, resume=True)
    assert str(refused.value).startswith(f"MLFLOW_RUN_ID={run_id}: ")
    assert reason in str(refused.value)
    assert "\n" not in str(refused.value)
    assert whole(outputs) == before
    if kind == "elsewhere":
        run.kill()


def test_a_run_that_mlflow_has_opened_for_this_one_is_taken(
    store: tracking.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = store.client.create_run("0", tags={"mlflow.source.type": "PROJECT"}, run_name="by mlflow run")
    store.client.log_param(opened.info.run_id, "a", "1")
    monkeypatch.setenv("MLFLOW_RUN_ID", opened.info.run_id)
    run = tracking.start_run(store, experiment="x", name="n", params={"a": "1", "b": "2"}, tags={}, resume=True)
    run.finish()
    assert run.id == opened.info.run_id
    assert store.client.get_run(run.id).info.status == "FINISHED"


def test_a_deleted_experiment_is_refused_with_the_way_back(store: tracking.Store) -> None:
    tracking.start_run(store, experiment="gone", name="n", params={}, tags={}).finish()
    experiment = store.client.get_experiment_by_name("gone").experiment_id
    store.client.delete_experiment(experiment)
    with pytest.raises(InputError, match=rf"gone was deleted.*restore --experiment-id {experiment}"):
        tracking.check_experiment(store, "gone")
    with pytest.raises(InputError, match="gone was deleted"):
        tracking.start_run(store, experiment="gone", name="n", params={}, tags={})
    store.client.restore_experiment(experiment)
    tracking.check_experiment(store, "gone")


@pytest.mark.parametrize(
    ("location", "modules", "needs"),
    [
        ("s3://bucket/path", ["boto3"], "in s3://, for which MLflow needs boto3; pip install it, or name another"),
        ("gs://bucket/path", ["google.cloud.storage"], "MLflow needs google-cloud-storage; pip install it"),
        ("wasbs://c@a.blob.core.windows.net/p", ["azure.storage.blob"], "needs azure-storage-blob;"),
        ("abfss://c@a.dfs.core.windows.net/p", ["azure.storage.filedatalake"], "needs azure-storage-file-datalake;"),
        ("sftp://host/path", ["paramiko", "pysftp"], "needs paramiko and pysftp;"),
        ("hdfs://host/path", ["pyarrow"], "needs pyarrow;"),
        ("nosuch://host/path", [], "in nosuch://, which MLflow can't reach; install a plugin of MLflow's that does"),
    ],
)
def test_an_artifact_store_whose_client_is_missing_is_refused(
    store: tracking.Store, monkeypatch: pytest.MonkeyPatch, location: str, modules: list[str], needs: str
) -> None:
    for module in modules:
        monkeypatch.setitem(sys.modules, module, None)  # as if it weren't installed
    name = f"in {location}"
    experiment = store.client.create_experiment(name, artifact_location=location)
    with pytest.raises(InputError, match=r"^the MLflow experiment") as refused:
        tracking.check_experiment(store, name)
    assert needs in str(refused.value)
    assert "\n" not in str(refused.value)
    run = store.client.create_run(experiment)
    with pytest.raises(InputError, match=f"the run {run.info.run_id} keeps its artifacts in"):
        tracking.fetch(store, run.info.run_id, "config.json", Path())
    monkeypatch.setenv("MLFLOW_RUN_ID", run.info.run_id)
    with pytest.raises(InputError, match=f"MLFLOW_RUN_ID={run.info.run_id}: the run keeps its artifacts in"):
        tracking.check_run(store, experiment="x", params={}, resume=True)


@pytest.mark.parametrize("location", ["file:///tmp/x", "/tmp/x", "ftp://host/path", "mlflow-artifacts:/x", "dbfs:/x"])
def test_what_needs_no_client_is_taken(store: tracking.Store, location: str) -> None:
    store.client.create_experiment(f"in {location}", artifact_location=location)
    tracking.check_experiment(store, f"in {location}")


def test_what_is_set_for_mlflow_and_not_followed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tracking.ignored(sweep=True) == []
    monkeypatch.setenv("MLFLOW_RUN_ID", "abc")
    for value, count in (("true", 1), ("1", 1), ("false", 0), ("", 0)):
        monkeypatch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", value)
        said = tracking.ignored(sweep=False)
        assert [text.partition(" ")[0] for text in said] == ["MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING"] * count
        assert len(tracking.ignored(sweep=True)) == count + 1


@pytest.mark.parametrize("uri", ["./mlruns", "file:///tmp/mlruns", "/tmp/mlruns", "C:\\runs\\mlruns", "file:."])
def test_a_plain_folder_is_refused(uri: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"tracking\.uri=.* is a folder.*sqlite:///"):
        tracking.connect(settings(uri), tmp_path)


@pytest.mark.parametrize("uri", ["sqlite://", "sqlite:///:memory:", "sqlite:///"])
def test_a_database_in_memory_is_refused(uri: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="give a file"):
        tracking.connect(settings(uri), tmp_path)


@pytest.mark.parametrize("uri", ["ftp://host/runs", "foo:bar", "nonsense://"])
def test_an_unknown_kind_of_store_is_refused(uri: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"tracking\.uri="):
        tracking.connect(settings(uri), tmp_path)


def test_outputs_whose_parent_is_a_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"outputs=.*file/outputs can't be written to"):
        tracking.connect(settings(), tmp_path / "file" / "outputs")


def test_outputs_that_nobody_may_write_to_are_refused() -> None:
    with pytest.raises(InputError, match="outputs=/proc/qexp can't be written to"):
        tracking.connect(settings(), Path("/proc/qexp"))


def test_a_file_that_is_no_database_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_text("hello, I am a text file\n" * 100)
    with pytest.raises(InputError, match=r"mlflow\.db can't be used.*not a database"):
        tracking.connect(settings(), tmp_path)


def test_a_database_of_another_mlflow_is_refused_with_what_to_do(empty: Path, tmp_path: Path) -> None:
    shutil.copy(empty, tmp_path)
    with sqlite3.connect(tmp_path / "mlflow.db") as connection:
        connection.execute("UPDATE alembic_version SET version_num = 'bd07f7e963c5'")
    with pytest.raises(InputError, match=r"mlflow db upgrade"):
        tracking.connect(settings(), tmp_path)


def test_odd_characters_in_the_path_are_kept(outputs: Path, store: tracking.Store, tmp_path: Path) -> None:
    odd = tmp_path / "my runs #1 é;&'+@ 中"
    odd.mkdir()
    other = tracking.connect(settings(), odd)
    with begin(other) as run:
        run.log_artifacts({"a b.txt": "text"})
    assert (odd / "artifacts" / run.id / "artifacts" / "a b.txt").read_text() == "text"
    assert sorted(path.name for path in tmp_path.iterdir()) == [odd.name]
    assert artifact(other, run, "a b.txt") == "text"


@pytest.mark.parametrize("name", ["100%41", "what?"])
def test_characters_that_an_sqlite_address_cannot_hold_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has a % or \? in its path"):
        tracking.connect(settings(), tmp_path / name)


def test_a_moved_outputs_folder_keeps_its_artifacts(empty: Path, tmp_path: Path) -> None:
    old, new = tmp_path / "old_outputs", tmp_path / "new"
    old.mkdir()
    shutil.copy(empty, old)
    before = tracking.connect(settings(), old)
    with begin(before, "early") as early:
        early.log_artifacts({"a.txt": "early"})
    old.rename(new)
    after = tracking.connect(settings(), new)
    assert artifact(after, early, "a.txt") == "early"
    with begin(after, "late") as late:
        late.log_artifacts({"a.txt": "late"})
    assert (new / "artifacts" / late.id / "artifacts" / "a.txt").exists()
    assert not old.exists()


@pytest.mark.slow
def test_making_the_tables_says_nothing_and_leaves_nothing_behind(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from tests.helpers.stores import begin, settings;"
        "from qexp import tracking; store = tracking.connect(settings(), Path(sys.argv[1])); begin(store).finish()"
    )
    children = [
        subprocess.Popen(
            [sys.executable, "-c", code, tmp_path / "outputs"],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for _ in range(3)
    ]
    said = [child.communicate(timeout=120)[0] for child in children]
    assert [child.returncode for child in children] == [0, 0, 0], said
    assert said == ["", "", ""]
    assert {path.name for path in (tmp_path / "outputs").iterdir()} == {"mlflow.db", ".mlflow.db.lock"}
    store = tracking.connect(settings(), tmp_path / "outputs")
    experiment = store.client.get_experiment_by_name("qexp/digits")
    assert len(store.client.search_runs([experiment.experiment_id])) == 3


def test_many_writers_at_once_lose_nothing(store: tracking.Store, caplog: pytest.LogCaptureFixture) -> None:
    parent = tracking.open_parent(store, experiment="qexp/digits", name="sweep", tags={})

    def work(index: int) -> None:
        for repeat in range(3):
            with begin(store, f"{index}.{repeat}", parent.id, **{f"p{i}": "x" for i in range(40)}) as run:
                run.log_result({f"m{i}": float(i) for i in range(40)}, {f"t{i}": "x" for i in range(30)})

    threads = [threading.Thread(target=work, args=(index,)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rows = tracking.children(store, parent.id)
    assert len(rows) == 18
    assert all(row.status == "FINISHED" and len(row.metrics) == 40 and len(row.params) == 40 for row in rows)
    # urllib3 has no part in SQLite: what it says is of a thread that another test's dead server left behind.
    warned = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert not [record for record in warned if not record.name.startswith("urllib3")]


# ----------------------------------------------------------------------------------------------------- servers


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("http://127.0.0.1:{port}", "can't be reached"),
        ("http://no-such-host.invalid:5000", "can't be reached"),
        ("http://", "no address of a server"),
        ("http://user:secret@127.0.0.1:{port}/", "can't be reached"),
    ],
)
def test_a_server_that_is_not_there_is_refused(uri: str, reason: str, tmp_path: Path) -> None:
    start = time.monotonic()
    with pytest.raises(InputError, match=reason) as refusal:
        tracking.connect(settings(uri.format(port=free_port())), tmp_path)
    assert time.monotonic() - start < 25
    assert "secret" not in str(refusal.value)


def test_a_server_that_never_answers_is_refused(tmp_path: Path) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        start = time.monotonic()
        with pytest.raises(InputError, match=rf"tracking\.uri={uri} (can't be reached|did not answer)"):
            tracking.connect(settings(uri, timeout=1), tmp_path)
        assert time.monotonic() - start < 15


def answering(status: int, body: bytes) -> str:
    """Address of a server that answers every request so."""
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_address[1]}"


@pytest.mark.parametrize(
    ("status", "body", "reason"),
    [
        (401, b"no", "refuses the credentials"),
        (403, b"no", "refuses the credentials"),
        (403, b"Invalid Host header - possible DNS rebinding attack detected", "403: Invalid Host header"),
        (404, b"<html>Jupyter</html>", "not as an MLflow server"),
        (200, b"<html>hello</html>", "not as an MLflow server"),
        (503, b"busy", "503: busy"),
    ],
)
def test_a_server_that_is_not_ours_is_refused(status: int, body: bytes, reason: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=reason):
        tracking.connect(settings(answering(status, body)), tmp_path)


def test_a_server_gets_runs_and_artifacts(
    server: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, kept = server
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address + "/")
    remote = tracking.connect(settings(), tmp_path / "outputs")
    assert remote.artifacts is None
    parent = tracking.open_parent(remote, experiment="qexp/digits", name="sweep", tags={})
    with begin(remote, "job", parent.id, a="1") as run:
        run.log_result({"m": 1.0, "n": math.inf}, {"study": "it's one"}, {"a/b.txt": "text", "c.txt": "top"})
    with pytest.raises(RunError), begin(remote, "broken", parent.id):
        raise RunError("broken.")
    tracking.close_parent(parent, "FAILED", {"finished": 1, "failed": 1})
    rows = tracking.children(remote, parent.id)
    assert [(row.name, row.status, row.tags.get("error")) for row in rows] == [
        ("job", "FINISHED", None),
        ("broken", "FAILED", "broken."),
    ]
    assert artifact(remote, run, "a/b.txt") == "text"
    assert [path.read_text() for path in kept.rglob("b.txt")] == ["text"]
    assert remote.client.get_experiment(run.experiment_id).artifact_location.startswith("mlflow-artifacts:")
    assert list((tmp_path / "outputs").iterdir()) == []
    (found,) = [row for row in tracking.of_study(remote, "it's one", ["qexp/digits", "none"]) if row.name == "job"]
    assert tracking.find(remote, run.id) == (found, "qexp/digits")
    fetched = tracking.fetch(remote, run.id, "c.txt", tmp_path)
    assert fetched is not None
    assert fetched.read_text() == "top"
    assert tracking.fetch(remote, run.id, "b.txt", tmp_path) is None
    with pytest.raises(InputError, match="there is no run 0000"):
        tracking.find(remote, "0" * 32)
    orphan = begin(remote, "orphan")
    remote.client.set_tag(orphan.id, "pid_started", "0")
    assert [row.name for row in tracking.close_orphans(remote)] == ["orphan"]
    remote.client.delete_run(parent.id)
    heir = tracking.open_parent(remote, experiment="qexp/digits", name="sweep", tags={})
    tracking.adopt(remote, heir.id, rows)
    assert [row.run_id for row in tracking.children(remote, heir.id)] == [row.run_id for row in rows]
    # A server whose experiments keep artifacts in its own folders has clients write to theirs.
    remote.client.create_experiment("unproxied", artifact_location="file:///srv/mlruns")
    tracking.check_experiment(remote, "unproxied")
    elsewhere = dataclasses.replace(remote, uri="http://mlflow.example.com")
    with pytest.raises(InputError, match=r"unproxied keeps its artifacts in .*/srv/mlruns, a folder of the server"):
        tracking.check_experiment(elsewhere, "unproxied")
    assert tracking.ui(remote, parent).command is None
    assert tracking.ui(remote, parent).url.startswith(f"{address}/#/experiments/")


# ---------------------------------------------------------------------------------------------------- models


@pytest.mark.slow
def test_a_registered_model_answers_as_the_run_did(
    qexp: Run, composed: Callable[..., Config], checkpoint: Path, tmp_path: Path
) -> None:
    """MLflow's own loaders load it in a fresh process without torch and qexp, one image at a time and all together."""
    settings = ("latency=off", f"model.checkpoint={checkpoint}", "runtimes=[onnxruntime]")
    done = qexp(*settings, "tracking.log_model=flavor", "tracking.registered_model=net")
    assert done.returncode == 0, done.stderr
    assert "mlflow models serve -m models:/net/1 --env-manager local" in done.stdout + done.stderr
    (predictions,) = tmp_path.glob("outputs/runs/*/predictions.npz")
    data = load_data(composed("model=tiny").dataset, None)
    np.save(tmp_path / "images.npy", normalise(data.test.pixels(), data.mean, data.std).numpy())
    code = """
import sys, mlflow, numpy as np
folder = sys.argv[1]
mlflow.set_tracking_uri(f"sqlite:///{folder}/outputs/mlflow.db")
images = np.load(folder + "/images.npy")
model = mlflow.pyfunc.load_model("models:/net/1")
one_by_one = [model.predict(images[i:i + 1])["logits"] for i in range(len(images))]
np.save(folder + "/logits.npy", [model.predict(images)["logits"], np.concatenate(one_by_one)])
assert mlflow.onnx.load_model("models:/net/1").graph.output[0].name == "logits"
facts = model.metadata.metadata
assert facts["opset"] == 21 and facts["shape"] == [3, 32, 32] and len(facts["mean"]) == 3, facts
assert model.input_example.shape == (1, 3, 32, 32) and np.array_equal(model.input_example, images[:1])
assert not {"torch", "qexp"} & set(sys.modules)
"""
    fresh = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, cwd=tmp_path)
    assert fresh.returncode == 0, fresh.stderr
    with np.load(predictions) as kept:
        for logits in np.load(tmp_path / "logits.npy"):
            np.testing.assert_allclose(logits, kept["int8"], atol=1e-3 * np.abs(kept["int8"]).max())
