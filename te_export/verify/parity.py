"""Parity: every graph of a variant against the oracle, judged by torch float32's own error on the same rows.

What is reported of an output is the worst of every graph that gives it: joint, task, trunk followed by
tail or by the joint tails, and standalone, at every batch size.

A variant of lower precision is further from the oracle than torch is, and how far it may be is judged task by
task (precision/accuracy.py). Here its graphs must agree: each is held to twice the error of the joint graph. The
integers of int8 and int4 are the same in every graph; float16 rounds differently in each, so there a graph may
also err by twice what float16's rounding is simulated to cause. A pruned graph is held to twice the error of trunk
and tail where the experts that are gone answer their means, and it must agree with those two as float32 does with
itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from te_export.bundle.staged_graphs import StagedGraphs
from te_export.capture.joint_graph import EXPERT_FEATURES
from te_export.errors import GateError, ParityError
from te_export.partition import PREDICTION, ROUTING_WEIGHTS
from te_export.verify.error_figures import ErrorFigures, absolute_errors, measure_errors
from te_export.verify.graph_runs import GraphRun, run_graph, run_tail
from te_export.verify.references import OutputReference, References
from te_export.verify.tolerance import TORCH_FACTOR, Tolerance
from te_runtime.errors import BundleError
from te_runtime.manifest import GroupParity, OutputParity, Precision, TaskParity

__all__ = ["verify_graphs", "verify_lower_precision", "verify_pruned"]

_SHOWN_FAILURES = 12
_SUM_TOLERANCE = 1e-9
_SUM_ULPS = 4.0
_JOINT_FACTOR = 2.0
_JOINT_RULE = f"{_JOINT_FACTOR:g} times the joint graph's own error, and what float32 is allowed"
_HALF_RULE = f"{_JOINT_RULE}, or {_JOINT_FACTOR:g} times what float16's rounding is simulated to cause"
_HALF_OVER_FLOAT32 = 2.0**13
"""Unit roundoff of float16 over that of float32."""


class _Judge:
    """Judges one output of the model, whichever graph gives it."""

    def __init__(
        self,
        reference: OutputReference,
        references: References,
        tolerance: Tolerance,
        joint: NDArray[np.generic] | None = None,
        rounding: float = 0.0,
    ) -> None:
        """Judge by torch's own error, or by that of what the joint graph of a lower precision put out.

        Args:
            joint: what that graph put out; None to judge by torch's own error.
            rounding: how much coarser than float32's the rounding is that graphs may differ by.
        """
        self._oracle = reference.oracle
        self._indices = references.indices
        self._groups = references.rows.groups
        self._tolerance = tolerance
        self._torch = self._measure(reference.torch)
        if not np.isfinite(list(self._torch.max_abs.values())).all():
            raise GateError(
                "torch's own float32 outputs are not finite on the probe rows; nothing was written"
            )
        self._bounds = {
            group: tolerance.bound(
                reference.oracle[start:stop],
                torch_error=self._torch.max_abs[group],
                noise=float(reference.noise[start:stop].max()),
            )
            for group, start, stop in self._groups
        }
        if joint is not None:
            own = self._measure(joint).max_abs
            for group, start, stop in self._groups:
                noise = rounding * float(reference.noise[start:stop].max())
                self._bounds[group] += _JOINT_FACTOR * max(own[group], noise)
        self._worst: ErrorFigures | None = None

    def judge(self, run: GraphRun, output: str) -> list[str]:
        """Take in one graph's outputs; the answer says which groups of rows are further off than allowed."""
        found = run.outputs[output]
        figures = self._measure(found)
        self._worst = figures if self._worst is None else self._worst.worst_with(figures)
        return [
            f"{run.graph}, {output}, {group} rows: max error {figures.max_abs[group]:.3g}, "
            f"allowed {self._bounds[group]:.3g}"
            for group, start, stop in self._groups
            if not self._passes(found, group, start, stop)
        ]

    def differences(self, run: GraphRun, other: GraphRun, output: str) -> list[str]:
        """Groups of rows in which two float32 graphs of one function differ by more than both may err."""
        apart = absolute_errors(run.outputs[output], other.outputs[output].astype(np.float64))
        found = []
        for group, start, stop in self._groups:
            most = float(apart[(self._indices >= start) & (self._indices < stop)].max())
            if not most <= 2 * self._bounds[group]:
                found.append(
                    f"{run.graph}, {output}, {group} rows: {most:.3g} from {other.graph} with the mean outputs, "
                    f"allowed {2 * self._bounds[group]:.3g}"
                )
        return found

    def _measure(self, found: NDArray[np.generic]) -> ErrorFigures:
        return measure_errors(found, self._oracle, indices=self._indices, groups=self._groups)

    def _passes(self, found: NDArray[np.generic], group: str, start: int, stop: int) -> bool:
        inside = (self._indices >= start) & (self._indices < stop)
        exact = self._oracle[self._indices[inside]]
        return self._tolerance.passes(absolute_errors(found[inside], exact), exact, self._bounds[group])

    def parity(self) -> OutputParity:
        """The figures as the manifest keeps them."""
        worst, torch = self._worst, self._torch
        assert worst is not None  # the joint graph gives every output
        groups = tuple(
            GroupParity(group, stop - start, worst.max_abs[group], torch.max_abs[group], self._bounds[group])
            for group, start, stop in self._groups
        )
        ratios = [g.max_abs_error / g.torch_max_abs_error for g in groups if g.torch_max_abs_error > 0.0]
        has_arg_max = self._oracle.ndim == 2 and self._oracle.shape[1] > 1
        return OutputParity(
            max_abs_error=max(worst.max_abs.values()),
            max_rel_error=worst.max_rel,
            torch_max_abs_error=max(torch.max_abs.values()),
            torch_max_rel_error=torch.max_rel,
            ratio=max(ratios, default=None),
            rms_error=worst.rms,
            torch_rms_error=torch.rms,
            argmax_agreement=worst.argmax_agreement if has_arg_max else None,
            torch_argmax_agreement=torch.argmax_agreement if has_arg_max else None,
            groups=groups,
        )


