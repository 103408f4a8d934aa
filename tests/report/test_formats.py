"""Numbers as text."""

from __future__ import annotations

import pytest

from qexp.report import formats


@pytest.mark.parametrize(
    ("difference", "text"),
    [(-0.00004, "+0.00"), (0.0, "+0.00"), (-0.00006, "-0.01"), (0.0012, "+0.12"), (-1.0, "-100.00")],
)
def test_a_difference_that_rounds_to_zero_has_no_minus(difference: float, text: str) -> None:
    assert formats.signed(difference) == text
