"""Of the forms of a precision the faster one is taken, and of the others it is said why not."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir
import pytest

from te_export.errors import AccuracyError
from te_export.partition import GraphSet
from te_export.precision import variants
from te_export.precision.evaluation import Evaluation, probe_evaluation
from te_export.precision.form import Form
from te_export.precision.latency import LatencyRatio
from te_export.precision.repair import Repaired
from te_export.precision.variants import BuiltVariant, build_variant_graphs
from te_export.verify.references import References

Build = Callable[[], BuiltVariant]


@pytest.fixture
def build(wide_graphs: Callable[[], GraphSet], wide_references: References, tmp_path: Path) -> Build:
    """int8 with rows to take ranges from, within any budget."""
    probe = probe_evaluation(wide_references)
    evaluation = Evaluation("calibration data", probe.x, probe.tasks, 100.0, calibration=probe.x)
    return lambda: build_variant_graphs("int8", wide_graphs(), evaluation, tmp_path)


def latencies(monkeypatch: pytest.MonkeyPatch, ratios: Mapping[str, float]) -> None:
    def measured(sessions: Mapping[str, object], feeds: Mapping[int, object]) -> tuple[LatencyRatio, ...]:
        return tuple(
            LatencyRatio(
                name,
                batch,
                ratios[name],
                ratios[name],
                ratios[name],
                latency_us=1.0,
                latency_low_us=1.0,
                latency_high_us=1.0,
                rounds=1,
            )
            for batch in feeds
            for name in sessions
        )

    monkeypatch.setattr(variants, "measure_ratios", measured)


def missing(monkeypatch: pytest.MonkeyPatch, *forms: str) -> None:
    """Let these forms be over budget whatever is kept."""
    plain = variants.repair

    def repair(form: Form, joint: ir.Model, evaluation: Evaluation, scratch: Path) -> Repaired:
        found = plain(form, joint, evaluation, scratch)
        if form.name not in forms:
            return found
        before = {task: replace(figures, drop_points=101.5) for task, figures in found.before.items()}
        return replace(found, misses=("task_1",), before=before)

    monkeypatch.setattr(variants, "repair", repair)


@pytest.mark.parametrize(
    ("dynamic", "form"), [(0.4, "dynamic"), (0.47, "dynamic"), (0.48, "static"), (0.6, "static")]
)
def test_static_is_taken_unless_dynamic_is_clearly_faster(
    dynamic: float, form: str, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    latencies(monkeypatch, {"fp32": 1.0, "static": 0.5, "dynamic": dynamic})

    found = build()

    assert found.form == form
    assert set(found.latencies) == {"static", "dynamic"}
    assert (found.notes, found.timing_notes) == ((), ())


def test_a_form_that_is_over_budget_is_told_of(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    latencies(monkeypatch, {"fp32": 1.0, "static": 0.2, "dynamic": 0.5})
    missing(monkeypatch, "static")

    found = build()

    assert found.form == "dynamic"
    (note,) = found.notes
    assert note.startswith("int8: static: task_0 loses 101.50 points, ")
    assert note.endswith("allowed 100; keeping layers in float32 did not mend it before none was left")


def test_without_a_form_that_fits_the_reason_names_each(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing(monkeypatch, "static", "dynamic")

    with pytest.raises(AccuracyError, match=r"^int8 is left out: static: task_0 .*; dynamic: task_0 "):
        build()


def test_a_slower_variant_is_noted_apart_from_what_is_written_down(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    latencies(monkeypatch, {"fp32": 1.0, "static": 1.25, "dynamic": 1.5})

    found = build()

    assert found.notes == ()
    (note,) = found.timing_notes
    assert note == (
        "int8 is SLOWER than fp32 on this machine's CPU, all tasks in one thread: 1.25x at B=1, 1.25x at B=8, "
        "1.25x at B=64"
    )


def test_what_keeping_layers_costs_is_told_in_bytes_and_in_time(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = variants.repair

    def keep_one(form: Form, joint: ir.Model, evaluation: Evaluation, scratch: Path) -> Repaired:
        found = plain(form, joint, evaluation, scratch)
        first, *others = found.converted
        return replace(found, converted=tuple(others), kept=frozenset({first}))

    monkeypatch.setattr(variants, "repair", keep_one)
    latencies(
        monkeypatch,
        {
            "fp32": 1.0,
            "static": 0.4,
            "dynamic": 0.9,
            "static without repair": 0.25,
            "dynamic without repair": 0.8,
        },
    )

    found = build()

    assert found.form == "static"
    (note,) = found.notes
    assert re.match(r"int8: 1 weight stays in float32, which takes [1-9][\d,]* bytes more, because", note)
    (timing,) = found.timing_notes
    assert timing == (
        "int8: what is held more exactly costs, of fp32's time, 0.40x for 0.25x at B=1, 0.40x for 0.25x at B=8, "
        "0.40x for 0.25x at B=64"
    )