def verify_graphs(
    staged: StagedGraphs, references: References, tolerance: Tolerance
) -> tuple[TaskParity, ...]:
    """Run every graph over the probe rows and judge it.

    Returns:
        The parity of each task, in the order of the export.

    Raises:
        ParityError: ONNX Runtime cannot run a graph, or some are further off than allowed: each graph,
        output and
            group of rows is named.
        GateError: torch's own float32 outputs are not finite, so there is nothing to judge by.
    """
    judges = {
        (name, output): _Judge(reference, references, tolerance)
        for name, task in references.tasks.items()
        for output, reference in task.outputs.items()
    }
    features = references.expert_features
    try:
        failures = _judge_all(
            staged,
            references,
            judges,
            None if features is None else _Judge(features, references, tolerance),
        )
    except BundleError as error:
        raise ParityError(f"onnxruntime cannot run a graph that was captured: {error}") from error
    if failures:
        _raise(failures, tolerance)
    return _parity(judges, references)


def verify_lower_precision(
    precision: Precision, staged: StagedGraphs, references: References
) -> tuple[TaskParity, ...]:
    """Run every graph of a variant of lower precision over the probe rows: they must agree with one another.

    Returns:
        The parity of each task, in the order of the export. Its bounds are what te_runtime holds the golden
        rows to.

    Raises:
        ParityError: ONNX Runtime cannot run a graph, some differ from the joint graph, or an output is not
            finite.
    """
    default = Tolerance()
    rounding = _HALF_OVER_FLOAT32 if precision == "fp16" else 0.0
    try:
        joint = run_graph(staged.root, staged.joint, references.rows.x)
        judges = {
            (name, output): _Judge(
                reference, references, default, joint.outputs[f"{name}.{output}"], rounding
            )
            for name, task in references.tasks.items()
            for output, reference in task.outputs.items()
        }
        features = _lower_features(staged, references, rounding)
        failures = _judge_all(staged, references, judges, features)
    except BundleError as error:
        raise ParityError(f"onnxruntime cannot run a converted graph: {error}") from error
    not_finite = [name for name, values in joint.outputs.items() if not np.isfinite(values).all()]
    failures += [f"{staged.joint.path}, {name}: holds NaN or infinity" for name in not_finite]
    if failures:
        rule = _HALF_RULE if rounding else _JOINT_RULE
        raise ParityError(
            f"its graphs differ from one another in {len(failures)} checks. Allowed: {rule}.\n  "
            + "\n  ".join(_shown(failures))
        )
    return _parity(judges, references)


def _lower_features(staged: StagedGraphs, references: References, rounding: float) -> _Judge | None:
    """The judge of expert features, where there are any."""
    if references.expert_features is None or staged.trunk is None:
        return None
    trunk = run_graph(staged.root, staged.trunk, references.rows.x)
    found = trunk.outputs[EXPERT_FEATURES]
    return _Judge(references.expert_features, references, Tolerance(), found, rounding)


def verify_pruned(
    staged: StagedGraphs, references: References, expected: Mapping[str, GraphRun]
) -> dict[str, TaskParity]:
    """Run every pruned graph over the probe rows, beside what the graphs as captured gave with the mean outputs put in.

    Args:
        expected: by task that has a pruned graph, that run.

    Returns:
        The parity of those tasks, by name. Its bounds are what te_runtime holds the golden rows to.

    Raises:
        ParityError: ONNX Runtime cannot run a graph, or the two ways differ.
    """
    try:
        found = {task: _verify_pruned(staged, references, task, run) for task, run in expected.items()}
    except BundleError as error:
        raise ParityError(f"onnxruntime cannot run a pruned graph: {error}") from error
    failures = [failure for _, more in found.values() for failure in more]
    if failures:
        raise ParityError(
            f"{len(failures)} checks of pruned graphs failed; nothing was written. Report this with the versions in "
            "use; without --prune-experts the export is not concerned.\n  " + "\n  ".join(_shown(failures))
        )
    return {task: parity for task, (parity, _) in found.items()}


