"""The disk cache: entries are intact or made again, whatever happened to the folder."""

from __future__ import annotations

import errno
import hashlib
import multiprocessing
import os
import resource
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from qexp.errors import InputError
from qexp.system import cache

VALUES = np.arange(5000, dtype=np.int32).reshape(50, 100)


def refuse() -> np.ndarray:
    raise AssertionError("made although it is there")


def entry_file(folder: Path) -> Path:
    (file,) = folder.glob("*.npy")
    return file


def test_an_array_is_made_once_and_comes_back_read_only_and_memory_mapped(tmp_path: Path) -> None:
    cache.array(tmp_path, "key", lambda: VALUES)
    again = cache.array(tmp_path, "key", refuse)
    assert isinstance(again, np.memmap)
    assert again.dtype == np.int32
    np.testing.assert_array_equal(again, VALUES)
    with pytest.raises(ValueError, match="read-only"):
        again[0] = 1


def test_without_a_folder_all_is_made_each_time() -> None:
    for value in (1, 2):
        made = VALUES + value
        np.testing.assert_array_equal(cache.array(None, "key", partial(np.copy, made)), made)
        assert cache.arrays(None, "key", partial(dict, a=np.array(value))) == {"a": value}
    assert cache.find(None, "key") is None
    assert cache.find_arrays(None, "key") is None
    assert not cache.array(None, "key", lambda: VALUES).flags.writeable
    assert VALUES.flags.writeable


def test_what_is_filled_without_a_folder_is_what_is_filled_with_one(tmp_path: Path) -> None:
    with_folder = cache.filled(tmp_path, "key", (3,), np.uint8, _ones)
    for entry in (cache.filled(None, "key", (3,), np.uint8, _ones), cache.scratch(None, (3,), np.uint8, _ones)):
        assert entry.array.tolist() == [1] * 3
        assert not entry.array.flags.writeable
        assert entry.sha256 == with_folder.sha256


def test_without_a_folder_a_file_is_made_where_it_is_wanted(tmp_path: Path) -> None:
    target, entry = tmp_path / "target", tmp_path / "entry"
    entry.write_bytes(b"cached")
    os.link(entry, target)
    digest = cache.file(None, "key", lambda path: path.write_bytes(b"made"), target)
    assert (target.read_bytes(), entry.read_bytes()) == (b"made", b"cached")
    assert digest == hashlib.sha256(b"made").hexdigest()
    assert {path.name for path in tmp_path.iterdir()} == {"target", "entry"}


def test_another_key_is_another_entry(tmp_path: Path) -> None:
    cache.array(tmp_path, "a", lambda: VALUES)
    np.testing.assert_array_equal(cache.array(tmp_path, "b", lambda: VALUES + 1), VALUES + 1)
    np.testing.assert_array_equal(cache.array(tmp_path, "a", refuse), VALUES)


@pytest.mark.parametrize("where", [0, 200, -40, -1])
def test_one_changed_byte_anywhere_is_found_and_the_entry_rebuilt(tmp_path: Path, where: int) -> None:
    cache.array(tmp_path, "key", lambda: VALUES)
    content = bytearray(entry_file(tmp_path).read_bytes())
    content[where] ^= 1
    entry_file(tmp_path).write_bytes(content)
    np.testing.assert_array_equal(cache.array(tmp_path, "key", lambda: VALUES + 7), VALUES + 7)


@pytest.mark.parametrize("size", [0, 1, 32, 100, 20000])
def test_a_truncated_entry_is_rebuilt(tmp_path: Path, size: int) -> None:
    cache.array(tmp_path, "key", lambda: VALUES)
    whole = entry_file(tmp_path).read_bytes()
    assert len(whole) > size
    entry_file(tmp_path).write_bytes(whole[:size])
    np.testing.assert_array_equal(cache.array(tmp_path, "key", lambda: VALUES + 7), VALUES + 7)


def test_what_a_killed_process_left_is_cleared_away(tmp_path: Path) -> None:
    cache.array(tmp_path, "key", lambda: VALUES)
    left = entry_file(tmp_path).with_suffix(".tmp")
    entry_file(tmp_path).rename(left)
    np.testing.assert_array_equal(cache.array(tmp_path, "key", lambda: VALUES + 7), VALUES + 7)
    assert not left.exists()


