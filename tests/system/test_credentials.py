"""No credential in what is written, logged or printed, whatever setting it came in by."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from qexp import tracking
from qexp.config import identity, schema, validation
from qexp.config.composition import as_yaml
from qexp.errors import ConfigError, InputError
from qexp.launch import callback, job, rerun
from qexp.system import credentials
from qexp.system.credentials import learn, masked, masked_tree
from tests.helpers.stores import settings

Composed = Callable[..., schema.Config]


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(credentials, "_known", set())


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql://fred:pw@host/db", "postgresql://fred:***@host/db"),
        ("mysql+pymysql://fred:pw@host:3306/db?charset=utf8", "mysql+pymysql://fred:***@host:3306/db?charset=utf8"),
        ("postgresql://fred:p/w@host/db", "postgresql://fred:***@host/db"),
        ("postgresql://fred:p@w@host/db", "postgresql://fred:***@host/db"),
        ("http://fred:pw@127.0.0.1:5000/#/x", "http://fred:***@127.0.0.1:5000/#/x"),
        ("https://ghp_0123@github.com/a/b", "https://***@github.com/a/b"),
        ("redis://:pw@host", "redis://:***@host"),
        ("s3://AKIA:pw/w@bucket/key", "s3://AKIA:***@bucket/key"),
        ("mlflow-artifacts://fred:pw@host:5000/x", "mlflow-artifacts://fred:***@host:5000/x"),
        ("postgresql:/fred:pw@host", "postgresql:/fred:***@host"),
        ("'tracking.uri=postgresql://fred:pw@host/db'", "'tracking.uri=postgresql://fred:***@host/db'"),
        ("two: http://a:b@c, http://d:e@f.", "two: http://a:***@c, http://d:***@f."),
        ("postgresql://host/db?user=fred&password=pw&x=1", "postgresql://host/db?user=fred&password=***&x=1"),
        ("https://h/f?X-Amz-Signature=1f&X-Amz-Date=2", "https://h/f?X-Amz-Signature=***&X-Amz-Date=2"),
        ("https://h/f?se=1&sig=a%2Fb", "https://h/f?se=1&sig=***"),
        ("AccountName=a;AccountKey=b==;Suffix=c", "AccountName=a;AccountKey=***;Suffix=c"),
        ("+dataset.hf_token=abc", "+dataset.hf_token=***"),
        ("+dataset.password='a b' seed=1", "+dataset.password=*** seed=1"),
        ("dataset={token:abc,root:x}", "dataset={token:***,root:x}"),
        ("{'api_key': 'abc', 'n': 1}", "{'api_key': ***, 'n': 1}"),
        ("dataset:\n  token: abc\n  root: x", "dataset:\n  token: ***\n  root: x"),
    ],
)
def test_what_is_told_by_its_place_is_masked(text: str, shown: str) -> None:
    assert masked(text) == shown
    assert masked(shown) == shown


@pytest.mark.parametrize(
    "text",
    [
        "http://127.0.0.1:5000/#/experiments/1?x=a@b",
        "http://host:8080/a@b",
        "sqlite:////data/a:b@c/mlflow.db",
        "postgresql://fred@host/db",
        "fred@host: no such user",
        "kernel_signature=0123 +model.class_token=cls model.num_tokens=4",
        "+dataset.token=${oc.env:HF_TOKEN}",
        "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN.",
        "accuracy/int8 0.9 → 0.8, 7 of 7",
    ],
)
def test_what_is_none_is_left_as_it_is(text: str) -> None:
    assert masked(text) == text


def test_what_stood_in_a_place_is_found_where_it_stands_alone() -> None:
    learn({"tracking": {"uri": "postgresql://fred:s3cr3t @'w@host/db"}, "dataset": {"token": "h%6Frse"}})
    learn(["http://me:digits@host", "+dataset.api_key=0123456789abcdef"])
    assert masked("no host s3cr3t @'w, nor h%6Frse, horse, 0123456789abcdef;") == "no host ***, nor ***, horse, ***;"
    assert masked("s3cr3t @'wide") == "s3cr3t @'wide"
    # A word that is as plain as this one stands for other things.
    assert masked("qexp/digits") == "qexp/digits"


def test_what_the_environment_holds_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "pw-of-mlflow-1")
    monkeypatch.setenv("HF_TOKEN", "hf_0123")
    monkeypatch.setenv("https_proxy", "http://me:pr0xy-pw@proxy:3128")
    monkeypatch.setenv("PWD", "/home/fred/qexp")
    credentials.learn_environment()
    assert masked("pw-of-mlflow-1, hf_0123, pr0xy-pw, /home/fred/qexp") == "***, ***, ***, /home/fred/qexp"


def test_a_log_line_has_none_whatever_the_handlers_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, styled = logging.FileHandler(tmp_path / "plain"), logging.FileHandler(tmp_path / "styled")
    styled.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    monkeypatch.setattr(logging.root, "handlers", [plain, styled])
    for _ in range(2):
        credentials.keep_out_of_logs()
    try:
        raise ValueError("http://me:pw@host")
    except ValueError:
        logging.getLogger("x").exception("at %s", "http://me:pw@host")
    assert (tmp_path / "plain").read_text().startswith("at http://me:***@host\nTraceback")
    styled_text = (tmp_path / "styled").read_text()
    assert styled_text.startswith("ERROR at http://me:***@host\nTraceback")
    assert styled_text.endswith("ValueError: http://me:***@host\n")


# ------------------------------------------------------------------------------------------------ settings


GIVEN = ("tracking.uri=postgresql://fred:{pw}@h/db", "+dataset.token={pw}", "+model.url=https://me:{pw}@h/net.pt")


def test_a_configuration_is_written_without_them_and_its_hash_is_of_none(composed: Composed) -> None:
    one, other = (composed(*(text.format(pw=pw) for text in GIVEN)) for pw in ("s3cr3t-1", "s3cr3t-2"))
    assert one.dataset["token"] == "s3cr3t-1"  # in memory it is what was given
    assert identity.plain(one) == identity.plain(other)
    assert identity.plain(one)["tracking"]["uri"] == "postgresql://fred:***@h/db"
    assert identity.plain(one)["dataset"]["token"] == "***"
    assert identity.plain(one)["model"]["url"] == "https://me:***@h/net.pt"
    assert identity.config_hash(one) == identity.config_hash(other)
    assert identity.config_hash(one) != identity.config_hash(composed(*(text.format(pw="p") for text in GIVEN[:2])))
    params = [identity.params(each, {}, {"+dataset.token": "", "+model.url": ""}) for each in (one, other)]
    assert params[0] == params[1]
    assert params[0]["dataset.token"] == "***"


def test_numbers_that_only_look_like_one_are_kept() -> None:
    tree = {"num_tokens": 4, "class_token": True, "password": 1234, "token": None, "tokens": ["a"], "secret": ["a"]}
    assert masked_tree(tree) == {**tree, "password": "***", "secret": ["***"]}


def test_what_hydra_composed_is_written_without_them_and_as_it_was(tmp_path: Path) -> None:
    node = {"token": "${oc.env:HF}", "n": 1e-3, "none": None}
    text = as_yaml({"a": {**node, "uri": "http://me:pw@host"}, "b": "${a.n}"})
    assert OmegaConf.to_container(OmegaConf.create(text)) == {"a": {**node, "uri": "http://me:***@host"}, "b": "${a.n}"}
    (tmp_path / "multirun.yaml").write_text("uri: http://me:pw@host\n")
    callback.mask_file(tmp_path / "multirun.yaml")
    assert (tmp_path / "multirun.yaml").read_text() == "uri: http://me:***@host\n"
    callback.mask_file(tmp_path / "missing")


def test_a_mask_in_place_of_a_credential_is_refused(
    composed: Composed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"tracking\.uri=http://me:\*\*\*@host: \*\*\* stands for a credential"):
        validation.check(composed("tracking.uri=http://me:***@host"))
    with pytest.raises(ConfigError, match=r"dataset\.token=\*\*\*: \*\*\* stands for a credential"):
        validation.check(composed("+dataset.token='***'"))
    validation.check(composed("tracking.name='*** seed=1'"))  # as a job of a sweep may be called
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:***@host")
    with pytest.raises(InputError, match=r"MLFLOW_TRACKING_URI=http://me:\*\*\*@host: \*\*\* stands for"):
        tracking.connect(settings(), tmp_path)


def test_a_folder_is_not_named_after_one() -> None:
    callback.refuse_credentials("outputs/seed=1", "hydra.sweep.subdir")
    with pytest.raises(ConfigError, match=r"hydra\.sweep\.subdir would name a folder after a credential"):
        callback.refuse_credentials("outputs/tracking.uri=http:/me:pw@host,seed=1", "hydra.sweep.subdir")


def test_a_rerun_takes_them_from_what_is_given_now() -> None:
    recorded = {"dataset": {"token": "***", "url": ["https://me:***@h/a"]}, "tracking": {"uri": "http://a:***@b"}}
    now = {"dataset": {"token": "t", "url": ["https://me:pw@h/a"]}, "tracking": {"uri": None}}
    whole = {name: rerun._with_credentials("id", value, now[name], name) for name, value in recorded.items()}
    assert whole == {"dataset": now["dataset"], "tracking": recorded["tracking"]}
    for other in ({"token": "t", "url": ["https://me:pw@elsewhere/a"]}, {"token": "t"}):
        with pytest.raises(InputError, match=r"rerun=id: dataset\.url=.* was given with a credential, .* give dataset"):
            rerun._with_credentials("id", recorded["dataset"], other, "dataset")


# --------------------------------------------------------------------------------------------------- MLflow


def everywhere(folder: Path) -> Iterator[bytes]:
    """The content of every file in a folder, and its name."""
    for path in folder.rglob("*"):
        yield str(path).encode()
        if path.is_file():
            yield path.read_bytes()


def broken(logged: None, uri: str) -> None:
    raise ValueError(f"can't parse {uri}")


def test_a_store_gets_none(empty: Path, tmp_path: Path) -> None:
    outputs = tmp_path / "outputs"
    outputs.mkdir()
    (outputs / "mlflow.db").write_bytes(empty.read_bytes())
    store = tracking.connect(settings(), outputs)
    uri = "postgresql://fred:s3cr3t-pw@host/db"
    given = {"params": {"a": uri, "long": f"{uri} " * 500}, "tags": {"command": uri}}
    run = tracking.start_run(store, experiment="x", name=f"run of {uri}", **given)  # type: ignore[arg-type]
    use = tracking.DatasetUse("d", "0123", "https://me:s3cr3t-pw@host/images", "evaluation")
    files = {"a.txt": uri, "b.json": {"token": "s3cr3t-pw", "x": [uri]}}
    with pytest.raises(ValueError, match="s3cr3t"), run:
        broken(run.log_result({}, {"t": uri}, files, [use], {"r": uri}), uri)
    data = store.client.get_run(run.id).data
    assert data.tags["error"] == "ValueError: can't parse postgresql://fred:***@host/db"
    assert (
        "ValueError: can't parse postgresql://fred:***@host/db"
        in Path(store.client.download_artifacts(run.id, "traceback.txt")).read_text()
    )
    assert not [content for content in everywhere(outputs) if b"s3cr3t" in content]


PRIVATE = """
import logging


