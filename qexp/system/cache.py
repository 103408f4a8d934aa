"""The disk cache: arrays and files that are found by a key, written atomically, and verified whenever opened.

An entry is `<sha256 of the key>.npy`: a .npy file followed by a SHA-256 over everything before it. A truncated or
altered entry is therefore recognised and rebuilt. Using an entry sets its modification time; within `bounded`, new
entries replace the least recently used. A file in another library's format is `<sha256>.file`, and the entry beside it
holds its digest.

Where the folder is None nothing is cached: everything is computed, and stays in memory.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import math
import mmap
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from qexp.errors import InputError
from qexp.system import file_lock

log = logging.getLogger(__name__)

_SEAL = hashlib.sha256().digest_size
_CHUNK = 1 << 22
MAKES = "makes an entry of the cache that is needed here too"  # who holds an entry's lock
_DAMAGED = "the cache entry %s is damaged (%s); it is made anew"

# The most bytes that a folder may hold, set by `bounded`, and the size of each folder, as last measured plus additions.
_limit = math.inf
_sizes: dict[Path, int] = {}
# The memory maps of this process, with their entries' files.
_mapped: weakref.WeakKeyDictionary[mmap.mmap, Path] = weakref.WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class Entry:
    """array: read-only memory map; sha256: hex digest that covers its values, dtype and shape."""

    array: np.ndarray
    sha256: str


def array(folder: Path | None, key: str, make: Callable[[], np.ndarray]) -> np.ndarray:
    """The array cached in `folder` under `key`, as a read-only memory map; made by `make` and cached if there is none.

    `key` must name everything that the array depends on. Of several processes that ask for an entry at the same moment,
    one makes it. Raises InputError if the folder can't be written, or is full.
    """

    def write(path: Path) -> None:
        value = np.ascontiguousarray(make())
        _reserve(path, value.nbytes)
        with path.open("wb") as file:  # given a path, np.save would add .npy to it
            np.save(file, value, allow_pickle=False)

    if folder is None:
        return read_only(np.asarray(make()).view())
    return _entry(folder, key, write).array


def number(folder: Path | None, key: str, make: Callable[[], float]) -> float:
    """The number cached in `folder` under `key`; made by `make` and cached if there is none. As `array`."""
    return float(array(folder, key, lambda: np.array([make()]))[0])


def arrays(folder: Path | None, key: str, make: Callable[[], Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """As `array`, for several arrays by name, cached as one structured array and returned as copies in memory."""

    def packed() -> np.ndarray:
        fields = {name: np.asarray(value) for name, value in make().items()}
        record = np.empty(1, [(name, value.dtype, value.shape) for name, value in fields.items()])
        for name, value in fields.items():
            record[name][0] = value
        return record

    return _unpacked(array(folder, key, packed))


def find(folder: Path | None, key: str) -> np.ndarray | None:
    """The array cached in `folder` under `key`, as a read-only memory map; None where there is no intact entry."""
    found = None if folder is None else _open(_path(folder, key))
    return None if found is None else found.array


def find_arrays(folder: Path | None, key: str) -> dict[str, np.ndarray] | None:
    """As `find`, for arrays that `arrays` has cached."""
    packed = find(folder, key)
    return None if packed is None else _unpacked(packed)


def _unpacked(packed: np.ndarray) -> dict[str, np.ndarray]:
    return {name: np.array(packed[name][0]) for name in packed.dtype.names or ()}


def file(folder: Path | None, key: str, make: Callable[[Path], object], target: Path) -> str:
    """Put the file cached in `folder` under `key` at `target`, and return its SHA-256 in hex.

    Where there is none, `make` writes it to the path that it is given. `target` becomes a hard link to the cached file
    where the file system allows, else a copy. Raises InputError as `array` does.
    """
    if folder is None:
        target.unlink(missing_ok=True)  # it may be a hard link to an entry
        make(target)
        return digest_of(target)
    path = _path(folder, key)
    held, temporary = path.with_suffix(".file"), path.with_suffix(".making")

    def placed() -> str | None:
        digest = find(folder, key)
        if digest is None:
            return None
        try:
            _link(held, target)
        except FileNotFoundError:
            return None
        found = digest_of(target)
        if found != digest.tobytes().hex():
            log.info(_DAMAGED, held, "its checksum is wrong")
            target.unlink()
            return None
        with suppress(OSError):
            os.utime(held)
        return found

    def write() -> np.ndarray:
        temporary.unlink(missing_ok=True)
        make(temporary)
        with temporary.open("rb+") as made:
            os.fsync(made.fileno())
        temporary.replace(held)
        _sizes.pop(folder, None)  # so that it is measured again
        _link(held, target)  # before room is made, which may remove this entry too
        return np.frombuffer(bytes.fromhex(digest_of(target)), np.uint8)

    try:
        found = placed()
        if found is not None:
            return found
        folder.mkdir(parents=True, exist_ok=True)
        with file_lock.acquire(path.with_suffix(".file.lock"), MAKES):
            found = placed()  # another process may have made it while this one waited
            if found is None:
                _remove(path)
                found = array(folder, key, write).tobytes().hex()
    except OSError as error:
        raise _unwritable(folder, error) from error
    finally:
        _remove(temporary)
    return found


def _link(path: Path, target: Path) -> None:
    target.unlink(missing_ok=True)  # writing into a hard link would change the entry
    try:
        os.link(path, target)
    except OSError:  # no hard links here; or no file, for which the copy raises too
        shutil.copyfile(path, target)


def digest_of(path: Path) -> str:
    """The SHA-256 of a file, in hex."""
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


@contextmanager
def bounded(gigabytes: float) -> Iterator[None]:
    """Bound the size of cache folders within the context.

    After each new entry, the least recently used are removed until the folder takes no more than `gigabytes` (10^9
    bytes) or only entries that this process uses are left. Additions by other processes count from the next context on.
    """
    global _limit
    before, _limit = _limit, 1e9 * gigabytes
    _sizes.clear()
    try:
        yield
    finally:
        _limit = before


def _make_room(folder: Path, added: int) -> None:
    """Remove the least recently used entries where `added` bytes exceed the bound; only then is the folder measured."""
    if _limit == math.inf:
        return
    if folder in _sizes and _sizes[folder] + added <= _limit:
        _sizes[folder] += added
        return
    entries: list[tuple[int, int, Path]] = []
    for path in (*folder.glob("*.npy"), *folder.glob("*.file")):
        with suppress(FileNotFoundError):  # another process makes room, too
            status = path.stat()
            entries.append((status.st_mtime_ns, status.st_size, path))
    taken, in_use = sum(size for _, size, _ in entries), set(_mapped.values())
    for _, size, path in sorted(entries):
        if taken <= _limit:
            break
        if path not in in_use:
            # A process that has it mapped can still read it.
            _remove(path)
            taken -= size
            log.info("removed %s from the cache, which may hold %g GB", path, _limit / 1e9)
    _sizes[folder] = taken


def filled(
    folder: Path | None, key: str, shape: tuple[int, ...], dtype: Any, fill: Callable[[np.ndarray], None]
) -> Entry:
    """As `array`, for arrays larger than memory: `fill` writes into a memory map of `shape` and `dtype`."""
    if folder is None:
        return _filled(np.empty(shape, dtype), fill)

    def write(path: Path) -> None:
        target = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
        # The file is one hole now; writing into a hole when the disk is full kills the process with SIGBUS.
        _reserve(path, path.stat().st_size)
        fill(target)
        target.flush()

    return _entry(folder, key, write)


def scratch(folder: Path | None, shape: tuple[int, ...], dtype: Any, fill: Callable[[np.ndarray], None]) -> Entry:
    """As `filled`, without a key: on disk only as long as this process uses it."""
    if folder is None:
        return _filled(np.empty(shape, dtype), fill)
    size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            _allocate(file.fileno(), size)
            target = np.memmap(file, dtype=dtype, mode="r+", shape=shape)
    except OSError as error:
        raise _unwritable(folder, error) from error
    return _filled(target, fill)


def _filled(target: np.ndarray, fill: Callable[[np.ndarray], None]) -> Entry:
    fill(target)
    return Entry(read_only(target), _checksum(target.shape, target.dtype, hashlib.sha256(target.data).digest()))


def read_only(values: np.ndarray) -> np.ndarray:
    """The array itself, made read-only."""
    values.flags.writeable = False
    return values


def _path(folder: Path, key: str) -> Path:
    return folder / f"{hashlib.sha256(key.encode('utf-8', 'surrogateescape')).hexdigest()[:40]}.npy"


def _entry(folder: Path, key: str, write: Callable[[Path], None]) -> Entry:
    path = _path(folder, key)
    found = _open(path)
    if found is not None:
        return found
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = file_lock.acquire(path.with_suffix(".lock"), MAKES)
    except OSError as error:
        raise _unwritable(folder, error) from error
    with held:
        found = _open(path)  # another process may have made it while this one waited
        return found if found is not None else _make(folder, path, write)


def _make(folder: Path, path: Path, write: Callable[[Path], None]) -> Entry:
    # The lock is held, so a file of this name was left by a process that was killed.
    temporary = path.with_suffix(".tmp")
    try:
        temporary.unlink(missing_ok=True)
        temporary.touch()
        write(temporary)
        with temporary.open("r+b") as file:
            seal = _Content.of(file, sealed=False).seal()
            file.seek(0, os.SEEK_END)
            file.write(seal)
            file.flush()
            os.fsync(file.fileno())
        found = _open(temporary)
        if found is not None:
            temporary.replace(path)
            _make_room(folder, path.stat().st_size)
    except OSError as error:
        raise _unwritable(folder, error) from error
    finally:
        _remove(temporary)
    if found is None:
        raise InputError(
            f"the cache folder {folder} does not keep what is written to it; set cache.folder to one on another disk."
        )
    return found


def _open(path: Path) -> Entry | None:
    """The entry at `path`, or None where there is no intact one."""
    try:
        with path.open("rb") as file:
            found = _Content.of(file, sealed=True)
            file.seek(-_SEAL, os.SEEK_END)
            if file.read(_SEAL) != found.seal():
                raise ValueError("its checksum is wrong")
        values = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, EOFError) as error:
        log.info(_DAMAGED, path, error)
        return None
    _mapped[values._mmap] = path.with_suffix(".npy")
    with suppress(OSError):  # a read-only cache is used all the same
        os.utime(path)
    return Entry(values, found.sha256())


@dataclass(frozen=True)
class _Content:
    """Digests of a .npy file's header and values, from one pass, for the checksums of the file and of the values."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    header: bytes
    values: bytes

    @staticmethod
    def of(file: BinaryIO, sealed: bool) -> _Content:
        """Read an open file. Raises ValueError, EOFError or OSError where it is no intact .npy file."""
        size = os.fstat(file.fileno()).st_size - (_SEAL if sealed else 0)
        if size <= 0 or np.lib.format.read_magic(file) != (1, 0):
            raise ValueError("it is truncated")
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        offset = file.tell()
        if size != offset + math.prod(shape) * dtype.itemsize:
            raise ValueError("its size is wrong")
        file.seek(0)
        header = hashlib.sha256(file.read(offset))
        values = hashlib.sha256()
        if size > offset:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content, memoryview(content) as view:
                for start in range(offset, size, _CHUNK):
                    values.update(view[start : min(start + _CHUNK, size)])
        return _Content(shape, dtype, header.digest(), values.digest())

    def seal(self) -> bytes:
        return hashlib.sha256(self.header + self.values).digest()

    def sha256(self) -> str:
        return _checksum(self.shape, self.dtype, self.values)


def _checksum(shape: tuple[int, ...], dtype: np.dtype[Any], values: bytes) -> str:
    # without the header, whose text may differ between versions of numpy
    return hashlib.sha256(f"{dtype.str} {tuple(shape)} ".encode() + values).hexdigest()


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        log.debug("%s stays: %s", path, error)


def _reserve(path: Path, size: int) -> None:
    """Allocate `size` bytes for `path`; raises OSError at once where the disk has no room."""
    with path.open("r+b") as file:
        _allocate(file.fileno(), size)


def _allocate(descriptor: int, size: int) -> None:
    if hasattr(os, "posix_fallocate") and size:
        os.posix_fallocate(descriptor, 0, size)


def _unwritable(folder: Path, error: OSError) -> InputError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return InputError(
            f"the cache folder {folder} has no room for what is to be kept ({error.strerror}); free some, or set "
            "cache.folder to one on another disk."
        )
    return InputError(
        f"the cache folder {folder} can't be written ({error.strerror or error}); set cache.folder to one that can."
    )


def hash_of(parts: Any) -> str:
    """The SHA-256 of plain values, in hex."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