def test_a_failing_make_leaves_nothing_that_looks_like_an_entry(tmp_path: Path) -> None:
    def fail() -> np.ndarray:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        cache.array(tmp_path, "key", fail)
    assert [file.suffix for file in tmp_path.iterdir()] == [".lock"]


def _slow(folder: Path, made: Path, queue: multiprocessing.Queue[int]) -> None:
    def make() -> np.ndarray:
        with made.open("a") as file:
            file.write("x")
        time.sleep(0.3)
        return VALUES

    queue.put(int(cache.array(folder, "key", make).sum()))


def test_two_processes_that_ask_at_once_make_an_entry_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    queue: multiprocessing.Queue[int] = context.Queue()
    made = tmp_path / "made.txt"
    workers = [context.Process(target=_slow, args=(tmp_path / "cache", made, queue)) for _ in range(2)]
    for worker in workers:
        worker.start()
    sums = [queue.get(timeout=30) for _ in workers]
    for worker in workers:
        worker.join()
    assert sums == [VALUES.sum()] * 2
    assert made.read_text() == "x"


def test_a_folder_that_cannot_be_written_is_refused_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cache folder .*file/cache can't be written \(.*\); set cache.folder"):
        cache.array(tmp_path / "file" / "cache", "key", lambda: VALUES)


