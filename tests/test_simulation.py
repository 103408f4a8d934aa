"""The simulation of large sweeps, against answers that can be worked out by hand."""

from __future__ import annotations

import pytest

from benchmarks.simulation import Place, Times, simulate


def test_one_worker_does_one_after_the_other() -> None:
    found = simulate(10, Times(3, 2, 1), Place(hosts=1, workers=1, writers=1))
    assert found.seconds == pytest.approx(60)
    assert (found.locked, found.queued) == (pytest.approx(0), 0)
    assert (found.store, found.timing) == (pytest.approx(1 / 6), pytest.approx(1 / 3))


def test_workers_on_hosts_of_their_own_share_nothing_but_the_store() -> None:
    found = simulate(1000, Times(3, 2, 0), Place(hosts=100, workers=1, writers=1))
    assert found.seconds == pytest.approx(50)
    assert found.locked == pytest.approx(0)


def test_while_one_measures_the_others_of_its_host_stand_still() -> None:
    """Two that begin together compute for 3 s; then each is measured for 2 s, one after the other."""
    found = simulate(2, Times(3, 2, 0), Place(hosts=1, workers=2, writers=2))
    assert found.seconds == pytest.approx(7)
    assert found.locked == pytest.approx(2 / 12)
    # However many workers: the lock is held for 2 s of each run, and computing goes on in none of them.
    many = simulate(1000, Times(3, 2, 0), Place(hosts=1, workers=50, writers=50))
    assert many.seconds == pytest.approx(1000 * 2 + 20 * 3)


def test_a_full_store_takes_as_many_runs_as_it_can_write() -> None:
    found = simulate(10_000, Times(3, 0, 1), Place(hosts=100, workers=1, writers=4))
    assert found.seconds == pytest.approx(10_000 / 4, rel=0.01)
    assert found.store == pytest.approx(1, abs=0.01)
    assert found.queued > 0.8
