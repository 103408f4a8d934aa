"""The final table and the table of effects."""

from __future__ import annotations

from qexp import table
from qexp.results import Row


def row(name: str, accuracy: float, speedup: float | None = None, status: str = "FINISHED", **params: str) -> Row:
    metrics = {"accuracy/fp32": 0.9, "accuracy/int8": accuracy, "accuracy/delta": accuracy - 0.9}
    metrics |= {"accuracy/delta_low": accuracy - 0.91, "accuracy/delta_high": accuracy - 0.89}
    metrics |= {} if speedup is None else {"latency/speedup": speedup}
    return Row(
        name, name, status, params={key.replace("__", "."): value for key, value in params.items()}, metrics=metrics
    )


def test_a_line_shows_accuracies_and_the_difference_in_points_with_its_interval() -> None:
    text = table.runs([row("a", 0.89)])
    assert "0.9000 → 0.8900" in text
    assert "-1.00 [-2.00, +0.00]" in text
    assert "latency" not in text  # nothing was timed


def test_a_doubt_stands_once_below_the_table_and_marks_its_runs() -> None:
    rows = [Row(n, n, "FINISHED", tags={"doubts": "holds here only"}) for n in ("a", "b")] + [Row("c", "c", "FINISHED")]
    text = table.runs(rows)
    assert text.count("holds here only") == 1
    assert [line.split()[:2] for line in text.splitlines()[2:4]] == [["a", "(1)"], ["b", "(1)"]]
    assert "c (" not in text


def test_an_effect_is_the_mean_difference_among_otherwise_equal_runs() -> None:
    rows = [
        row("a", 0.80, 2.0, x="1", y="p"),
        row("b", 0.84, 3.0, x="2", y="p"),
        row("c", 0.70, 2.0, x="1", y="q"),
        row("d", 0.80, 4.0, x="2", y="q"),
        row("e", 0.10, 1.0, x="2", y="r"),  # has no partner with x=1
    ]
    by = {(effect.setting, effect.value): effect for effect in table.effects(rows)}
    assert by["x", "2"].pairs == 2
    assert round(by["x", "2"].delta_accuracy or 0, 6) == 0.07
    assert round(by["x", "2"].delta_speedup or 0, 6) == 1.5
    assert by["y", "r"].runs == 1
    assert round(by["x", "1"].accuracy, 6) == 0.75


def test_a_failed_run_has_no_effect_and_is_named() -> None:
    rows = [row("a", 0.8, x="1"), row("b", 0.1, x="2", status="FAILED")]
    assert table.effects(rows) == []
    assert table.failures(rows).startswith("FAILED  b")


def test_a_groups_choice_and_its_only_varying_field_are_one_setting() -> None:
    rows = [row("a", 0.8, qconfig="t", qconfig__weight="t"), row("b", 0.9, qconfig="c", qconfig__weight="c")]
    assert {effect.setting for effect in table.effects(rows)} == {"qconfig"}


def test_a_field_is_compared_across_its_own_groups_choices() -> None:
    rows = [
        row("a", 0.8, q="1", q__w="t", q__a="s"),
        row("b", 0.9, q="2", q__w="c", q__a="s"),
        row("c", 0.7, q="3", q__w="t", q__a="u"),
        row("d", 0.9, q="4", q__w="c", q__a="u"),
    ]
    effect = {(e.setting, e.value): e for e in table.effects(rows)}["q.w", "c"]
    assert (effect.pairs, round(effect.delta_accuracy or 0, 6)) == (2, 0.15)


def test_a_field_swept_beside_its_groups_choice_is_held_and_so_is_the_choice() -> None:
    """As `experiment=overflow` does; a first value differs from itself by nothing."""
    accuracies = {("c", "none"): 0.60, ("t", "none"): 0.70, ("c", "weights"): 0.90, ("t", "weights"): 0.80}
    rows = [
        row(f"{choice} {guard}", accuracy, q=choice, q__weight=choice, q__overflow=guard)
        for (choice, guard), accuracy in accuracies.items()
    ]
    found = {(e.setting, e.value): (e.pairs, round(e.delta_accuracy or 0, 6)) for e in table.effects(rows)}
    assert found == {
        ("q", "c"): (2, 0.0),
        ("q", "t"): (2, 0.0),  # +0.10 without the guard, -0.10 with it
        ("q.overflow", "none"): (2, 0.0),
        ("q.overflow", "weights"): (2, 0.2),  # +0.30 and +0.10
    }
