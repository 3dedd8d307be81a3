"""Building one precision variant: which form, what stays in float32, and whether it is worth having.

fp32 graphs → each form of the precision → repair (within every task's budget) → measure → the better one
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir

from te_export.errors import AccuracyError, GateError
from te_export.models.input_rows import InputRows
from te_export.partition import GraphSet, order_initializers
from te_export.precision.accuracy import TaskAccuracy, doubt_labels
from te_export.precision.block_weights import BlockWeights
from te_export.precision.evaluation import Evaluation
from te_export.precision.float16.half_precision import HalfPrecision
from te_export.precision.float16.true_float16 import check_true_float16
from te_export.precision.form import Form
from te_export.precision.latency import LatencyRatio, latency_feeds, measure_ratios
from te_export.precision.layer_costs import layer_costs
from te_export.precision.repair import Repaired, repair
from te_export.precision.static.activation_ranges import measure_ranges
from te_export.precision.static.static_int8 import StaticInt8
from te_export.precision.trial import open_trial
from te_export.precision.units import layer_units
from te_export.rewrite.graph_cost import measure_cost
from te_runtime.errors import BundleError
from te_runtime.manifest import FormName, LayerAccuracy, Precision
from te_runtime.session_types import Session

__all__ = ["BuiltVariant", "build_variant_graphs"]

_CLEARLY_FASTER = 0.95
_SHOWN = 6


@dataclass(frozen=True)
class BuiltVariant:
    """A variant's graphs, not yet written, and what is to be said of it.

    Attributes:
        kept: weights that are held more exactly because a task could not spare them.
        converted: weights that were converted.
        figures: by task, how the joint graph compares with the oracle.
        before_repair: the same with everything converted.
        layers: in what its layers are held, and what that costs.
        latencies: of the joint graph over the fp32 one, for each form that was tried and each batch size.
        notes: what a person must know.
        timing_notes: the same, of what was timed: true of this machine and this run, so not to be written down.
    """

    precision: Precision
    form: FormName
    graphs: GraphSet
    kept: tuple[str, ...]
    converted: tuple[str, ...]
    figures: Mapping[str, TaskAccuracy]
    before_repair: Mapping[str, TaskAccuracy]
    layers: tuple[LayerAccuracy, ...]
    latencies: Mapping[FormName, tuple[LatencyRatio, ...]]
    notes: tuple[str, ...]
    timing_notes: tuple[str, ...]


def build_variant_graphs(
    precision: Precision, fp32: GraphSet, evaluation: Evaluation, scratch: Path
) -> BuiltVariant:
    """Convert the graphs of the fp32 variant.

    Args:
        precision: int8, int4 or fp16.
        fp32: the verified graphs; they stay as they are.
        evaluation: what every task is judged on, and its budget.
        scratch: a folder for graphs that are tried; the caller removes it.

    Raises:
        AccuracyError: no form fits the budget of every task, or there is nothing to convert.
    """
    repaired = [
        _repaired(form, fp32.joint, evaluation, scratch, precision)
        for form in _forms(precision, fp32, evaluation, scratch)
    ]
    fitting = [found for found in repaired if found.converted and not found.misses]
    if not fitting:
        raise AccuracyError(_why_none(precision, repaired, evaluation))
    ratios = _measure(fp32.joint, fitting, evaluation.x, scratch)
    latencies = {found.form.name: _named(ratios, found.form.name) for found in fitting}
    best = _best(fitting, latencies)
    unrepaired = _named(ratios, _unrepaired_name(best))
    graphs = _convert_all(best, fp32)
    if precision == "fp16":
        check_true_float16(graphs.joint, evaluation)
    return BuiltVariant(
        precision=precision,
        form=best.form.name,
        graphs=graphs,
        kept=tuple(sorted(best.kept & _layer_weights(fp32.joint))),
        converted=best.converted,
        figures=best.figures,
        before_repair=best.before,
        layers=_layers(best, fp32, evaluation, scratch, precision),
        latencies=latencies,
        notes=(
            *(
                f"{precision}: {_why_not(found, evaluation)}"
                for found in repaired
                if found not in fitting and _layer_count(found)
            ),
            *_notes(precision, best, evaluation, kept_bytes=_kept_bytes(best, fp32.joint)),
        ),
        timing_notes=tuple(_timing_notes(precision, latencies[best.form.name], unrepaired)),
    )


def _forms(precision: Precision, fp32: GraphSet, evaluation: Evaluation, scratch: Path) -> Sequence[Form]:
    """The ways to build a precision; for int8, static first, which needs data."""
    if precision == "fp16":
        return [HalfPrecision()]
    if precision == "int4":
        return [BlockWeights(4)]
    if evaluation.calibration is None:
        return [BlockWeights(8)]
    ranges = measure_ranges(fp32.joint, evaluation.calibration.arrays, scratch)
    return [StaticInt8(ranges), BlockWeights(8)]


def _repaired(
    form: Form, joint: ir.Model, evaluation: Evaluation, scratch: Path, precision: Precision
) -> Repaired:
    with _refusals(precision):
        return repair(form, joint, evaluation, scratch)


def _layers(
    best: Repaired, fp32: GraphSet, evaluation: Evaluation, scratch: Path, precision: Precision
) -> tuple[LayerAccuracy, ...]:
    with _refusals(precision):
        return layer_costs(best, fp32, evaluation, scratch)


@contextmanager
def _refusals(precision: Precision) -> Iterator[None]:
    """What onnxruntime refuses is a gate that failed."""
    try:
        yield
    except BundleError as error:
        raise AccuracyError(f"{precision}: onnxruntime cannot run the converted graph: {error}") from error


def _measure(
    joint: ir.Model, fitting: Sequence[Repaired], x: InputRows, scratch: Path
) -> tuple[LatencyRatio, ...]:
    """Time the joint graph in each form beside fp32; a repaired form also as it would be without repair."""
    sessions: dict[str, Session] = {"fp32": open_trial(joint, scratch)}
    for found in fitting:
        sessions[found.form.name] = open_trial(_converted(found, joint), scratch)
        if found.kept:
            sessions[_unrepaired_name(found)] = open_trial(_converted(_unrepaired(found), joint), scratch)
    names = [spec.name for spec in sessions["fp32"].spec.inputs]
    return measure_ratios(sessions, latency_feeds(names, x))


def _named(ratios: Sequence[LatencyRatio], name: str) -> tuple[LatencyRatio, ...]:
    return tuple(ratio for ratio in ratios if ratio.name == name)


def _unrepaired(found: Repaired) -> Repaired:
    return replace(found, kept=frozenset())


def _unrepaired_name(found: Repaired) -> str:
    return f"{found.form.name} without repair"


def _kept_bytes(found: Repaired, joint: ir.Model) -> int:
    """What the weights of the joint graph take more because some are held more exactly."""
    repaired, plain = (_converted(form, joint) for form in (found, _unrepaired(found)))
    return measure_cost(repaired.graph).weight_bytes - measure_cost(plain.graph).weight_bytes


def _best(fitting: Sequence[Repaired], latencies: Mapping[FormName, tuple[LatencyRatio, ...]]) -> Repaired:
    """The first, unless a later one is clearly faster: noise must not decide what is written."""
    best = fitting[0]
    for other in fitting[1:]:
        if _speed(latencies[other.form.name]) < _CLEARLY_FASTER * _speed(latencies[best.form.name]):
            best = other
    return best


def _speed(ratios: Sequence[LatencyRatio]) -> float:
    """The geometric mean over batch sizes."""
    return float(np.exp(np.mean([np.log(ratio.ratio) for ratio in ratios])))


def _convert_all(found: Repaired, fp32: GraphSet) -> GraphSet:
    """Every graph of the variant, converted alike.

    Raises:
        GateError: inputs or outputs of a graph came out otherwise than in the fp32 variant.
    """
    return fp32.changed(partial(_converted, found))


def _converted(found: Repaired, model: ir.Model) -> ir.Model:
    copy = model.clone()
    found.form.convert(copy, found.kept)
    order_initializers(copy.graph)
    for before, after in zip(_interface(model), _interface(copy), strict=True):
        if before != after:
            raise GateError(
                f"{model.graph.name}: {found.form.name} made {after} of {before}; nothing was written"
            )
    return copy


def _interface(model: ir.Model) -> list[tuple[object, ...]]:
    values = (*model.graph.inputs, *model.graph.outputs)
    return [(value.name, value.dtype, str(value.shape)) for value in values]


def _layer_weights(joint: ir.Model) -> frozenset[str]:
    return frozenset().union(*layer_units(joint.graph))


def _why_none(precision: Precision, repaired: Sequence[Repaired], evaluation: Evaluation) -> str:
    """Why no form of a precision can be shipped."""
    return f"{precision} is left out: {'; '.join(_why_not(found, evaluation) for found in repaired)}"


def _why_not(found: Repaired, evaluation: Evaluation) -> str:
    if not found.before or not _layer_count(found):
        if found.form.name == "static":
            return "static: no layer, convolution or table is large enough to convert, so nothing would be gained"
        return (
            f"{found.form.name}: no linear layer or table is large enough to convert, so nothing would be gained; "
            "convolutions are converted by static int8 alone, which needs --calibration-data"
        )
    lost = ", ".join(
        f"{task} loses {evaluation.loss_points(found.before[task]):.2f} points"
        for task in evaluation.misses(found.before)[:_SHOWN]
    )
    return (
        f"{found.form.name}: {lost}, allowed {evaluation.budget_points:g}; keeping layers in {found.form.kept_as} "
        "did not mend it before none was left"
    )


def _layer_count(found: Repaired) -> int:
    return len(found.converted) + len(found.kept)


def _timing_notes(
    precision: Precision, ratios: Sequence[LatencyRatio], unrepaired: Sequence[LatencyRatio]
) -> Iterator[str]:
    if unrepaired:
        pairs = zip(ratios, unrepaired, strict=True)
        shown = ", ".join(f"{own.ratio:.2f}x for {plain.ratio:.2f}x at B={own.batch}" for own, plain in pairs)
        yield f"{precision}: what is held more exactly costs, of fp32's time, {shown}"
    slow = [ratio for ratio in ratios if ratio.low > 1.0]
    if slow:
        shown = ", ".join(f"{ratio.ratio:.2f}x at B={ratio.batch}" for ratio in slow)
        yield f"{precision} is SLOWER than fp32 on this machine's CPU, all tasks in one thread: {shown}"


def _notes(precision: Precision, best: Repaired, evaluation: Evaluation, *, kept_bytes: int) -> list[str]:
    notes = []
    if best.kept:
        names = sorted(best.kept)
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        tasks = ", ".join(evaluation.misses(best.before))
        stay = "1 weight stays" if len(names) == 1 else f"{len(names)} weights stay"
        notes.append(
            f"{precision}: {stay} in {best.form.kept_as}, which takes {kept_bytes:,} bytes more, "
            f"because {tasks} would lose too much otherwise: "
            f"{', '.join(names[:_SHOWN])}{more}"
        )
    doubts = (doubt_labels(task, found, precision) for task, found in best.figures.items())
    notes += [doubt for doubt in doubts if doubt]
    if evaluation.source == "probe rows":
        notes.append(
            f"{precision} was judged on random rows only; give --calibration-data to have its accuracy judged"
        )
    return notes
