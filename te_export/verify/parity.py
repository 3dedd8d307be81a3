"""Parity: every graph of a variant against the oracle, judged by torch float32's own error on the same rows.

Per output and group of rows: the largest absolute error over every graph (joint, task, trunk followed by
tail, standalone) and batch size. The worst graph is what is reported. RMS errors are over ordinary rows,
since large rows would drown them. Relative errors are over the larger of the element's magnitude in the
oracle and the RMS of the group.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from te_export.capture.joint_graph import EXPERT_FEATURES, prediction_name, routing_weights_name
from te_export.errors import ParityError
from te_export.partition import PREDICTION, ROUTING_WEIGHTS
from te_export.verify.graph_runs import GraphRun, run_graph, run_tail
from te_export.verify.probe_rows import ORDINARY
from te_export.verify.references import OutputReference, References
from te_export.verify.tolerance import TORCH_FACTOR, Tolerance
from te_runtime.manifest import GraphSpec, GroupParity, OutputParity, TaskGraphs, TaskParity

__all__ = ["StagedGraphs", "verify_graphs"]

_SHOWN_FAILURES = 12
_SUM_ULPS = 4.0


@dataclass(frozen=True)
class StagedGraphs:
    """The graphs of one variant as written, not yet published."""

    root: Path
    joint: GraphSpec
    trunk: GraphSpec
    tasks: tuple[TaskGraphs, ...]


@dataclass
class _Worst:
    """The worst errors of one output so far, over all graphs seen."""

    reference: OutputReference
    groups: tuple[tuple[str, int, int], ...]
    tolerance: Tolerance
    max_abs: dict[str, float] = field(default_factory=dict)
    max_rel: float = 0.0
    rms: float = 0.0
    argmax_agreement: float = 1.0

    def add(self, run: GraphRun, output: str) -> list[str]:
        """Take in one graph's outputs; the answer says which groups were not allowed."""
        found = run.outputs[output].astype(np.float64)
        failures = []
        for group, start, stop in self.groups:
            inside = (run.indices >= start) & (run.indices < stop)
            oracle = self.reference.oracle[run.indices[inside]]
            error = np.abs(found[inside] - oracle)
            bound = self.bound(start, stop)
            if not self.tolerance.passes(error, oracle, bound):
                failures.append(
                    f"{run.graph}, {output}, {group} rows: max error {_worst(error):.3g}, allowed {bound:.3g}"
                )
            self.max_abs[group] = max(self.max_abs.get(group, 0.0), _worst(error))
            self.max_rel = max(self.max_rel, _worst(error / _scale(oracle)))
            if group == ORDINARY:
                self.rms = max(self.rms, _rms(error))
        self.argmax_agreement = min(
            self.argmax_agreement, _agreement(found, self.reference.oracle[run.indices])
        )
        return failures

    def bound(self, start: int, stop: int) -> float:
        oracle = self.reference.oracle[start:stop]
        return self.tolerance.bound(oracle, self._torch_max(start, stop))

    def _torch_max(self, start: int, stop: int) -> float:
        return float(np.abs(self.reference.torch[start:stop] - self.reference.oracle[start:stop]).max())

    def parity(self) -> OutputParity:
        """The figures as the manifest keeps them."""
        oracle, torch = self.reference.oracle, self.reference.torch.astype(np.float64)
        groups = tuple(
            GroupParity(
                group=group,
                rows=stop - start,
                max_abs_error=self.max_abs[group],
                torch_max_abs_error=self._torch_max(start, stop),
                bound=self.bound(start, stop),
            )
            for group, start, stop in self.groups
        )
        ratios = [g.max_abs_error / g.torch_max_abs_error for g in groups if g.torch_max_abs_error > 0.0]
        one_wide = oracle.shape[1] == 1
        return OutputParity(
            max_abs_error=max(g.max_abs_error for g in groups),
            max_rel_error=self.max_rel,
            torch_max_abs_error=max(g.torch_max_abs_error for g in groups),
            torch_max_rel_error=max(
                _worst(np.abs(torch[start:stop] - oracle[start:stop]) / _scale(oracle[start:stop]))
                for _, start, stop in self.groups
            ),
            ratio=max(ratios, default=None),
            rms_error=self.rms,
            torch_rms_error=max(
                _rms(torch[a:b] - oracle[a:b]) for name, a, b in self.groups if name == ORDINARY
            ),
            argmax_agreement=None if one_wide else self.argmax_agreement,
            torch_argmax_agreement=None if one_wide else _agreement(torch, oracle),
            groups=groups,
        )


