"""What `qconfig.placement=auto` means for the runtimes asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("torchao", reason="pip install 'qexp[pt2e]'")

from qexp.config.schema import Config, Placement, RuntimeName
from qexp.latency import placements

EVERY_OP, LAYERS = Placement.every_op, Placement.layers


@pytest.mark.parametrize(
    ("asked", "runtimes", "ratios", "expected"),
    [
        ("auto", "[openvino]", {"openvino": 1.01}, LAYERS),
        ("auto", "[openvino]", {"openvino": 1.2}, EVERY_OP),
        ("auto", "[eager,onnxruntime,openvino]", {"onnxruntime": 2.0, "openvino": 0.9}, EVERY_OP),
        ("auto", "[eager,onnxruntime,openvino]", {"onnxruntime": 0.8, "openvino": 0.9}, LAYERS),
        ("layers", "[openvino]", {}, LAYERS),
        ("every_op", "[openvino]", {}, EVERY_OP),
    ],
)
def test_layers_is_chosen_where_it_makes_no_runtime_slower(
    composed: Callable[..., Config], monkeypatch: pytest.MonkeyPatch,
    asked: str, runtimes: str, ratios: Mapping[str, float], expected: Placement,
) -> None:  # fmt: skip
    monkeypatch.setattr(placements, "ratio", lambda config, name: ratios[name])
    config = composed("flow=pt2e", f"qconfig.placement={asked}", f"runtimes={runtimes}")
    assert placements.resolved(config) is expected


def test_a_flow_without_a_choice_measures_nothing(composed: Callable[..., Config]) -> None:
    assert placements.resolved(composed("flow=fx", "qconfig.placement=auto", "runtimes=[onnxruntime]")) is EVERY_OP


def test_medians_are_of_each_calls_own_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def takes(*seconds: float) -> Callable[[Any], None]:
        lasting = iter(seconds * placements.CALLS)

        def call(image: Any) -> None:
            nonlocal now
            now += next(lasting)

        return call

    monkeypatch.setattr(placements.time, "perf_counter", lambda: now)
    found = placements.medians({EVERY_OP: takes(1, 2, 3), LAYERS: takes(5, 5, 90)}, torch.zeros(1))
    assert found == {EVERY_OP: pytest.approx(2), LAYERS: pytest.approx(5)}


@pytest.mark.slow
def test_each_placement_of_the_patterns_is_timed_once_on_a_machine(
    composed: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openvino", reason="pip install 'qexp[runtimes]'")
    seen: list[dict[Placement, Tensor]] = []

    def planted(calls: Mapping[Placement, Callable[[Tensor], Tensor]], image: Tensor) -> dict[Placement, float]:
        seen.append({one: call(image) for one, call in calls.items()})
        return {EVERY_OP: 2.0, LAYERS: 3.0}

    monkeypatch.setattr(placements, "medians", planted)
    config, state = composed("flow=pt2e"), torch.get_rng_state()
    for _ in range(2):
        assert placements.ratio(config, RuntimeName.openvino) == 1.5
    assert torch.equal(state, torch.get_rng_state())
    (logits,) = seen
    assert logits[EVERY_OP].shape == logits[LAYERS].shape == (1, 100)
    assert not torch.equal(logits[EVERY_OP], logits[LAYERS])
