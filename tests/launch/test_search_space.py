"""The values of a search: those that a grid would go through, and the numbers between an interval's ends."""

from __future__ import annotations

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from qexp.config.composition import combinations
from qexp.errors import ConfigError
from qexp.launch.search_space import Axis, SearchSpace, axis_of, space_of


def axis(text: str) -> Axis:
    return axis_of(OverridesParser.create().parse_override(text))


def space(*texts: str) -> SearchSpace:
    return space_of(OverridesParser.create().parse_overrides(list(texts)))


@pytest.mark.parametrize(
    "text",
    [
        "observer=minmax,mse",
        "fusion=true,false",
        "calib.batches=4,8,null",
        "qconfig.weight.bits=range(4,9)",
        "calib.batches=range(2,20,5)",
        "calib.batches=range(9,4,-2)",
        "+train.lr=range(0.1,0.5,0.1)",
        "model.checkpoint='/a b/net.pt','it=s.pt'",
    ],
)
def test_an_axis_has_the_values_that_a_grid_goes_through(text: str) -> None:
    """Hydra's ranges end before their last number, and Optuna's with it."""
    found, listed = axis(text), [one for (one,) in combinations([OverridesParser.create().parse_override(text)])]
    assert sorted(found.overrides) == sorted(listed)
    assert sorted(found.to_check) == sorted(listed)
    if found.step is None:
        assert [found.override(value) for value in found.values] == listed
    else:
        assert found.low is not None
        steps = [found.low + found.step * number for number in range(len(listed))]
        assert steps[-1] == pytest.approx(found.high)
        assert [found.override(value) for value in steps] == sorted(listed, key=lambda one: float(one.split("=")[1]))


@pytest.mark.parametrize(
    ("text", "low", "high", "log", "inside"),
    [
        ("observer.percentile=interval(99,100)", 99.0, 100.0, False, ("observer.percentile=99.1235", 99.1234567)),
        ("calib.batches=int(interval(4,64))", 4, 64, False, ("calib.batches=17", 17)),
        ("train.lr=tag(log,interval(1e-5,0.1))", 1e-5, 0.1, True, ("train.lr=1.23457e-05", 1.2345678e-5)),
    ],
)
def test_an_interval_has_all_numbers_between_its_ends(
    text: str, low: float, high: float, log: bool, inside: tuple[str, float]
) -> None:
    found = axis(text)
    assert (found.low, found.high, found.log, type(found.low)) == (low, high, log, type(low))
    assert found.override(inside[1]) == inside[0]
    assert [float(one.partition("=")[2]) for one in found.to_check] == [low, high]


def test_each_value_is_checked_once_and_the_other_overrides_stay_in_their_place() -> None:
    found = space("study=s", "observer=minmax,mse", "flow=fx", "calib.batches=1,2,3")
    assert found.combination({"observer": "mse", "calib.batches": "3"}) == [
        "study=s", "observer=mse", "flow=fx", "calib.batches=3"
    ]  # fmt: skip
    assert [one[1::2] for one in found.to_check()] == [
        ["observer=minmax", "calib.batches=1"],
        ["observer=mse", "calib.batches=1"],
        ["observer=minmax", "calib.batches=2"],
        ["observer=minmax", "calib.batches=3"],
    ]


def test_no_two_jobs_have_one_name() -> None:
    found = space("model.checkpoint=/a/net.pt,/b/net.pt", "calib.batches=1,2")
    jobs = [
        found.combination({"model.checkpoint": a, "calib.batches": b}) for a in ("/a/net.pt", "/b/net.pt") for b in "12"
    ]
    assert [found.name(job) for job in jobs] == [
        f"model.checkpoint=/{a}/net.pt batches={b}" for a in "ab" for b in "12"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["observer=mse"], "hydra/sweeper=qexp_optuna: no setting has several values to search over; list some, as in"),
        (["seed=1,2", "seed=3,4"], "seed=3,4: seed is searched over twice; list its values once"),
        (["seed=interval(2,1)"], r"seed=interval\(2,1\): an interval goes from the lower to the higher of two numbers"),
        (["seed=tag(log,interval(0,1))"], r"tag\(log.*: an interval goes from the lower to .* two numbers above 0"),
    ],
)
def test_a_space_that_is_none_is_refused(texts: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        space(*texts)
