"""Databases that MLflow keeps runs in: SQLite files and database servers, made and checked."""

from __future__ import annotations

import logging
import sqlite3
import tempfile
import threading
import time
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import Timeout
from mlflow.exceptions import MlflowException
from mlflow.store.db.utils import _all_tables_exist, _initialize_tables, create_sqlalchemy_engine
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
from sqlalchemy import Connection, text
from sqlalchemy.exc import SQLAlchemyError

from qexp.errors import InputError
from qexp.system import file_lock
from qexp.system.credentials import masked
from qexp.tracking.errors import first_line, in_thread, unusable
from qexp.tracking.values import user

log = logging.getLogger(__name__)


BESIDE_TAG = "qexp.artifacts_beside_database"
DATABASES = ("postgresql", "mysql", "mssql")  # what MLflow takes beside SQLite, as the scheme of an address
SQLITE_SECONDS = 20.0  # how long a database that another process writes to is waited for
LOCK_SECONDS = 120.0  # creating the tables takes 3 s, and several times that on a busy machine
# How one process at a time is let in, and lets go, in SQL: the first gives 1 or true where it is.
DATABASE_LOCKS = {
    "postgresql": ("SELECT pg_try_advisory_lock(7239471)", "SELECT pg_advisory_unlock(7239471)"),
    "mysql": ("SELECT GET_LOCK('qexp', 0)", "SELECT RELEASE_LOCK('qexp')"),
}


def _is_wanted(record: logging.LogRecord) -> bool:
    """False for an error of the database, which MLflow raises too: it would print the traceback beside our sentence."""
    return not str(record.msg).startswith("SQLAlchemy database error.")


logging.getLogger("mlflow.store.db.utils").addFilter(_is_wanted)


def sqlite_path(uri: str, folder: Path, setting: str) -> Path:
    path = urllib.parse.unquote(uri.removeprefix("sqlite:///"))
    if not uri.startswith("sqlite:///") or path in ("", ":memory:") or path.startswith("file:"):
        raise InputError(
            f"{setting}={uri} keeps nothing that could be looked at later; give a file: sqlite:///path/mlflow.db."
        )
    return folder / path


