"""Results that a tracking server has not taken: kept as files in `outputs`/unsent, and sent when it is back.

The file names the run and what was found; predictions and models stay where the run has written them.
"""

from __future__ import annotations

import fcntl
import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import requests
from mlflow.exceptions import MlflowException

from qexp.errors import RunError
from qexp.system.credentials import masked
from qexp.tracking.errors import is_lost, root_cause, sentence
from qexp.tracking.run import DatasetUse, Run
from qexp.tracking.store import Store

log = logging.getLogger(__name__)

FOLDER = "unsent"


@dataclass(frozen=True)
class Outcome:
    """The outcome of a run, as `Run.log_result` takes it. files: by their path in the run; status: that it ends with;
    at: ms since the epoch."""

    metrics: Mapping[str, float]
    tags: Mapping[str, str]
    files: Mapping[str, Path]
    datasets: Sequence[DatasetUse]
    params: Mapping[str, str]
    status: str = "FINISHED"
    at: int = field(default_factory=lambda: int(time.time() * 1000))


def deliver(run: Run, outcome: Outcome, outputs: Path) -> None:
    """Log a run's outcome and end it.

    While a server has not taken all of it, it is kept in `outputs`/unsent: where the server can't be reached for longer
    than it is waited for, or this process ends, `send_unsent` sends it. Raises RunError where the store doesn't take
    it.
    """
    if not run.store.is_server:
        _send(run, outcome)
        return
    file = outputs / FOLDER / f"{run.id}.json"
    written = file.with_suffix(".new")
    written.parent.mkdir(parents=True, exist_ok=True)
    written.write_text(_text(run, outcome), encoding="utf-8")
    with _locked(written):
        written.replace(file)
        run.status = "UNSENT"  # it stays open, whatever ends this
        try:
            _send(run, outcome)
        except RunError as error:
            if is_lost(error):
                reason = f"MLflow at {masked(run.store.uri)} can't be reached ({root_cause(error)})"
                raise RunError(
                    f"{reason}; the results are kept in {file}, and the same command sends them when it is back."
                ) from error
            run.status = "RUNNING"
            file.unlink()
            raise
        file.unlink()


def send_unsent(store: Store, outputs: Path) -> None:
    """Send what `deliver` has kept for this server, but for what another process is sending; log what was sent."""
    sent = []
    for file in sorted((outputs / FOLDER).glob("*.json")):
        try:
            with _locked(file):
                kept = json.loads(file.read_text(encoding="utf-8"))
                if kept["uri"] != masked(store.uri):
                    continue
                found = store.client.get_run(file.stem)
                if found.info.status != "FINISHED":  # else only the file was left
                    _send(Run(store, found), _outcome(kept))
                    if "error" in found.data.tags:  # of an end that was taken for its own
                        store.client.delete_tag(file.stem, "error")
                file.unlink()
                sent.append(found.info.run_name)
        except (BlockingIOError, FileNotFoundError):  # of a process that is sending it, or has sent it
            continue
        except (RunError, MlflowException, requests.RequestException, OSError, ValueError, KeyError) as error:
            if is_lost(error):
                break
            log.warning("the results in %s can't be sent, and stay there: %s", file, sentence(error))
    if sent:
        names = ", ".join(map(repr, sent[:3])) + (", …" if len(sent) > 3 else "")
        log.warning("%d results that MLflow at %s had not taken are sent: %s.", len(sent), masked(store.uri), names)


def _send(run: Run, outcome: Outcome) -> None:
    """Each step can be repeated, and the last one makes it whole."""
    run.log_result(outcome.metrics, outcome.tags, outcome.files, outcome.datasets, outcome.params, at=outcome.at)
    run.finish(outcome.status)


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Raises BlockingIOError where another process has it, FileNotFoundError where it has gone."""
    with file.open("r+") as opened:  # NFS locks only what may be written
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


def _text(run: Run, outcome: Outcome) -> str:
    files = {name: str(path.absolute()) for name, path in outcome.files.items()}
    return json.dumps({"uri": masked(run.store.uri), **asdict(outcome), "files": files}, indent=1)


def _outcome(kept: dict[str, Any]) -> Outcome:
    files = {name: Path(path) for name, path in kept["files"].items()}
    datasets = [DatasetUse(**use) for use in kept["datasets"]]
    return Outcome(kept["metrics"], kept["tags"], files, datasets, kept["params"], kept["status"], kept["at"])