def _verify_pruned(
    staged: StagedGraphs, references: References, name: str, expected: GraphRun
) -> tuple[TaskParity, list[str]]:
    run = run_graph(staged.root, staged.pruned[name], references.rows.x)
    parities: list[OutputParity] = []
    failures: list[str] = []
    for output, reference in references.tasks[name].outputs.items():
        failures += _Judge(reference, references, Tolerance()).differences(run, expected, output)
        judge = _Judge(reference, references, Tolerance(), expected.outputs[output])
        failures += judge.judge(run, output)
        parities.append(judge.parity())
    prediction, routing_weights = parities
    told = [f"task {name}: {failure}" for failure in failures]
    return TaskParity(name, prediction, routing_weights), told + _check_sums(
        name, run, ROUTING_WEIGHTS, references
    )


def _parity(judges: Mapping[tuple[str, str], _Judge], references: References) -> tuple[TaskParity, ...]:
    found = []
    for name in references.tasks:
        weights = judges.get((name, ROUTING_WEIGHTS))
        parity = None if weights is None else weights.parity()
        found.append(TaskParity(name, judges[name, PREDICTION].parity(), parity))
    return tuple(found)


def _judge_all(
    staged: StagedGraphs,
    references: References,
    judges: Mapping[tuple[str, str], _Judge],
    trunk_judge: _Judge | None,
) -> list[str]:
    trunk = None if staged.trunk is None else run_graph(staged.root, staged.trunk, references.rows.x)
    failures = [] if trunk_judge is None or trunk is None else trunk_judge.judge(trunk, EXPERT_FEATURES)
    for name, output, run, run_output in _runs(staged, references, trunk):
        failures += [f"task {name}: {failure}" for failure in judges[name, output].judge(run, run_output)]
        if output == ROUTING_WEIGHTS:
            failures += _check_sums(name, run, run_output, references)
    return failures


def _runs(
    staged: StagedGraphs, references: References, trunk: GraphRun | None
) -> Iterator[tuple[str, str, GraphRun, str]]:
    """Every (task, output, run, name of the output in the run), one graph open at a time.

    Without a trunk a task's tail is its task graph.
    """
    x = references.rows.x
    joined = [run_graph(staged.root, staged.joint, x)]
    if trunk is not None and staged.joint_tails is not None:
        joined.append(run_tail(staged.root, staged.joint_tails, trunk, x))
    for run in joined:
        for name, task in references.tasks.items():
            for output in task.outputs:
                yield name, output, run, f"{name}.{output}"
    for graphs in staged.tasks:
        runs = [run_graph(staged.root, graphs.graph, x)]
        if trunk is not None:
            runs.append(run_tail(staged.root, graphs.tail, trunk, x))
        if graphs.standalone is not None:
            runs.append(run_graph(staged.root, graphs.standalone, x))
        for run in runs:
            for output in references.tasks[graphs.task].outputs:
                yield graphs.task, output, run, output


def _check_sums(name: str, run: GraphRun, output: str, references: References) -> list[str]:
    """Where the oracle's routing weights sum to 1, so do these, to within the rounding of a float32 sum of K terms."""
    reference = references.tasks[name].routing_weights
    assert reference is not None  # there is no such output otherwise
    if np.abs(reference.oracle.sum(axis=1) - 1).max() > _SUM_TOLERANCE:
        return []  # a sigmoid for each expert, or a softmax of which some are left out
    weights = run.outputs[output].astype(np.float64)
    off = float(absolute_errors(weights.sum(axis=1), np.ones(len(weights))).max())
    allowed = _SUM_ULPS * float(np.finfo(np.float32).eps) * max(4, weights.shape[1])
    if off <= allowed:
        return []
    return [f"task {name}: {run.graph}, {output}: a row sums to 1 ± {off:.3g}, allowed ± {allowed:.3g}"]


def _shown(failures: list[str]) -> list[str]:
    shown = failures[:_SHOWN_FAILURES]
    left = len(failures) - len(shown)
    return [*shown, f"… and {left} more"] if left else shown


def _raise(failures: list[str], tolerance: Tolerance) -> None:
    if tolerance.is_callers:
        rule = f"--atol {tolerance.atol or 0.0:g} --rtol {tolerance.rtol or 0.0:g}"
        advice = "Loosen --atol or --rtol."
    else:
        rule = f"{TORCH_FACTOR:g} times torch float32's own error, or a floor of float32's expected rounding"
        advice = "Try another --opset, and report this with the versions in use."
    raise ParityError(
        f"{len(failures)} checks against the float64 oracle failed; nothing was written. Allowed: {rule}.\n  "
        + "\n  ".join(_shown(failures))
        + f"\n{advice}"
    )
