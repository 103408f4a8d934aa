"""Downloads that leave a complete file or none."""

from __future__ import annotations

import secrets
import urllib.request
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

TIMEOUT = 15.0  # seconds without a response
_CHUNK = 1 << 16


def download(url: str, path: Path, is_right: Callable[[Path], bool]) -> None:
    """Fetch `url` to `path`, whose folder is created, with a progress bar where stderr is a terminal.

    is_right: checks the file before it is put at `path`. Raises OSError, whose text says why `url` could not be
    fetched, and leaves no partial file.
    """
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")  # the folder may be shared with other hosts
    path.parent.mkdir(parents=True, exist_ok=True)
    request = urllib.request.Request(url, headers={"User-Agent": "qexp"})
    try:
        # urlopen would keep the proxies that the environment named at its first call.
        opener = urllib.request.build_opener()
        with opener.open(request, timeout=TIMEOUT) as response, partial.open("wb") as file:
            total = int(response.headers.get("Content-Length") or 0) or None
            with tqdm(desc=path.name, total=total, unit="B", unit_scale=True, disable=None, leave=False) as bar:
                while chunk := response.read(_CHUNK):
                    file.write(chunk)
                    bar.update(len(chunk))
        if not is_right(partial):
            raise OSError("the file that came has another checksum than it should")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
