"""Messages for errors of MLflow, its server or its database."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

import requests
from mlflow.exceptions import MlflowException

from qexp.errors import InputError, QexpError, one_line
from qexp.system.credentials import masked
from qexp.tracking.values import TAG_LENGTH

if TYPE_CHECKING:
    from qexp.tracking.store import Store

T = TypeVar("T")

# Of a server that is there and can't answer now.
BUSY = {"TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED", "RESOURCE_EXHAUSTED"}


def sentence(error: BaseException) -> str:
    """An error in one line, without credentials: ours as they are, others with their type before them."""
    return masked(" ".join(str(error).split()) if isinstance(error, QexpError) else one_line(error, TAG_LENGTH))


@contextmanager
def refused(store: Store, what: str) -> Iterator[None]:
    try:
        yield
    except (MlflowException, requests.RequestException) as error:
        if is_lost(error):
            shown = masked(store.uri)
            raise InputError(f"MLflow at {shown} can't be reached for {what} ({root_cause(error)}).") from error
        raise InputError(f"MLflow at {masked(store.uri)} refuses {what}: {first_line(error)}.") from error


def unusable(error: BaseException, what: str) -> InputError:
    """An error that names the cause: a library's environment variable where the error is about one, else `what`."""
    said = first_line(error)
    variables = variables_in(said)
    blamed = f"the environment variable {' or '.join(variables)}" if variables else what
    return InputError(f"{blamed} can't be used: {said}.")


def variables_in(text: str) -> list[str]:
    """The environment variables of MLflow or requests that an error's text mentions, by name or value."""
    known = ("MLFLOW_", "REQUESTS_", "CURL_")
    return sorted(
        name
        for name, value in os.environ.items()
        if name.startswith(known)
        and name != "MLFLOW_TRACKING_URI"
        and (name in text or (len(value) > 2 and f" {value}" in f" {text}"))
    )


def of_proxy(error: BaseException | None) -> bool:
    """True if a proxy can't be reached."""
    while error is not None:
        if isinstance(error, requests.exceptions.ProxyError):
            return True
        error = error.__cause__ or error.__context__
    return False


def first_line(error: BaseException) -> str:
    """The first line that says something: SQLAlchemy may begin with how it came to write what then failed."""
    lines = str(error).strip().split("\n")
    told = [line for line in lines if not line.startswith("(raised as a result of Query-invoked autoflush")]
    return masked((told or lines)[0].rstrip("."))


def root_cause(error: BaseException) -> str:
    """The last clause of requests' nested messages, as `Connection refused`."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    text = str(getattr(error, "strerror", None) or error)
    return text.strip().split("\n")[0].rstrip(".")


def is_lost(error: BaseException | None) -> bool:
    """True if an error is of a server that could not be reached, has not answered, or can't now."""
    return any(
        isinstance(one, requests.ConnectionError | requests.Timeout | requests.exceptions.ChunkedEncodingError)
        or is_answered(one)
        for one in _causes(error)
    )


def is_answered(error: BaseException) -> bool:
    """True for answers such as 503, which proxies give for a server too."""
    return any(
        isinstance(one, requests.exceptions.RetryError) or (isinstance(one, MlflowException) and one.error_code in BUSY)
        for one in _causes(error)
    )


def is_refused(error: BaseException) -> bool:
    """True if no connection was made, so that no request was sent."""
    return any(isinstance(one, ConnectionRefusedError) for one in _causes(error))


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def in_thread(call: Callable[[], T]) -> Future[T]:
    """Start a call in a daemon thread, where no signal interrupts it and where waiting for it can have a limit."""
    future: Future[T] = Future()

    def work() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, name="qexp-tracking", daemon=True).start()
    return future
