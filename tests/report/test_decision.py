"""Recommendations on studies whose answer is known by how they were made."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from qexp import statistics
from qexp.errors import ConfigError
from qexp.metrics import Metric
from qexp.report import decision, evidence
from qexp.report.candidates import parts
from qexp.report.decision import Answer, Recommendation
from qexp.report.study import Study, studies
from tests.helpers.planted import Planted, made, question, study


def named(found: Recommendation) -> tuple[str, str | None]:
    return str(found.kind), found.chosen.ships.name if found.chosen else None


def with_setting(name: str, broken: int, speedup: float | None = 2.0, **params: str) -> Planted:
    """A run of a setting of its own."""
    return Planted(name, broken, speedup, params={"observer": name, **params})


# ---- What ships


def test_the_fastest_that_qualifies_ships() -> None:
    whole = study(
        with_setting("slow", 0, 1.5), with_setting("good", 10, 3.0), with_setting("lossy", 900, 5.0),
        with_setting("unsure", 40, 4.0),
    )  # fmt: skip
    found = decision.recommend(whole, question())
    assert named(found) == ("ship", "good")
    assert found.chosen is not None
    assert found.chosen.runtime == "eager"
    assert [one.ships.name for one in found.qualified] == ["good", "slow"]
    assert [one.ships.name for one in found.tied] == ["good"]
    assert found.images == 10_000
    assert found.chosen_by == 0


def test_what_is_only_simulated_is_never_recommended() -> None:
    wide = replace(with_setting("wide", 0, None, **{"resolved.runtime": "simulated"}), runtimes=["simulated"])
    wide = replace(wide, tags={"simulated": "true"})
    found = decision.recommend(study(wide, with_setting("good", 10, None)), question())
    assert named(found) == ("speed_unknown", "good")
    alone = decision.recommend(study(wide), question())
    assert named(alone) == ("stay_on_fp32", None)
    assert "simulated in float, since no kernels hold its bits" in alone.reasons[0]
    assert evidence.rows(alone)[0].word == "simulated"


def test_p_values_are_tangos_and_adjusted_over_all_candidates() -> None:
    """A direct computation, from counts and scipy alone."""
    broken = {"a": 3, "b": 20, "c": 30, "d": 60, "e": 25}
    whole = study(*(with_setting(name, number) for name, number in broken.items()), mended=5)
    p = []
    for number in broken.values():
        b, c, n, d = number, 5, 10_000, -0.005
        # Tango's estimate of the share of b, from its quadratic equation.
        q = max(np.roots([2 * n, (2 * n + b - c) * d - b - c, -b * d * (1 - d)]))
        z = (c - b - n * d) / math.sqrt(n * (2 * q + d * (1 - d)))
        p.append(stats.norm.sf(z))
    by_rank = [min(1, max((5 - i) * sorted(p)[i] for i in range(rank + 1))) for rank in range(5)]
    for one, raw in zip(decision.candidates(whole, question()), p, strict=True):
        assert one.p == pytest.approx(raw, rel=1e-6)
        assert one.adjusted == pytest.approx(by_rank[sorted(p).index(raw)], rel=1e-6)
        assert one.qualifies is (one.adjusted <= 0.025)
    assert decision.recommend(whole, question()).kind is Answer.ship


def test_a_single_run_is_tested_as_its_verdict_is() -> None:
    for broken in range(20, 40):
        whole = study(Planted("one", broken))
        found = decision.recommend(whole, question())
        kind = statistics.verdict(broken, 0, 10_000, 0.005).kind
        assert (found.kind is Answer.ship) is (kind == "no_loss")
        assert found.candidates[0].p == pytest.approx(statistics.non_inferiority(broken, 0, 10_000, 0.005), rel=1e-5)


def test_runtimes_that_agree_are_one_candidate_and_others_are_their_own() -> None:
    whole = study(Planted("one", 10, 2.0, others={"onnxruntime": (5, 3.0), "openvino": (400, 9.0)}))
    found = decision.recommend(whole, question())
    assert [one.runtimes for one in found.candidates] == [("eager", "torchscript"), ("onnxruntime",), ("openvino",)]
    assert found.chosen is not None
    assert found.chosen.runtime == "onnxruntime"
    one = decision.recommend(whole, question(runtime="torchscript"))
    assert len(one.candidates) == 1
    assert one.chosen is not None
    assert one.chosen.runtime == "torchscript"
    assert one.chosen.latency is not None
    assert one.chosen.latency.speedup.value == 1.5


def test_a_speed_that_may_be_fp32s_is_not_faster() -> None:
    whole = study(Planted("one", 0, 1.01, half=0.02))
    found = decision.recommend(whole, question())
    assert named(found) == ("stay_on_fp32", None)
    assert found.reasons == ("the one candidate is not shown to be faster than FP32",)


# ---- Ties


def test_tied_is_tied_with_the_fastest_and_no_chain() -> None:
    whole = study(*(with_setting(f"s{i}", 0, 4 - 0.02 * i) for i in range(6)))
    # Half-widths of 0.02 a speed: two differ if apart by more than 0.028.
    assert [one.ships.name for one in decision.recommend(whole, question()).tied] == ["s0", "s1"]


def test_a_shared_timing_is_one_measurement_and_tied_whatever_its_width() -> None:
    whole = study(*(Planted(f"s{i}", 0, 4.0, half=0.0, params={"observer": f"s{i}"}) for i in range(3)))
    assert len(decision.recommend(whole, question()).tied) == 3


def test_of_the_tied_the_simplest_is_chosen() -> None:
    narrow = Planted("a", 0, params={"observer": "minmax", "resolved.weight_bits": "7", "resolved.overflow": "weights"})
    few = Planted("b", 0, params={"calib.batches": "8", "observer": "mse"}, metrics={Metric.calibration_images: 128.0})
    many, usual = Planted("c", 0, params={"observer": "mse"}), Planted("d", 0)
    assert named(decision.recommend(study(narrow, many, few, usual), question())) == ("ship", "b")
    assert named(decision.recommend(study(narrow, many, usual), question())) == ("ship", "d")
    assert named(decision.recommend(study(narrow, many), question())) == ("ship", "c")
    some = Planted("e", 0, params={"flow": "fx"}, metrics={Metric.layers_narrowed: 2.0})
    assert named(decision.recommend(study(narrow, some), question())) == ("ship", "e")


def test_of_the_tied_those_shown_less_accurate_drop_out() -> None:
    # 24 of 10,000 images is within the margin, and more than the other loses; the simplest is among the dropped.
    whole = study(with_setting("minmax", 24), with_setting("mse", 1), with_setting("entropy", 2))
    found = decision.recommend(whole, question(margin=0.008))
    assert named(found) == ("ship", "mse")
    assert [one.ships.name for one in found.dropped] == ["minmax"]
    assert len(found.tied) == 3
    # Without predicted classes nothing can be paired.
    alone = decision.recommend(replace(whole, top1={}), question(margin=0.008))
    assert named(alone) == ("ship", "minmax")
    assert alone.dropped == ()


def test_runs_that_are_needed_for_pairing_are_the_tied() -> None:
    whole = study(with_setting("a", 1), with_setting("b", 3), with_setting("slow", 0, 1.2), top1=False)
    assert decision.finalists(whole, question()) == ["a", "b"]


# ---- Calibration seeds


def seeds(name: str, *broken: list[int], speedup: float = 2.0) -> list[Planted]:
    return [
        Planted(f"{name}{seed}", images, speedup, params={"observer": name, "calib.seed": str(seed)})
        for seed, images in enumerate(broken)
    ]


def test_over_seeds_the_mean_loss_per_image_is_tested() -> None:
    same, apart = [list(range(30))] * 3, [list(range(30 * i, 30 * i + 30)) for i in range(3)]
    whole = study(*seeds("same", *same), *seeds("apart", *apart), Planted("one", 30))
    by = {one.ships.name: one for one in decision.candidates(whole, question())}
    assert [len(one.records) for one in by.values()] == [3, 3, 1]
    # The same images each time tell no more than once; others each time tell more.
    assert by["same0"].p == pytest.approx(by["one"].p, rel=1e-6)
    assert by["apart0"].p < by["one"].p / 5
    for one in by.values():
        assert one.delta is not None
        assert one.delta.value == pytest.approx(-0.003)
        assert one.deltas == pytest.approx([-0.003] * len(one.records))
    assert by["apart0"].ships.params["calib.seed"] == "0"


def test_seeds_without_predicted_classes_are_untold_unless_clearly_lossy() -> None:
    whole = study(*seeds("a", *[list(range(9))] * 3), *seeds("b", *[list(range(500))] * 3), top1=False)
    a, b = decision.candidates(whole, question())
    assert a.p == b.p == 1
    assert a.reasons == ("the predicted classes are not at hand",)
    assert b.reasons == ()
    assert a.delta is not None
    assert a.delta.value == pytest.approx(-0.0009)
    assert decision.finalists(whole, question()) == ["a0", "a1", "a2"]
    assert decision.recommend(whole, question()).kind is Answer.cant_tell


def test_the_seed_that_ships_is_the_first_whatever_its_accuracy_and_its_timing_may_be_anothers() -> None:
    broken, invalid = [list(range(20)), [], []], {"latency_valid": "false", "latency_reason": "it was noisy"}
    first, *others = seeds("a", *broken)
    whole = study(others[1], replace(first, tags=invalid), others[0])
    found = decision.recommend(whole, question())
    assert named(found) == ("ship", "a0")


def test_the_same_seed_twice_counts_once() -> None:
    invalid = {"latency_valid": "false", "latency_reason": "it was noisy"}
    whole = study(Planted("noisy", 3, tags=invalid), Planted("quiet", 3))
    found = decision.recommend(whole, question())
    assert [len(one.records) for one in found.candidates] == [1]
    assert named(found) == ("ship", "quiet")


# ---- Other answers


def test_all_that_lose_is_a_reason_to_stay() -> None:
    found = decision.recommend(study(with_setting("a", 300), with_setting("b", 900)), question())
    assert named(found) == ("stay_on_fp32", None)
    assert found.reasons == ("both candidates are shown to lose 0.5 points or more",)
    assert found.settles == ()


def test_too_few_images_for_any_candidate() -> None:
    """744 images and 48 settings: not even without a single disagreement, and the number that would do is named."""
    whole = study(*(with_setting(f"s{i}", 0, 2 + i / 10) for i in range(48)), images=744)
    found = decision.recommend(whole, question())
    assert found.kind is Answer.cant_tell
    assert found.chosen is not None
    assert found.chosen.ships.name == "s47"
    assert "744 images can't show for any of 48 candidates" in found.reasons[0]
    assert found.images_needed == statistics.images_to_qualify(
        np.array([-1, 0, 1]), np.array([0, 744, 0]), 0.005, 0.025 / 48
    )
    assert found.settles == (f"about {found.images_needed:,} test images in place of 744",)
    more = study(*(with_setting(f"s{i}", 0, 2 + i / 10) for i in range(48)), images=found.images_needed)
    assert named(decision.recommend(more, question())) == ("ship", "s47")


def test_the_provisional_best_is_within_the_margin_by_its_estimate() -> None:
    whole = study(with_setting("fast", 60, 4.0), with_setting("near", 45, 3.0), with_setting("good", 40, 3.0))
    found = decision.recommend(whole, question())
    assert named(found) == ("cant_tell", "good")
    assert found.images_needed is not None
    assert found.images_needed > 10_000
    # Where none is, the number is that which would show the loss.
    lossy = decision.recommend(study(with_setting("a", 60)), question())
    assert named(lossy) == ("cant_tell", "a")
    assert lossy.images_needed is not None


@pytest.mark.parametrize(
    ("reason", "settles"),
    [
        ("2 of 2 processors were busy", "timings on a quiet machine"),
        ("timed on a CPU with VNNI, and target=avx2 means one without it", "timings on the CPU that ships"),
    ],
)
def test_without_a_valid_timing_what_qualifies_by_accuracy_is_named(reason: str, settles: str) -> None:
    invalid = {"latency_valid": "false", "latency_reason": reason}
    whole = study(Planted("a", 0, tags=invalid), Planted("b", 900, tags=invalid, params={"observer": "b"}))
    found = decision.recommend(whole, question())
    assert found.kind is Answer.speed_unknown
    assert [one.ships.name for one in found.qualified] == ["a"]
    assert found.reasons == (f"both candidates can't be recommended: the timing can't be trusted: {reason}",)
    assert found.settles == (settles,)


def test_reasons_of_one_kind_are_counted_together() -> None:
    def noisy(name: str, reason: str) -> Planted:
        return Planted(name, params={"observer": name}, tags={"latency_valid": "false", "latency_reason": reason})

    whole = study(
        noisy("a", "a was busy; b"), noisy("b", "c was late"), noisy("c", "c was late"), with_setting("d", 0, None)
    )
    assert decision.recommend(whole, question()).reasons == (
        "3 of 4 candidates can't be recommended: the timing can't be trusted: c was late, for example",
        "1 of 4 candidates can't be recommended: there is no timing",
    )


def test_what_was_not_timed_is_not_recommended_and_a_quiet_machine_may_settle_it() -> None:
    noisy = {"latency_valid": "false", "latency_reason": "it was noisy"}
    whole = study(Planted("a", 0, None), Planted("b", 0, 3.0, tags=noisy, params={"observer": "b"}))
    found = decision.recommend(whole, question())
    assert found.kind is Answer.speed_unknown
    assert dict(zip(found.reasons, found.settles, strict=False))
    slow = study(with_setting("slow", 0, 0.8), Planted("b", 0, 3.0, tags=noisy, params={"observer": "b"}))
    mixed = decision.recommend(slow, question())
    assert named(mixed) == ("cant_tell", "b")
    assert mixed.settles == ("timings on a quiet machine",)
    assert mixed.reasons == ("1 of 2 candidates can't be recommended: the timing can't be trusted: it was noisy",)
    off = decision.recommend(study(Planted("a", 0, None)), question())
    assert off.settles == ("timings",)


def test_an_accuracy_that_holds_for_another_cpu_is_no_reason_to_ship() -> None:
    elsewhere = Planted("a", 0, params={"target": "avx2"}, tags={"saturation": "possible"})
    found = decision.recommend(study(elsewhere), question())
    assert found.kind is Answer.cant_tell
    assert found.candidates[0].reasons == ("the accuracy was not measured on the CPU that target=avx2 means",)
    harmless = replace(elsewhere, tags={"saturation": "impossible"})
    assert decision.recommend(study(harmless), question()).kind is Answer.ship


def test_a_runtime_that_has_parted_is_not_recommended_however_fast() -> None:
    parted = {"runtimes.parted": "onnxruntime openvino"}
    found = decision.recommend(study(Planted("a", 0, 2.0, tags=parted, others={"onnxruntime": (0, 9.0)})), question())
    assert found.chosen is not None
    assert found.chosen.runtime == "eager"
    assert found.reasons == ("1 of 2 candidates can't be recommended: INT8 in onnxruntime parts from torch's",)
    alone = decision.recommend(study(Planted("a", 0, 0.9, tags=parted, others={"onnxruntime": (0, 9.0)})), question())
    assert named(alone) == ("stay_on_fp32", None)
    assert alone.reasons == ("1 of 2 candidates is not shown to be faster than FP32", *found.reasons)


def test_where_the_targets_accuracy_was_measured_it_is_what_counts() -> None:
    metrics = {Metric.target_images: 2000.0, Metric.target_fp32_only: 100.0, Metric.target_int8_only: 0.0}
    emulated = {"accuracy_source": "emulated", "saturation": "observed"}
    one = Planted("a", 0, params={"target": "avx2"}, tags=emulated, metrics=metrics, others={"openvino": (0, 2.0)})
    here, other = decision.candidates(study(one), question())
    assert here.delta is not None
    assert (here.delta.value, here.images) == (-0.05, 2000)
    few = {Metric.target_images: 500.0, Metric.target_fp32_only: 1.0, Metric.target_int8_only: 0.0}
    open_ = decision.recommend(study(replace(one, metrics=few)), question())
    assert open_.kind is Answer.cant_tell
    assert open_.settles[0].endswith("test images in place of 500 (saturation.emulated_images)")
    assert other.reasons == ("the accuracy was not measured on the CPU that target=avx2 means in openvino",)


def test_missing_metrics_nan_and_failures_are_told_and_never_recommended() -> None:
    nothing = {Metric.images: math.nan}
    whole = study(Planted("nan", 0, 9.0, metrics=nothing, params={"observer": "x"}), with_setting("good", 0))
    failed = replace(whole.records[0], run_id="failed", name="failed", status="FAILED")
    found = decision.recommend(replace(whole, records=(*whole.records, failed)), question())
    assert named(found) == ("ship", "good")
    assert len(found.candidates) == 2
    assert found.candidates[0].delta is None
    assert found.reasons == ("1 of 2 candidates can't be recommended: the runs don't record how many images changed",)
    untimed = study(Planted("a", 0, math.nan), with_setting("good", 0))
    assert named(decision.recommend(untimed, question())) == ("ship", "good")


def test_nothing_finished_is_no_answer() -> None:
    record, _ = made(Planted("a"), 100, 0)
    whole = Study((replace(record, status="RUNNING"),))
    found = decision.recommend(whole, question())
    assert named(found) == ("cant_tell", None)
    assert found.reasons == ("no run has finished",)
    assert decision.recommendations(whole, question())[0].candidates == ()
    assert decision.finalists(whole, question()) == []


def test_a_runtime_that_no_run_has_is_named() -> None:
    found = decision.recommend(study(Planted("a")), question(runtime="inductor"))
    assert named(found) == ("cant_tell", None)
    assert found.reasons == ("no run has report.runtime=inductor",)


def test_a_margin_is_asked_for_where_runs_have_none() -> None:
    record, _ = made(Planted("a"), 100, 0)
    whole = Study((replace(record, params={}),))
    with pytest.raises(ConfigError, match=r"report\.margin=null"):
        decision.recommend(whole, question())


def test_two_machines_in_one_sweep_have_a_recommendation_each() -> None:
    runs = [made(with_setting("a", 0, 2.0), 1000, 0), made(with_setting("b", 0, 9.0), 1000, 0)]
    (a, _), (b, _) = runs
    there = replace(b, tags={**b.tags, "cpu": "another", "kernel_signature": "l"})
    whole = studies([a, there])
    assert [named(decision.recommend(each, question(margin=0.05)))[1] for each in whole] == ["a", "b"]


# ---- Objectives and conditions


def test_the_smallest_needs_no_timing() -> None:
    def sized(name: str, broken: int, mb: float, **tags: str) -> Planted:
        return Planted(name, broken, None, params={"observer": name}, metrics={Metric.size_int8: mb}, tags=tags)

    whole = study(sized("a", 0, 10.0), sized("b", 900, 5.0), sized("c", 5, 7.0), sized("d", 5, 7.02))
    found = decision.recommend(whole, question("smallest"))
    assert named(found) == ("ship", "c")
    assert [one.ships.name for one in found.tied] == ["c", "d"]
    elsewhere = replace(sized("a", 0, 10.0), others={"onnxruntime": (0, 2.0)})
    assert [one.reasons for one in decision.candidates(study(elsewhere), question("smallest"))] == [
        (), ("the size in this runtime is not known",)
    ]  # fmt: skip
    larger = decision.recommend(study(sized("a", 0, 50.0)), question("smallest"))
    assert named(larger) == ("stay_on_fp32", None)
    assert larger.reasons == ("the one candidate is not shown to be smaller than FP32",)


def test_the_most_accurate_within_a_limit() -> None:
    # FP32 takes 10 ms.
    whole = study(
        with_setting("exact", 0, 2.0), with_setting("fast", 400, 8.0), with_setting("near", 2, 4.0),
        with_setting("lossy", 900, 4.0),
    )  # fmt: skip
    asked = question("accurate", max_ms=6)
    found = decision.recommend(whole, asked)
    # Two images fewer are not shown to be fewer, and it is faster.
    assert named(found) == ("ship", "near")
    assert {one.ships.name for one in found.dropped} == {"fast", "lossy"}
    assert named(decision.recommend(whole, question("accurate", max_ms=2)))[1] == "fast"
    assert named(decision.recommend(whole, question("accurate", max_ms=1))) == ("stay_on_fp32", None)
    enough = decision.recommend(whole, question("accurate", max_ms=10))
    assert enough.reasons == ("FP32 itself takes 10.00 ms, and 10 ms are allowed",)


def test_each_batch_size_has_a_recommendation_and_the_first_is_the_headline() -> None:
    runs = [made(with_setting("a", 0), 10_000, 0)[0], made(with_setting("b", 0), 10_000, 0)[0]]

    def document(speedups: dict[int, float]) -> dict[str, object]:
        pairs, rows = [], []
        for size, ratio in speedups.items():
            where = {"batch_size": size, "threads": 1}
            rows += [{"variant": "fp32_eager", "p50": 10.0, **where}, {"variant": "int8_eager", "p50": 5.0, **where}]
            interval = {"value": ratio, "low": ratio - 0.1, "high": ratio + 0.1, "confidence": 0.95, "method": ""}
            pairs.append({"fp32": "fp32_eager", "int8": "int8_eager", **where, **interval})
        return {"rows": rows, "speedups": pairs}

    files = {"a": document({8: 3.0, 1: 2.0}), "b": document({8: 2.0, 1: 3.0})}
    whole = studies(runs, latency_files=files)[0]
    found = decision.recommendations(whole, question())
    assert [(one.conditions, named(one)[1]) for one in found] == [((8, 1), "a"), ((1, 1), "b")]
    assert [one.conditions for one in decision.recommendations(whole, question(batch_size=1))] == [(1, 1)]
    nowhere = decision.recommend(whole, question(batch_size=64))
    assert nowhere.kind is Answer.speed_unknown
    assert nowhere.settles == ("timings as asked for",)
    assert nowhere.reasons == ("both candidates can't be recommended: there is no timing with report.batch_size=64",)


# ---- Images set aside for choosing


def test_with_images_set_aside_the_winner_alone_is_tested_on_the_rest() -> None:
    first, rest = parts(10_000, 0.3)
    assert (len(first), len(rest), len(np.intersect1d(first, rest))) == (3000, 7000, 0)
    right = rest[rest < 9000]
    runs = [
        Planted("lucky", right[:60].tolist(), 4.0, params={"observer": "lucky"}),  # loses nothing where it is chosen
        Planted("honest", first[first < 9000][:3].tolist(), 3.0, params={"observer": "honest"}),
    ]
    found = decision.recommend(study(*runs, share=0.3), question())
    assert named(found) == ("cant_tell", "lucky")
    assert found.chosen is not None
    assert found.chosen.delta is not None
    assert (found.chosen.selection, found.chosen.delta.value) == (0.0, pytest.approx(-60 / 7000))
    assert found.chosen.p == found.chosen.adjusted == pytest.approx(statistics.non_inferiority(60, 0, 7000, 0.005))
    assert (found.chosen_by, found.images) == (3000, 7000)
    assert decision.finalists(study(*runs, share=0.3), question()) == ["lucky", "honest"]


def test_the_winners_test_needs_no_correction() -> None:
    _, rest = parts(10_000, 0.3)
    broken = rest[rest < 9000][:17].tolist()
    runs = [Planted(f"s{i}", broken, 2 + i / 10, params={"observer": f"s{i}"}) for i in range(40)]
    alone = decision.recommend(study(*runs, share=0.3), question())
    assert named(alone) == ("ship", "s39")
    assert alone.chosen is not None
    assert 0.025 / 40 < alone.chosen.p < 0.025
    assert [one.ships.name for one in alone.qualified] == ["s39"]


def test_what_would_hardly_qualify_on_the_rest_is_not_chosen_on_the_first() -> None:
    first, _ = parts(10_000, 0.3)
    near = first[first < 9000][:12].tolist()  # 0.4 points of the first 3,000
    runs = [with_setting("far", 0, 3.0), Planted("near", near, 4.0, params={"observer": "near"})]
    assert named(decision.recommend(study(*runs, share=0.3), question())) == ("ship", "far")
    # Alone it is tried all the same.
    assert named(decision.recommend(study(runs[1], share=0.3), question())) == ("ship", "near")


# ---- The front


def test_the_front_has_what_nothing_beats_in_both() -> None:
    whole = study(
        with_setting("exact", 0, 2.0), with_setting("worse", 10, 1.9), with_setting("fast", 90, 4.0),
        with_setting("fast too", 95, 4.0), Planted("untimed", 0, None, params={"observer": "untimed"}),
    )  # fmt: skip
    found = decision.candidates(whole, question())
    assert [one.ships.name for one in decision.front(found)] == ["fast", "exact"]
    assert decision.front([]) == []
