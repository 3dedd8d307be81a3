"""What each layer of a variant costs the accuracy of the tasks that read it, by measuring.

    everything converted → task t loses a points
    everything but the layer → task t loses b points         the layer costs t: a - b

Judged on the rows, and in the points, that the variant is judged by. What repair measured is not measured again.
Where repair had nothing to do, the layers are measured here, the largest first, so far as a bound on the work
allows: it counts trials, rows and bytes and not seconds, so that every machine measures the same layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import onnx_ir as ir

from te_export.partition import GraphSet
from te_export.precision.accuracy import TaskAccuracy
from te_export.precision.evaluation import Evaluation
from te_export.precision.float16.half_weights import parts_of
from te_export.precision.form_trial import try_form
from te_export.precision.repair import Repaired
from te_export.precision.units import layer_units
from te_export.rewrite.graph_cost import measure_cost
from te_export.rewrite.stack import Part
from te_runtime.manifest import LayerAccuracy, LayerLoss

__all__ = ["layer_costs", "most_trials"]

_MOST_TRIALS = 12
_MOST_ROWS = 2**14
_MOST_BYTES = 2**31

Figures = Mapping[str, TaskAccuracy]
Held = Literal["converted", "kept", "float32"]
Readers = Callable[[str], frozenset[str]]
"""Tells the tasks whose prediction depends on a weight."""


def layer_costs(
    found: Repaired, graphs: GraphSet, evaluation: Evaluation, scratch: Path
) -> tuple[LayerAccuracy, ...]:
    """Every unit of a variant, split by the tasks that read its layers, in the order of the joint graph.

    Args:
        found: how the variant was converted, and what repair measured.
        graphs: in float32; they stay as they are.
        scratch: a folder for graphs that are tried.

    Raises:
        BundleError: onnxruntime refuses a converted graph.
    """
    joint = graphs.joint
    units = _units(found, joint)
    sizes = _sizes(joint)
    readers = _readers(graphs)
    held = _held(found, sizes)
    open_units = [unit for unit in units if unit & set(found.converted) and unit not in found.spared]
    spared = dict(found.spared)
    left = most_trials(len(evaluation.x), measure_cost(joint.graph).weight_bytes)
    for batch in _batches(open_units, readers, sizes)[:left]:
        trial = try_form(found.form, joint, frozenset().union(*batch), evaluation, scratch)
        spared |= dict.fromkeys(batch, trial.figures)
    entries: list[LayerAccuracy] = []
    for unit in units:
        measured = spared.get(unit)
        for (reading, state), names in _split(unit, readers, held).items():
            tasks = tuple(task for task in graphs.tasks if task in reading)
            told = None if measured is None else _loss(found.before, measured, tasks, evaluation)
            entries.append(
                LayerAccuracy(
                    weights=tuple(names),
                    parameters=sum(sizes[name] for name in names),
                    tasks=None if len(tasks) == len(graphs.tasks) else tasks,
                    held=state,
                    loss=None if state == "float32" else told,
                )
            )
    return tuple(entries)


def most_trials(rows: int, weight_bytes: int) -> int:
    """How many trials may be made to tell what layers cost.

    Args:
        rows: that a trial is judged on.
        weight_bytes: of the float32 joint graph, which a trial may write as often.
    """
    return min(_MOST_TRIALS, _MOST_ROWS // max(rows, 1), _MOST_BYTES // max(weight_bytes, 1))


def _units(found: Repaired, joint: ir.Model) -> list[frozenset[str]]:
    """Units of the joint graph; whatever else was converted, such as small weights in fp16, shape by shape."""
    units = layer_units(joint.graph)
    rest = frozenset(found.converted).difference(*units)
    shapes: dict[tuple[int, ...], set[str]] = {}
    for part in _parts(joint):
        if part.name in rest:
            shapes.setdefault(tuple(part.tensor.shape.numpy()), set()).add(part.name)
    return [*units, *map(frozenset, shapes.values())]


def _parts(model: ir.Model) -> Iterator[Part]:
    for value in model.graph.initializers.values():
        yield from parts_of(value)


def _sizes(joint: ir.Model) -> dict[str, int]:
    """How many numbers each weight has, in the order of the graph; parts of a stack by their own names."""
    return {part.name: math.prod(part.tensor.shape.numpy()) for part in _parts(joint)}


def _readers(graphs: GraphSet) -> Readers:
    """By the task graphs; of a weight that the joint graph alone has, every task."""
    found: dict[str, set[str]] = {}
    for task, model in graphs.tasks.items():
        for name in _sizes(model):
            found.setdefault(name, set()).add(task)
    every = frozenset(graphs.tasks)
    return lambda name: frozenset(found.get(name, every))


def _batches(
    units: Sequence[frozenset[str]], readers: Readers, sizes: Mapping[str, int]
) -> list[list[frozenset[str]]]:
    """Units that no task reads two of may share a trial; the batches with most parameters come first."""
    batches: list[tuple[set[str], list[frozenset[str]]]] = []
    for unit in units:
        tasks = frozenset().union(*(readers(name) for name in unit))
        place = next((batch for batch in batches if batch[0].isdisjoint(tasks)), None)
        if place is None:
            place = (set(), [])
            batches.append(place)
        place[0].update(tasks)
        place[1].append(unit)
    together = [members for _, members in batches]
    return sorted(together, key=lambda batch: -sum(sizes[name] for unit in batch for name in unit))


def _held(found: Repaired, names: Iterable[str]) -> dict[str, Held]:
    states: dict[str, Held] = dict.fromkeys(names, "float32")
    states |= dict.fromkeys(found.converted, "converted")
    return states | dict.fromkeys(found.kept, "kept")


def _split(
    unit: frozenset[str], readers: Readers, held: Mapping[str, Held]
) -> dict[tuple[frozenset[str], Held], list[str]]:
    """A unit's weights by the tasks that read them: a stack of every task's first gate layer is a layer of each."""
    parts: dict[tuple[frozenset[str], Held], list[str]] = {}
    for name, state in held.items():
        if name in unit:
            parts.setdefault((readers(name), state), []).append(name)
    return parts


def _loss(before: Figures, spared: Figures, tasks: Sequence[str], evaluation: Evaluation) -> LayerLoss:
    """The task that layers cost most; of tasks that they cost as many points, one that was over budget, and then the
    one whose error they add most to.
    """
    over = evaluation.misses(before)

    def cost(task: str) -> tuple[float, bool, float]:
        whole, rest = before[task], spared[task]
        points = _less(evaluation.loss_points(whole), evaluation.loss_points(rest))
        return points, task in over, _less(whole.relative_error, rest.relative_error)

    task = max(tasks, key=cost)
    return LayerLoss(
        task=task,
        loss_points=_finite(evaluation.loss_points(before[task])),
        spared_loss_points=_finite(evaluation.loss_points(spared[task])),
        relative_error=_finite(before[task].relative_error),
        spared_relative_error=_finite(spared[task].relative_error),
    )


def _less(whole: float, rest: float) -> float:
    """The difference; none between two that are not finite."""
    return whole - rest if math.isfinite(whole) or math.isfinite(rest) else 0.0


def _finite(figure: float) -> float | None:
    return figure if math.isfinite(figure) else None