def verify_graphs(
    staged: StagedGraphs, references: References, tolerance: Tolerance
) -> tuple[TaskParity, ...]:
    """Run every graph over the probe rows and judge it.

    Returns:
        The parity of each task, in the order of the export.

    Raises:
        ParityError: naming each graph, output and group of rows that is further off than allowed.
    """
    groups = references.rows.groups
    worst = {
        (name, output): _Worst(getattr(task, output), groups, tolerance)
        for name, task in references.tasks.items()
        for output in (PREDICTION, ROUTING_WEIGHTS)
    }
    trunk_worst = _Worst(references.expert_features, groups, tolerance)
    failures: list[str] = []
    trunk = run_graph(staged.root, staged.trunk, references.rows.x)
    failures += trunk_worst.add(trunk, EXPERT_FEATURES)
    for name, output, run, run_output in _runs(staged, references, trunk):
        failures += [f"task {name}: {failure}" for failure in worst[name, output].add(run, run_output)]
        if output == ROUTING_WEIGHTS:
            failures += _check_sums(name, run, run_output)
    if failures:
        _raise(failures, tolerance)
    return tuple(
        TaskParity(name, worst[name, PREDICTION].parity(), worst[name, ROUTING_WEIGHTS].parity())
        for name in references.tasks
    )


def _runs(
    staged: StagedGraphs, references: References, trunk: GraphRun
) -> Iterator[tuple[str, str, GraphRun, str]]:
    """Every (task, output, run, name of the output in the run), one graph open at a time."""
    x = references.rows.x
    joint = run_graph(staged.root, staged.joint, x)
    for name in references.tasks:
        yield name, PREDICTION, joint, prediction_name(name)
        yield name, ROUTING_WEIGHTS, joint, routing_weights_name(name)
    for task in staged.tasks:
        runs = [run_graph(staged.root, task.graph, x), run_tail(staged.root, task.tail, trunk)]
        if task.standalone is not None:
            runs.append(run_graph(staged.root, task.standalone, x))
        for run in runs:
            yield task.task, PREDICTION, run, PREDICTION
            yield task.task, ROUTING_WEIGHTS, run, ROUTING_WEIGHTS


def _check_sums(name: str, run: GraphRun, output: str) -> list[str]:
    """Rows of routing weights sum to 1 to within the rounding of a float32 sum of K terms."""
    weights = run.outputs[output].astype(np.float64)
    off = np.abs(weights.sum(axis=1) - 1.0)
    allowed = _SUM_ULPS * float(np.finfo(np.float32).eps) * max(4, weights.shape[1])
    if bool((off <= allowed).all()):
        return []
    return [
        f"task {name}: {run.graph}, {output}: a row sums to 1 ± {_worst(off):.3g}, allowed ± {allowed:.3g}"
    ]


def _raise(failures: list[str], tolerance: Tolerance) -> None:
    more = f"\n  … and {len(failures) - _SHOWN_FAILURES} more" if len(failures) > _SHOWN_FAILURES else ""
    rule = (
        f"--atol {tolerance.atol or 0.0:g} --rtol {tolerance.rtol or 0.0:g}"
        if tolerance.is_callers
        else f"{TORCH_FACTOR:g} times torch float32's own error, or a floor of a few units in the last place"
    )
    advice = (
        "Loosen --atol or --rtol."
        if tolerance.is_callers
        else "Try another --opset, and report this with the versions in use."
    )
    raise ParityError(
        f"{len(failures)} checks against the float64 oracle failed; nothing was written. Allowed: {rule}.\n  "
        + "\n  ".join(failures[:_SHOWN_FAILURES])
        + more
        + f"\n{advice}"
    )


def _worst(values: NDArray[np.float64]) -> float:
    """The largest value; infinite where any is NaN."""
    return float(np.nan_to_num(values, nan=np.inf).max())


def _rms(values: NDArray[np.float64]) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


def _scale(oracle: NDArray[np.float64]) -> NDArray[np.float64]:
    """What relative errors are over: the element's magnitude, or the group's RMS where that is larger."""
    return np.maximum(np.abs(oracle), max(_rms(oracle), float(np.finfo(np.float64).tiny)))


def _agreement(found: NDArray[np.generic], oracle: NDArray[np.float64]) -> float:
    flat = found.reshape(len(found), -1)
    return float(np.mean(flat.argmax(axis=1) == oracle.reshape(len(oracle), -1).argmax(axis=1)))
