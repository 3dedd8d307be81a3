"""What the text says of weights: a row for each part of the model that changed, a line for those that did not."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from te_export.compare_bundles.part_names import gathered
from te_export.compare_bundles.result import BundleDiff, WeightChange
from te_export.compare_bundles.text_layout import NOTHING, escaped, field, table

__all__ = ["weights_lines"]

_SHOWN_PARTS = 24
_HEADINGS = ("part", "weights", "values", "relative RMS", "largest")
_FOLDED = ".folded"


@dataclass(frozen=True)
class _Part:
    """The weights of one part of the model, those in both bundles and those in one."""

    name: str
    weights: tuple[WeightChange, ...]

    def of(self, *statuses: str) -> tuple[WeightChange, ...]:
        return tuple(weight for weight in self.weights if weight.status in statuses)

    @property
    def relative_rms(self) -> float | None:
        """RMS of all differences over that of all of A's numbers, of the weights whose numbers changed."""
        values = [weight.values for weight in self.of("changed") if weight.values is not None]
        moved = sum((value.rms_difference or 0.0) ** 2 * value.elements for value in values)
        own = sum((value.rms_before or 0.0) ** 2 * value.elements for value in values)
        if any(value.rms_difference is None for value in values) or not own:
            return None
        return math.sqrt(moved / own)


def weights_lines(diff: BundleDiff, *, verbose: bool) -> Iterator[str]:
    """The section on weights."""
    found = diff.weights
    if not found.is_compared:
        yield "weights: not compared, since one of the bundles has no fp32 variant"
        return
    if not found.is_different:
        yield f"weights: all {len(found.weights)} of fp32 have the same bytes"
        return
    yield "weights of fp32: how many changed, and how far"
    parts = _parts(found.weights)
    changed = [part for part in parts if part.of("changed")]
    shown = changed if verbose else _first_to_show(changed)
    if shown:
        yield from table(_HEADINGS, (_row(part) for part in shown))
    if len(shown) < len(changed):
        yield f"  ... of {len(changed)} parts: what tasks share, and those that moved most; -v shows all"
    for status, label in (("reshaped", "other shape"), ("removed", "only in A"), ("added", "only in B")):
        yield from _named_parts(label, status, parts)
    yield from _named_parts("unchanged", "same", [part for part in parts if not part.of("changed")])
    yield from _explanation(diff, parts)
    if verbose:
        yield ""
        yield from _every_weight(found.weights)


def _named_parts(label: str, status: str, parts: Iterable[_Part]) -> Iterator[str]:
    """One line that names the parts with weights of a status."""
    counted = [(part.name, _count(part, status)) for part in parts if part.of(status)]
    if counted:
        yield from field(label, "; ".join(gathered(counted)))


def _count(part: _Part, status: str) -> str:
    """How many of the part's weights, where it is not all of them."""
    own = len(part.of(status))
    return "" if own == len(part.weights) else f" ({own} of {len(part.weights)} weights)"


def _parts(weights: Iterable[WeightChange]) -> list[_Part]:
    found: dict[str, list[WeightChange]] = {}
    for weight in weights:
        found.setdefault(escaped(weight.part), []).append(weight)
    return [_Part(name, tuple(own)) for name, own in found.items()]


def _first_to_show(parts: Sequence[_Part]) -> list[_Part]:
    """All in the model's order; of many, what tasks share, then those of single tasks that moved most."""
    if len(parts) <= _SHOWN_PARTS:
        return list(parts)
    order = sorted(parts, key=lambda part: (" of " in part.name, -_moved(part)))
    chosen = {part.name for part in order[:_SHOWN_PARTS]}
    return [part for part in parts if part.name in chosen]


def _moved(part: _Part) -> float:
    return math.inf if part.relative_rms is None else part.relative_rms


def _row(part: _Part) -> tuple[str, ...]:
    changed = part.of("changed")
    values = [weight.values for weight in changed if weight.values is not None]
    elements = sum(math.prod(weight.shape_before or ()) for weight in part.of("changed", "same"))
    share = sum(value.changed for value in values) / max(1, elements)
    largest = [value.max_abs_difference for value in values if value.max_abs_difference is not None]
    return (
        part.name,
        f"{len(changed)} of {len(part.weights)}",
        _percent(share),
        _figure(part.relative_rms),
        _figure(max(largest) if len(largest) == len(values) else None),
    )


def _percent(share: float) -> str:
    """So many digits that a change is never shown as 0% and never as all."""
    for digits in (0, 1, 2):
        shown = f"{share:.{digits}%}"
        if (float(shown[:-1]) > 0 or share == 0) and (float(shown[:-1]) < 100 or share == 1):
            return shown
    return "<0.01%" if share < 0.5 else ">99.99%"


def _figure(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.1e}"


def _explanation(diff: BundleDiff, parts: Iterable[_Part]) -> Iterator[str]:
    """Why a change may not be where it seems, said only where it matters."""
    statuses = {weight.name: weight.status for weight in diff.weights.weights}
    folded = {name: status for name, status in statuses.items() if name.endswith(_FOLDED)}
    alone = ("removed", "added")
    if any(
        status in alone and statuses.get(name.removesuffix(_FOLDED)) in alone
        for name, status in folded.items()
    ):
        yield from field(
            "note",
            "the bundles were rewritten differently, so some layers are held in other weights: one named .folded "
            "holds the layer before or after it too",
        )
    elif "changed" in folded.values() and any(len(part.of("same")) == len(part.weights) for part in parts):
        yield from field(
            "note",
            "a weight named .folded holds the layer before or after it too, so its change may come from that one",
        )


def _every_weight(weights: Iterable[WeightChange]) -> Iterator[str]:
    rows = []
    for weight in weights:
        if weight.status == "same":
            continue
        values = weight.values
        figures = (NOTHING, NOTHING, NOTHING)
        if values is not None:
            figures = (
                f"{values.changed:,} of {values.elements:,}",
                _figure(values.relative_rms),
                _figure(values.max_abs_difference),
            )
        rows.append((escaped(weight.name), _told(weight), *figures))
    yield from table(("weight", "", "values", "relative RMS", "largest"), rows, names=2)


def _told(weight: WeightChange) -> str:
    if weight.status == "reshaped":
        return f"{weight.shape_before} to {weight.shape_after}"
    return {"changed": "changed", "removed": "only in A", "added": "only in B"}[weight.status]