def make(split, token):
    from qexp.data import builtin

    print("printed", token)
    logging.getLogger("private").warning("logged %s", token)
    if token != "h4rd-t0ken":
        raise ValueError(f"{token} is not the one")
    return builtin.digits(split)
"""


@pytest.mark.slow
def test_neither_the_outputs_nor_a_server_nor_the_terminal_gets_to_see_one(
    qexp: Callable[..., subprocess.CompletedProcess[str]],
    server: tuple[str, Path],
    tmp_path: Path,
) -> None:
    (tmp_path / "private.py").write_text(PRIVATE)
    address, kept = server
    uri = address.replace("://", "://fred:s3cr3t-pw@")
    data = ["dataset=custom", "dataset._target_=private.make"]
    mine = tmp_path / "conf" / "mine" / "server.yaml"
    mine.parent.mkdir(parents=True)
    mine.write_text(f"# @package _global_\ntracking:\n  uri: {uri}\n")
    seen = []

    def run(*arguments: str, code: int = 0, **environment: str) -> str:
        done = qexp("latency=off", *data, *arguments, env=environment)
        assert done.returncode == code, done.stderr
        seen.append(done.stdout + done.stderr)
        return done.stdout

    out = run("+dataset.token=h4rd-t0ken", f"tracking.uri={uri}")
    assert "printed ***" in out
    run("+dataset.token=h4rd-t0ken", f"tracking.uri={uri}", "seed=1", "-m")
    token = "+dataset.token=${oc.env:PRIVATE}"
    run(token, PRIVATE="h4rd-t0ken", MLFLOW_TRACKING_URI=uri)
    run(token, "+mine=server", "-m", "--config-dir=conf", PRIVATE="h4rd-t0ken")
    run("+dataset.token=wr0ng-t0ken", f"tracking.uri={uri}", code=1)
    secrets = [b"s3cr3t-pw", b"h4rd-t0ken", b"wr0ng-t0ken"]
    for content in [*everywhere(tmp_path / "outputs"), *everywhere(kept), *everywhere(kept.parent)]:
        assert not [secret for secret in secrets if secret in content], content[:200]
    for text in seen:
        assert not [secret for secret in secrets if secret.decode() in text], text
    written = {name: list((tmp_path / "outputs").rglob(f".hydra/{name}.yaml")) for name in ("config", "overrides")}
    assert min(map(len, written.values())) >= 4
    for files in written.values():
        assert any("fred:***@" in file.read_text() for file in files)


def test_the_command_that_is_told_and_recorded_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["qexp", "tracking.uri=http://me:pw@host", "+dataset.token=it's"])
    assert job.command() == "python -m qexp 'tracking.uri=http://me:***@host' '+dataset.token=***'"
