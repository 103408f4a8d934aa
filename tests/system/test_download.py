"""Downloads leave a complete file or none."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from qexp.system.download import download


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """The address of a server of the files in tmp_path/served."""
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "file").write_bytes(bytes(100_000))

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path / "served"))) as http:
        Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()


def test_a_file_that_is_right_takes_its_place(server: str, tmp_path: Path) -> None:
    target = tmp_path / "new" / "folder" / "file"
    download(f"{server}/file", target, lambda path: path.stat().st_size == 100_000)
    assert target.read_bytes() == bytes(100_000)
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize(("name", "reason"), [("file", "another checksum"), ("nothing", "404")])
def test_of_one_that_is_not_nothing_stays(server: str, tmp_path: Path, name: str, reason: str) -> None:
    with pytest.raises(OSError, match=reason):
        download(f"{server}/{name}", tmp_path / "file", lambda path: False)
    assert not (tmp_path / "file").exists()
    assert not list(tmp_path.glob("*.part"))


def test_proxies_are_those_of_the_environment_now(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as environment:
        for variable in ("no_proxy", "NO_PROXY"):
            environment.delenv(variable, raising=False)
        environment.setenv("http_proxy", "http://127.0.0.1:9")  # nothing listens there
        with pytest.raises(OSError, match="refused"):
            download(f"{server}/file", tmp_path / "file", lambda path: True)
    download(f"{server}/file", tmp_path / "file", lambda path: True)
