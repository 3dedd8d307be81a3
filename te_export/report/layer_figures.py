"""What each layer of a variant costs, in rows for a table and in sentences; every report shows the same."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from te_runtime.manifest import LayerAccuracy, Precision, Variant

__all__ = [
    "LAYER_NUMBERS",
    "LayerTable",
    "costliest_layers",
    "kept_in",
    "layer_meaning",
    "layer_tables",
    "weights_text",
]

_SHOWN_NAMES = 12
_SHOWN_TASKS = 6
_SHOWN_COSTLIEST = 3
_LEAST_SHOWN = 0.0005
_NUMBER = re.compile(r"[0-9]{1,6}")
_NOTHING = "-"
_HEADINGS = (
    "weights",
    "held in",
    "costs, points",
    "of",
    "task it costs most",
    "costs, % of variance",
    "read by",
    "parameters",
)
LAYER_NUMBERS = ("costs, points", "of", "costs, % of variance", "parameters")
_CONVERTED: dict[Precision, str] = {"fp32": "float32", "int8": "8 bits", "int4": "4 bits", "fp16": "float16"}


@dataclass(frozen=True)
class LayerTable:
    """Layers of one variant that are read by the same kind of tasks."""

    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def layer_tables(variant: Variant) -> tuple[LayerTable, ...]:
    """The layers that every task reads, and those that some read; a table without rows is left out."""
    shared = [layer for layer in variant.layers if layer.tasks is None]
    own = [layer for layer in variant.layers if layer.tasks is not None]
    kinds = [("layers that every task reads", shared), ("layers that some tasks read", own)]
    return tuple(_table(title, layers, variant) for title, layers in kinds if layers)


def layer_meaning(variant: Variant) -> str:
    """What the tables say, and what was not measured."""
    open_layers = [layer for layer in variant.layers if layer.held != "float32"]
    unmeasured = sum(layer.loss is None for layer in open_layers)
    text = (
        "The layers of a row are converted or kept together. What they cost was measured: how much less the task that "
        f"they cost most loses with these layers in {kept_in(variant)} and every other layer converted, over the same "
        "data and in the same points as above. “Of” is what that task loses with every layer converted, so before any "
        f"was kept. {_chance(variant)}"
    )
    if unmeasured:
        text += (
            f" {unmeasured} of {len(open_layers)} rows were not measured: the trials are bounded, so that an export does "
            "not take noticeably longer, and the largest layers go first."
        )
    return text


def costliest_layers(variant: Variant) -> str:
    """The layers that cost most points, the first few; empty where none costs any."""
    measured = [(layer.weights, layer.loss) for layer in variant.layers if layer.loss is not None]
    costs = [(_cost(loss.loss_points, loss.spared_loss_points), names, loss.task) for names, loss in measured]
    ordered = sorted((entry for entry in costs if entry[0] >= _LEAST_SHOWN), key=lambda entry: -entry[0])
    return "; ".join(
        f"{weights_text(names)} {_shown(cost)} ({task})" for cost, names, task in ordered[:_SHOWN_COSTLIEST]
    )


def kept_in(variant: Variant) -> str:
    """What a layer is held in that a task could not spare."""
    return "8 bits" if variant.precision == "int4" else "float32"


def weights_text(names: Sequence[str]) -> str:
    """The names of weights, `experts.{0…7}.network.3.weight` for such as differ in one number only."""
    ranged = _ranged(names)
    if ranged:
        return ranged
    left = len(names) - _SHOWN_NAMES
    return ", ".join(names[:_SHOWN_NAMES]) + (f" and {left:,} more" if left > 0 else "")


def _table(title: str, layers: Sequence[LayerAccuracy], variant: Variant) -> LayerTable:
    """Columns that say nothing new are left out: readers where all are read by every task, and the share of variance
    where the points are that.
    """
    hidden = set()
    if all(layer.tasks is None for layer in layers):
        hidden.add("read by")
    if all(entry.metric == "relative error" for entry in variant.accuracy):
        hidden.add("costs, % of variance")
    shown = [place for place, heading in enumerate(_HEADINGS) if heading not in hidden]
    rows = tuple(
        tuple(cells[place] for place in shown) for cells in (_cells(layer, variant) for layer in layers)
    )
    return LayerTable(title, tuple(_HEADINGS[place] for place in shown), rows)


def _cells(layer: LayerAccuracy, variant: Variant) -> tuple[str, ...]:
    """A row under _HEADINGS."""
    return (
        weights_text(layer.weights),
        _held(layer, variant),
        *_loss_cells(layer),
        _readers(layer),
        f"{layer.parameters:,}",
    )


def _loss_cells(layer: LayerAccuracy) -> tuple[str, str, str, str]:
    loss = layer.loss
    if loss is None:
        return (_NOTHING if layer.held == "float32" else "not measured", _NOTHING, _NOTHING, _NOTHING)
    whole, spared = (
        None if error is None else 100 * error for error in (loss.relative_error, loss.spared_relative_error)
    )
    return (
        _points(loss.loss_points, loss.spared_loss_points),
        "infinite" if loss.loss_points is None else f"{loss.loss_points:.3f}",
        loss.task,
        _points(whole, spared),
    )


def _points(whole: float | None, spared: float | None) -> str:
    """The difference of two losses."""
    return _shown(_cost(whole, spared))


def _shown(cost: float) -> str:
    return f"{cost:z.3f}" if math.isfinite(cost) else "infinite"


def _cost(whole: float | None, spared: float | None) -> float:
    """None is a loss of answers that are not finite: layers that cost that cost more than any others."""
    if spared is None:
        return 0.0  # what is not finite comes from elsewhere
    return math.inf if whole is None else whole - spared


def _held(layer: LayerAccuracy, variant: Variant) -> str:
    if layer.held == "kept":
        return f"{kept_in(variant)}, kept"
    return _CONVERTED[variant.precision] if layer.held == "converted" else "float32"


def _readers(layer: LayerAccuracy) -> str:
    if layer.tasks is None:
        return "every task"
    left = len(layer.tasks) - _SHOWN_TASKS
    return ", ".join(layer.tasks[:_SHOWN_TASKS]) + (f" and {left:,} more" if left > 0 else "")


def _chance(variant: Variant) -> str:
    first = variant.accuracy[0]
    counted = any(entry.metric in ("accuracy", "agreement") for entry in variant.accuracy)
    worth = f" One row of {first.rows:,} is worth {100 / first.rows:.2g} points." if counted else ""
    return f"A cost around or below zero is chance.{worth}"


def _ranged(names: Sequence[str]) -> str:
    """The names as one with a range of numbers in it; empty where they are anything else than such a range."""
    split = [name.split(".") for name in names]
    differing = [place for place, values in enumerate(zip(*split, strict=False)) if len(set(values)) > 1]
    if len(differing) != 1 or len({len(parts) for parts in split}) != 1:
        return ""
    (place,) = differing
    numbers = {parts[place] for parts in split}
    if not all(_NUMBER.fullmatch(number) for number in numbers):
        return ""
    first = min(map(int, numbers))
    if numbers != {str(first + step) for step in range(len(names))}:
        return ""
    return ".".join([*split[0][:place], f"{{{first}…{first + len(names) - 1}}}", *split[0][place + 1 :]])