def test_an_entry_is_read_from_a_folder_in_which_nothing_can_be_written(tmp_path: Path) -> None:
    cache.array(tmp_path, "key", lambda: VALUES)
    for lock in tmp_path.glob("*.lock"):
        lock.unlink()
        lock.mkdir()  # a lock that can't be opened, for the superuser too
    np.testing.assert_array_equal(cache.array(tmp_path, "key", refuse), VALUES)


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A read-only folder with an intact entry under "whole" and a damaged one under "damaged"."""
    # Not in tmp_path, which only its owner may enter.
    with tempfile.TemporaryDirectory(prefix="qexp-read-only-") as name:
        folder = Path(name)
        for key in ("damaged", "whole"):
            cache.array(folder / key, key, lambda: VALUES)
            for file in (folder / key).iterdir():
                file.chmod(0o644)
                file.rename(folder / file.name)
            (folder / key).rmdir()
            if key == "damaged":
                content = bytearray(entry_file(folder).read_bytes())
                content[200] ^= 1
                entry_file(folder).write_bytes(content)
        folder.chmod(0o555)
        yield folder
        folder.chmod(0o755)


def _as_nobody(folder: Path, queue: multiprocessing.Queue[str]) -> None:
    if os.getuid() == 0:  # to whom nothing is forbidden
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
    for key in ("whole", "damaged", "new"):
        try:
            queue.put(str(int(cache.array(folder, key, lambda: VALUES + 7).sum())))
        except InputError as error:
            queue.put(str(error))


def test_in_a_folder_that_may_only_be_read_what_is_whole_is_read_and_the_rest_refused(read_only: Path) -> None:
    context = multiprocessing.get_context("fork")
    queue: multiprocessing.Queue[str] = context.Queue()
    process = context.Process(target=_as_nobody, args=(read_only, queue))
    process.start()
    whole, *others = [queue.get(timeout=30) for _ in range(3)]
    process.join()
    assert whole == str(VALUES.sum())
    reason = "can't be written (Permission denied); set cache.folder to one that can."
    assert others == [f"the cache folder {read_only} {reason}"] * 2


def _stuck(folder: Path, begun: Path) -> None:
    def make() -> np.ndarray:
        begun.touch()
        time.sleep(600)
        return VALUES

    cache.array(folder, "key", make)


def test_whoever_waits_for_a_process_that_is_killed_makes_the_entry(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    maker = context.Process(target=_stuck, args=(tmp_path / "cache", tmp_path / "begun"))
    maker.start()
    deadline = time.monotonic() + 30
    while not (tmp_path / "begun").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    queue: multiprocessing.Queue[int] = context.Queue()
    waiter = context.Process(target=_slow, args=(tmp_path / "cache", tmp_path / "made.txt", queue))
    waiter.start()
    time.sleep(0.2)
    assert waiter.is_alive()
    assert not (tmp_path / "made.txt").exists()
    assert maker.pid is not None
    os.kill(maker.pid, signal.SIGKILL)
    assert queue.get(timeout=30) == VALUES.sum()
    for process in (maker, waiter):
        process.join()
    assert [file.suffix for file in (tmp_path / "cache").iterdir() if file.suffix != ".lock"] == [".npy"]


def test_what_is_in_use_stays_as_it_is_while_a_damaged_entry_is_made_anew(tmp_path: Path) -> None:
    used = cache.array(tmp_path, "key", lambda: VALUES)
    with entry_file(tmp_path).open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))
    np.testing.assert_array_equal(cache.array(tmp_path, "key", lambda: VALUES + 7), VALUES + 7)
    np.testing.assert_array_equal(used, VALUES)


def _ones(out: np.ndarray) -> None:
    out[...] = 1


@pytest.mark.parametrize(
    "keep",
    [
        lambda folder: cache.array(folder, "key", lambda: np.ones(1_000_000, np.uint8)),
        lambda folder: cache.filled(folder, "key", (1_000_000,), np.uint8, _ones),
        lambda folder: cache.scratch(folder, (1_000_000,), np.uint8, _ones),
    ],
    ids=["array", "filled", "scratch"],
)
def test_a_full_disk_is_refused_in_a_sentence_and_leaves_no_entry(
    tmp_path: Path, keep: Callable[[Path], object]
) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(
            InputError, match=r"has no room for what is to be kept \(File too large\); free some, or set"
        ):
            keep(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not [file for file in tmp_path.iterdir() if file.suffix != ".lock"]


def test_filled_and_array_agree_and_equal_content_has_an_equal_checksum(tmp_path: Path) -> None:
    def fill(out: np.ndarray) -> None:
        out[...] = VALUES

    first = cache.filled(tmp_path, "a", VALUES.shape, VALUES.dtype, fill)
    second = cache.filled(tmp_path, "b", VALUES.shape, VALUES.dtype, fill)
    np.testing.assert_array_equal(first.array, VALUES)
    assert first.sha256 == second.sha256
    np.testing.assert_array_equal(cache.array(tmp_path, "a", refuse), VALUES)


def test_scratch_is_read_only_leaves_no_file_and_its_checksum_follows_the_content(tmp_path: Path) -> None:
    def fill(out: np.ndarray) -> None:
        out[...] = VALUES

    entry = cache.scratch(tmp_path, VALUES.shape, VALUES.dtype, fill)
    np.testing.assert_array_equal(entry.array, VALUES)
    assert not entry.array.flags.writeable
    assert not list(tmp_path.iterdir())
    assert entry.sha256 == cache.filled(tmp_path / "kept", "key", VALUES.shape, VALUES.dtype, fill).sha256
    flat = cache.scratch(tmp_path, (5000,), VALUES.dtype, lambda out: np.copyto(out, VALUES.reshape(-1)))
    assert flat.sha256 != entry.sha256


def test_several_arrays_are_one_entry_which_can_be_looked_for_without_making_it(tmp_path: Path) -> None:
    assert cache.find_arrays(tmp_path, "key") is None
    together = {"values": VALUES, "text": np.array("é"), "nothing": np.empty(0)}
    for found in (cache.arrays(tmp_path, "key", lambda: together), cache.find_arrays(tmp_path, "key")):
        assert found is not None
        assert found.keys() == together.keys()
        assert all(np.array_equal(found[name], together[name]) for name in together)
    cache.arrays(tmp_path, "key", lambda: {"made": refuse()})
    entry_file(tmp_path).write_bytes(b"")
    assert cache.find_arrays(tmp_path, "key") is None


def sizes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.npy"))


def kilobyte(value: int) -> Callable[[], np.ndarray]:
    return lambda: np.full(1000, value, np.uint8)


def test_a_bounded_folder_drops_what_was_not_used_for_longest(tmp_path: Path) -> None:
    with cache.bounded(5e-6):  # four entries of 1160 bytes
        for value in range(4):
            cache.array(tmp_path, str(value), kilobyte(value))
            time.sleep(0.02)  # file systems count time in ticks
        cache.array(tmp_path, "0", refuse)
        cache.array(tmp_path, "4", kilobyte(4))
        assert sizes(tmp_path) <= 5000
        for value in (0, 2, 3, 4):
            assert cache.array(tmp_path, str(value), refuse)[0] == value
        made: list[int] = []
        cache.array(tmp_path, "1", lambda: made.append(1) or kilobyte(1)())
        assert made == [1]
    for value in range(10, 20):
        cache.array(tmp_path, str(value), kilobyte(value))
    assert sizes(tmp_path) > 10_000


def test_what_this_process_has_in_use_is_not_dropped(tmp_path: Path) -> None:
    with cache.bounded(1e-6):
        used = cache.array(tmp_path, "used", kilobyte(7))[10:]  # a part of it keeps all of it
        for value in range(3):
            cache.array(tmp_path, str(value), kilobyte(value))
        assert cache.array(tmp_path, "used", refuse)[0] == 7
        assert sizes(tmp_path) == 2 * 1160
        del used
        cache.array(tmp_path, "last", kilobyte(1))
        assert sizes(tmp_path) == 1160


def _drop(folder: Path) -> None:
    with cache.bounded(1e-6):
        for value in range(3):
            cache.array(folder, str(value), kilobyte(value))


def test_a_map_outlives_its_file_which_another_process_dropped(tmp_path: Path) -> None:
    used = cache.array(tmp_path, "used", kilobyte(7))
    context = multiprocessing.get_context("spawn")
    other = context.Process(target=_drop, args=(tmp_path,))
    other.start()
    other.join()
    assert other.exitcode == 0
    assert cache.find_arrays(tmp_path, "used") is None
    assert (used == 7).all()


# ------------------------------------------------------------------------------------------------ files


def writes(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


def refuse_file(path: Path) -> None:
    refuse()


def held_file(folder: Path) -> Path:
    (file,) = folder.glob("*.file")
    return file


def test_a_file_is_made_once_and_all_that_ask_for_it_share_its_bytes(tmp_path: Path) -> None:
    targets = [tmp_path / name for name in ("one", "two")]
    digests = [
        cache.file(tmp_path / "cache", "key", make, target)
        for make, target in zip([writes(b"content"), refuse_file], targets, strict=True)
    ]
    assert digests == [hashlib.sha256(b"content").hexdigest()] * 2
    assert [target.read_bytes() for target in targets] == [b"content"] * 2
    assert targets[0].samefile(targets[1])
    assert cache.file(tmp_path / "cache", "other", writes(b"another"), targets[0]) != digests[0]
    assert [target.read_bytes() for target in targets] == [b"another", b"content"]


def test_where_a_disk_has_no_links_a_file_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse_link(*paths: Path) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse_link)
    for make in (writes(b"content"), refuse_file):
        cache.file(tmp_path / "cache", "key", make, tmp_path / "target")
        assert (tmp_path / "target").read_bytes() == b"content"
        assert not (tmp_path / "target").samefile(held_file(tmp_path / "cache"))


@pytest.mark.parametrize("damage", [lambda path: path.write_bytes(b"conTent"), Path.unlink])
def test_a_file_that_is_damaged_or_gone_is_made_anew(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    cache.file(tmp_path, "key", writes(b"content"), tmp_path / "target")
    damage(held_file(tmp_path))
    cache.file(tmp_path, "key", writes(b"anew"), tmp_path / "target")
    assert (tmp_path / "target").read_bytes() == b"anew"
    cache.file(tmp_path, "key", refuse_file, tmp_path / "target")
    assert not list(tmp_path.glob("*.making"))


def test_a_file_that_can_not_be_made_leaves_nothing_behind(tmp_path: Path) -> None:
    def fail(path: Path) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.file(tmp_path, "key", fail, tmp_path / "target")
    assert {path.suffix for path in tmp_path.iterdir()} <= {".lock"}


def test_files_count_in_a_bounded_folder_and_one_too_large_for_it_is_given_all_the_same(tmp_path: Path) -> None:
    with cache.bounded(2e-6):
        cache.file(tmp_path / "cache", "large", writes(bytes(10_000)), tmp_path / "target")
        assert (tmp_path / "target").stat().st_size == 10_000
        cache.file(tmp_path / "cache", "large", writes(bytes(10_000)), tmp_path / "target")
        cache.array(tmp_path / "cache", "small", kilobyte(1))
    assert not list((tmp_path / "cache").glob("*.file"))
    assert cache.array(tmp_path / "cache", "small", refuse)[0] == 1