def open_sqlite(path: Path, artifacts: Path, setting: str) -> str:
    """URI of the SQLite store at `path`, made if missing. Raises InputError where it isn't a usable one."""
    if set("%?") & set(str(path)):
        raise InputError(f"{setting} has a % or ? in its path, which SQLite's addresses can't hold; choose another.")
    uri, lock = f"sqlite:///{path}", path.with_name(f".{path.name}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # MLflow's own first migration is not safe against a second process, whatever it tries.
        with file_lock.acquire(lock, "looks at this store", LOCK_SECONDS):
            if not path.exists() or path.stat().st_size == 0:
                _create_sqlite(path, artifacts)
            _check_sqlite(path, setting)
            if path == artifacts.with_name("mlflow.db"):
                _follow_moved_artifacts(path, artifacts.as_uri())
    except Timeout as error:
        raise InputError(
            f"{setting}: {file_lock.holder(lock)} has held {lock} for {LOCK_SECONDS:.0f} s; end it, or choose "
            f"another folder."
        ) from error
    except OSError as error:
        raise InputError(f"{setting} can't be written to ({error.strerror}); choose another folder.") from error
    except ValueError as error:
        raise unusable(error, setting) from error
    return uri


def _create_sqlite(path: Path, artifacts: Path) -> None:
    # Built beside it and moved into place when whole: a process killed half-way through MLflow's migration would
    # leave a file that no later one can use.
    with tempfile.TemporaryDirectory(prefix=".mlflow-", dir=path.parent) as folder, _quiet_migration():
        new = Path(folder) / path.name
        new.touch()  # SQLite itself would keep it from the user's group, whatever the umask allows
        SqlAlchemyStore(f"sqlite:///{new}", artifacts.as_uri()).engine.dispose()
        new.replace(path)


@contextmanager
def _quiet_migration() -> Iterator[None]:
    """Without the two lines that say that the tables are being made."""

    def wanted(record: logging.LogRecord) -> bool:
        return record.msg not in ("Creating initial MLflow database tables...", "Updating database tables")

    source = logging.getLogger("mlflow.store.db.utils")
    source.addFilter(wanted)
    try:
        yield
    finally:
        source.removeFilter(wanted)


def _check_sqlite(path: Path, setting: str) -> None:
    """Raise InputError where the database can't be written to; MLflow would retry for 100 s and print a long error."""
    try:
        connection = sqlite3.connect(path, timeout=SQLITE_SECONDS)
        try:
            connection.execute("BEGIN IMMEDIATE")
            # A transaction may begin where nothing can be written, to the file or beside it.
            connection.execute("CREATE TABLE qexp_can_write (value)")
            connection.rollback()
        finally:
            connection.close()
    except sqlite3.DatabaseError as error:
        kind = error.sqlite_errorname
        if kind.startswith(("SQLITE_READONLY", "SQLITE_CANTOPEN", "SQLITE_PERM")):
            reason = f"can't be written to by {user()} ({error}); let its owner allow it, as with chmod g+w, or set"
            raise InputError(f"{setting}: MLflow's database {path} {reason} another folder, outputs=path.") from error
        if kind.startswith("SQLITE_BUSY"):
            reason = f"has been locked by another process for {SQLITE_SECONDS:.0f} s; end that one"
            raise InputError(f"{setting}: MLflow's database {path} {reason}.") from error
        if kind.startswith("SQLITE_FULL"):
            where = f"the disk has no room left for MLflow's database {path}"
            raise InputError(f"{setting}: {where}; free some, and give the same command again.") from error
        raise InputError(f"{setting}: {path} can't be used as MLflow's database ({error}); move it away.") from error


def open_database(uri: str, setting: str, timeout: float) -> None:
    """Make MLflow's tables in a database server where they are missing. Raises InputError where it can't be reached.

    As `_probe`, in a thread of its own. MLflow would try for 100 s, and its first migration fails where another process
    begins it at the same moment, on whatever machine: hence a lock of the database's own.
    """
    shown = masked(uri)
    waiting = threading.Event()

    def make_tables() -> None:
        engine = create_sqlalchemy_engine(uri)
        try:
            with engine.connect() as connection:
                waiting.set()
                with _database_lock(connection, setting, shown), _quiet_migration():
                    if not _all_tables_exist(engine):
                        _initialize_tables(engine)
        finally:
            engine.dispose()

    made = in_thread(make_tables)
    try:
        try:
            made.result(timeout=2 * timeout + 1)
        except TimeoutError:
            if not waiting.is_set():
                advice = "start it, mend the address, or leave it unset for a local store"
                raise InputError(f"{setting}={shown} did not answer within {2 * timeout + 1:g} s; {advice}.") from None
            made.result(timeout=2 * LOCK_SECONDS)
    except (SQLAlchemyError, MlflowException, ImportError, ValueError, OSError) as error:
        reason = first_line(getattr(error, "orig", None) or error)
        advice = ", the driver; install it, or name another in the scheme" if isinstance(error, ImportError) else ""
        raise InputError(f"{setting}={shown} can't be used: {reason}{advice}.") from error


@contextmanager
def _database_lock(connection: Connection, setting: str, shown: str) -> Iterator[None]:
    """Held by one process of all that use a database server, where it has such locks; a lost connection ends it."""
    take, release = DATABASE_LOCKS.get(connection.dialect.name, ("SELECT 1", "SELECT 1"))
    deadline = time.monotonic() + LOCK_SECONDS
    while not connection.execute(text(take)).scalar():
        if time.monotonic() > deadline:
            raise InputError(f"{setting}={shown}: another process has been making its tables for {LOCK_SECONDS:.0f} s.")
        time.sleep(0.1)
    try:
        yield
    finally:
        connection.execute(text(release))


def _follow_moved_artifacts(path: Path, artifacts: str) -> None:
    """Point the runs of a moved (or copied) outputs folder to the artifacts that lie beside their database.

    MLflow stores artifact locations as absolute paths. Without this, old artifacts would be missing in the UI, and
    new ones would be written into the old folder, made again for it.
    """
    connection = sqlite3.connect(path, timeout=SQLITE_SECONDS)
    try:
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master")}
        if "logged_models" not in tables:  # of an older MLflow, which its own check refuses
            return
        rows = connection.execute(
            "SELECT DISTINCT artifact_location FROM experiments JOIN experiment_tags USING (experiment_id) "
            "WHERE key = ?",
            (BESIDE_TAG,),
        )
        for (old,) in rows.fetchall():
            if old != artifacts:
                log.info("outputs has moved: artifacts recorded in %s are looked for in %s", old, artifacts)
                for table, column in (
                    ("experiments", "artifact_location"),
                    ("runs", "artifact_uri"),
                    ("logged_models", "artifact_location"),
                ):
                    connection.execute(
                        f"UPDATE {table} SET {column} = ? || substr({column}, ?) "
                        f"WHERE substr({column} || '/', 1, ?) = ?",
                        (artifacts, len(old) + 1, len(old) + 1, old + "/"),
                    )
        connection.commit()
    finally:
        connection.close()
