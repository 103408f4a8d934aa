"""Stores of runs: SQLite files, and a real `mlflow server` on 127.0.0.1."""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from qexp import tracking
from qexp.config import schema


def settings(uri: str | None = None, experiment: str | None = None, timeout: float = 5.0) -> schema.Tracking:
    return schema.Tracking(
        uri=uri, experiment=experiment, log_model=schema.LogModel.none, timeout=timeout, parent=None, name=None
    )


@pytest.fixture(scope="session")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database without runs, to be copied: making one costs 3 s."""
    folder = tmp_path_factory.mktemp("empty")
    tracking.connect(settings(), folder)
    return folder / "mlflow.db"


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


@pytest.fixture(scope="session")
def server(empty: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """A tracking server that stores artifacts itself: its address, and its folder of artifacts."""
    folder = tmp_path_factory.mktemp("server")
    shutil.copy(empty, folder / "server.db")
    with serving(f"sqlite:///{folder / 'server.db'}", folder, free_port()) as address:
        yield address, folder / "kept"


@contextlib.contextmanager
def serving(database: str, folder: Path, port: int) -> Iterator[str]:
    """Within the context an `mlflow server` runs, which is killed at its end; yields its address.

    It keeps artifacts in `folder`/kept.
    """
    command = ["server", "--backend-store-uri", database, "--artifacts-destination", str(folder / "kept")]
    command += ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    with (folder / "log").open("a") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", *command], cwd=folder, stdout=log, stderr=log, start_new_session=True
        )
    address = f"http://127.0.0.1:{port}"
    # An opener of its own: urllib's global one keeps whatever proxy another test had set when it was made.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        until = time.monotonic() + 240  # 20 s, and several times that where other tests run beside it
        while time.monotonic() < until and process.poll() is None:
            try:
                opener.open(f"{address}/health", timeout=2)
                break
            except OSError:
                time.sleep(0.2)
        else:
            pytest.fail((folder / "log").read_text()[-2000:])
        yield address
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


FIRST, SECOND, GROUP = 54_001, 54_002, 54_003
NOBODY = 65_534  # whom every Linux knows by name, as PostgreSQL wants it


def as_user(user: int) -> list[str]:
    """The beginning of a command line that another user is to run, who may read what root can; for root alone."""
    can_read = ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]
    return ["setpriv", f"--reuid={user}", f"--regid={GROUP}", "--clear-groups", *can_read]


POSTGRES = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
NEEDS_POSTGRES = pytest.mark.skipif(
    not POSTGRES or not importlib.util.find_spec("psycopg2"),
    reason="needs PostgreSQL (/usr/lib/postgresql) and psycopg2",
)


@pytest.fixture
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of an empty database of a server of its own."""
    folder = tmp_path_factory.mktemp("postgres")
    user = as_user(NOBODY) if os.geteuid() == 0 else []
    if user:
        os.chown(folder, NOBODY, GROUP)
    data, port = str(folder / "data"), str(free_port())
    environment = {**os.environ, "LC_ALL": "C"}
    programs = POSTGRES[-1]

    def run(program: str, *arguments: str) -> None:
        command = [*user, str(programs / program), *arguments]
        subprocess.run(command, cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)

    run("initdb", "-D", data, "-U", "qexp", "-A", "trust")
    listening = f"-p {port} -k '' -h 127.0.0.1"
    run("pg_ctl", "-D", data, "-o", listening, "-l", str(folder / "log"), "-w", "start")
    try:
        yield f"postgresql+psycopg2://qexp@127.0.0.1:{port}/postgres"
    finally:
        run("pg_ctl", "-D", data, "-m", "immediate", "stop")


def begin(store: tracking.Store, name: str = "run", parent: str | None = None, **params: str) -> tracking.Run:
    return tracking.start_run(store, experiment="qexp/digits", name=name, params=params, tags={}, parent=parent)


def table(folder: Path) -> list[dict[str, Any]]:
    """Every run under folder/outputs that wasn't deleted: its id, name, status and tags."""
    store = folder / "outputs" / "mlflow.db"
    if not store.exists():
        return []
    with contextlib.closing(sqlite3.connect(store, timeout=20)) as connection:
        tags: dict[str, dict[str, str]] = {}
        for run_id, key, value in connection.execute("select run_uuid, key, value from tags"):
            tags.setdefault(run_id, {})[key] = value
        rows = connection.execute(
            "select run_uuid, name, status from runs where lifecycle_stage = 'active' order by start_time"
        )
        return [
            {"id": run_id, "name": name, "status": status, "tags": tags.get(run_id, {})}
            for run_id, name, status in rows.fetchall()
        ]


def jobs_of(folder: Path, study: str | None = None) -> list[dict[str, Any]]:
    """The runs of jobs, without the sweeps' own."""
    runs = [run for run in table(folder) if tracking.SWEEP_TAG not in run["tags"]]
    return [run for run in runs if study is None or run["tags"].get("study") == study]


def sweeps_of(folder: Path, study: str | None = None) -> list[dict[str, Any]]:
    """The parent runs of sweeps."""
    runs = [run for run in table(folder) if tracking.SWEEP_TAG in run["tags"]]
    return [run for run in runs if study is None or run["tags"].get("study") == study]


class Line:
    """A connection to a server that can be cut and mended, as when it is restarted.

    address: in place of the server's own; drop_answers: so many requests reach the server, and their answers are lost.
    """

    def __init__(self, address: str) -> None:
        self._server = urllib.parse.urlsplit(address)
        self._port = free_port()
        self._listening: ThreadingHTTPServer | None = None
        self.address = f"http://127.0.0.1:{self._port}"
        self.drop_answers = 0
        self.mend()

    def cut(self) -> None:
        assert self._listening is not None
        self._listening.shutdown()
        self._listening.server_close()
        self._listening = None

    def mend(self) -> None:
        line = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                connection = http.client.HTTPConnection(str(line._server.hostname), line._server.port)
                headers = {name: value for name, value in self.headers.items() if name.lower() != "host"}
                connection.request(self.command, self.path, body, headers)
                answer = connection.getresponse()
                content = answer.read()
                connection.close()
                if line.drop_answers:
                    line.drop_answers -= 1
                    return
                self.send_response(answer.status)
                for name, value in answer.getheaders():
                    if name.lower() not in ("transfer-encoding", "content-length", "date", "server"):
                        self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_POST = do_PUT = do_PATCH = do_DELETE = do_GET

            def log_message(self, format: str, *args: object) -> None: ...

        self._listening = ThreadingHTTPServer(("127.0.0.1", self._port), Handler)
        threading.Thread(target=self._listening.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()


@pytest.fixture
def line(server: tuple[str, Path]) -> Iterator[Line]:
    """A line to the tracking server that can be cut."""
    made = Line(server[0])
    yield made
    if made._listening is not None:
        made.cut()
