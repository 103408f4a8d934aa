"""The words of a report."""

from __future__ import annotations

from qexp.report import wording


def test_the_control_is_held_against_the_variant_that_it_repeats() -> None:
    def timed(variant: str, p50: float, repeats: str = "") -> dict[str, object]:
        return {"variant": variant, "repeats": repeats, "batch_size": 1, "threads": 1, "p50": p50}

    rows = [timed("fp32_eager", 5.0), timed("fp32_torchscript", 7.0), timed("control", 7.07, "fp32_torchscript")]
    assert wording._control({"rows": rows}) == ("fp32_torchscript: 7.00 and 7.07 ms, 1.0% apart; they should be equal")
    assert wording._control({"rows": rows[:2]}) == ""
