"""verify: reruns a bundle's golden rows on this device, through every graph of one variant.

Each value must lie within the bound that the manifest states for its task, output and group of rows, around
what the float64 oracle gave; pruned graphs have bounds of their own. Every graph runs twice: all rows as one
batch, then the first row of each group by itself, because batches of one row go through other kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from te_runtime.bundle import Bundle
from te_runtime.executor import Executor, TaskReader
from te_runtime.golden_rows import GoldenRows, read_golden_rows, take_rows
from te_runtime.manifest import GraphSpec, TaskSpec, Variant
from te_runtime.prediction import Prediction
from te_runtime.providers import CudaOptions, Provider
from te_runtime.session import open_session

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from te_runtime.session_types import Session

__all__ = ["Comparison", "TaskCheck", "VerifyReport", "verify"]


@dataclass(frozen=True)
class Comparison:
    """One output of one run against the oracle, told by its worst value.

    Attributes:
        graph: path of the graph, or `trunk + tail` or `trunk + joint tails` for the two in a row.
        task: the task.
        output: `prediction` or `routing_weights`.
        batch: rows in the batch that was run.
        row: golden row of the worst value, from 0.
        column: its place in the row, from 0, counted over all axes but the first.
        expected: what the oracle gave.
        found: what the graph gave.
        allowed: the largest error the manifest allows there.
        ratio: error / allowed; at most 1 where all is well, infinite for NaN.
        values_out_of_bound: how many values of this output are out of bound in this run.
    """

    graph: str
    task: str
    output: str
    batch: int
    row: int
    column: int
    expected: float
    found: float
    allowed: float
    ratio: float
    values_out_of_bound: int


@dataclass(frozen=True)
class TaskCheck:
    """One task over every graph and run."""

    task: str
    worst: Comparison
    values_out_of_bound: int


@dataclass(frozen=True)
class VerifyReport:
    """What verify found.

    Attributes:
        precision: the variant.
        provider: where it ran.
        rows: golden rows.
        graphs: what was compared: a graph's path, or two with ` + ` between them for the two in a row.
        graph_files: the graphs that ran, each once.
        tasks: every task with its worst value.
        mismatches: the outputs with values out of bound, in the order the graphs ran; empty if all is well.
    """

    precision: str
    provider: str
    rows: int
    graphs: tuple[str, ...]
    graph_files: tuple[str, ...]
    tasks: tuple[TaskCheck, ...]
    mismatches: tuple[Comparison, ...]

    @property
    def ok(self) -> bool:
        """Whether every value lay within its bound."""
        return not self.mismatches


def verify(
    bundle: Bundle,
    variant: Variant,
    split: Executor,
    *,
    provider: Provider,
    threads: int,
    device_id: int = 0,
) -> VerifyReport:
    """Rerun the golden rows through trunk, tails and joint tails, and through every other graph of the variant.

    Args:
        bundle: the bundle.
        variant: which of its variants.
        split: mode split of that variant.
        provider: where to run.
        threads: CPU threads per graph.
        device_id: which GPU, for CUDA.

    Returns:
        The report; a value out of bound is in it and raises nothing.

    Raises:
        BundleError: golden rows or a graph cannot be used.
    """
    golden = read_golden_rows(bundle, variant)
    of_pruned = replace(golden, bounds=golden.pruned_bounds)
    cuda = CudaOptions(device_id)

    def opened(graph: GraphSpec) -> Session:
        path = bundle.path(graph.path)
        return open_session(path, graph, provider=provider, threads=threads, cuda=cuda)

    comparisons = list(_compare_split(golden, bundle, variant, split))
    comparisons += _compare_tails(golden, bundle, variant, opened, provider)
    shared = [graph.path for graph in (variant.trunk, variant.joint_tails) if graph is not None]
    ran = [*shared, *(graphs.tail.path for graphs in variant.tasks)]
    for graph, tasks in _whole_graphs(bundle, variant):
        comparisons += _compare_graph(golden, opened(graph), tasks, provider)
        ran.append(graph.path)
    for graph, task in _pruned_graphs(bundle, variant):
        comparisons += _compare_graph(of_pruned, opened(graph), (task,), provider)
        ran.append(graph.path)
    return VerifyReport(
        precision=variant.precision,
        provider=provider,
        rows=golden.rows,
        graphs=tuple(dict.fromkeys(comparison.graph for comparison in comparisons)),
        graph_files=tuple(ran),
        tasks=tuple(_task_check(task, comparisons) for task in bundle.manifest.task_names),
        mismatches=tuple(entry for entry in comparisons if entry.values_out_of_bound),
    )


def _whole_graphs(bundle: Bundle, variant: Variant) -> Iterator[tuple[GraphSpec, tuple[TaskSpec, ...]]]:
    """The graphs that go from the model's inputs to predictions, with the tasks that each one answers; without a
    trunk, task graphs are the tails, which have run.
    """
    tasks = bundle.manifest.tasks
    yield variant.joint, tasks
    for task, graphs in zip(tasks, variant.tasks, strict=True):
        if variant.trunk is not None:
            yield graphs.graph, (task,)
        if graphs.standalone is not None:
            yield graphs.standalone, (task,)


def _pruned_graphs(bundle: Bundle, variant: Variant) -> Iterator[tuple[GraphSpec, TaskSpec]]:
    for task, graphs in zip(bundle.manifest.tasks, variant.tasks, strict=True):
        if graphs.pruned is not None:
            yield graphs.pruned.graph, task


def _compare_split(
    golden: GoldenRows, bundle: Bundle, variant: Variant, split: Executor
) -> Iterator[Comparison]:
    for rows in _runs(golden):
        predictions = split.run(take_rows(golden, rows), len(rows), bundle.manifest.task_names)
        for graphs in variant.tasks:
            label = _label(variant, variant.joint_tails or graphs.tail)
            yield from _compare_task(golden, rows, label, graphs.task, predictions[graphs.task])


def _compare_tails(
    golden: GoldenRows,
    bundle: Bundle,
    variant: Variant,
    opened: Callable[[GraphSpec], Session],
    provider: Provider,
) -> Iterator[Comparison]:
    """Each tail on what the trunk gives, one tail loaded at a time; without joint tails they have run in mode split."""
    if variant.trunk is None or variant.joint_tails is None:
        return
    trunk = opened(variant.trunk)
    names = [spec.name for spec in variant.trunk.outputs]
    feeds = [take_rows(golden, rows) for rows in _runs(golden)]
    feeds = [{**given, **dict(zip(names, _run(trunk, given), strict=True))} for given in feeds]
    del trunk
    for task, graphs in zip(bundle.manifest.tasks, variant.tasks, strict=True):
        label = _label(variant, graphs.tail)
        yield from _compare_graph(golden, opened(graphs.tail), (task,), provider, feeds=feeds, label=label)


def _compare_graph(
    golden: GoldenRows,
    session: Session,
    tasks: tuple[TaskSpec, ...],
    provider: Provider,
    *,
    feeds: Sequence[Mapping[str, NDArray[np.generic]]] | None = None,
    label: str | None = None,
) -> list[Comparison]:
    """Compare what a graph gives for each run's feeds, which are the golden rows where none are given."""
    graph = session.spec
    comparisons: list[Comparison] = []
    for number, rows in enumerate(_runs(golden)):
        outputs = _run(session, take_rows(golden, rows) if feeds is None else feeds[number])
        for task in tasks:
            prediction = TaskReader(graph, task, provider).read(outputs, len(rows))
            comparisons += _compare_task(golden, rows, label or graph.path, task.name, prediction)
    return comparisons


def _run(session: Session, feeds: Mapping[str, NDArray[np.generic]]) -> Sequence[NDArray[np.generic]]:
    return session.run({spec.name: feeds[spec.name] for spec in session.spec.inputs})


def _label(variant: Variant, graph: GraphSpec) -> str:
    return graph.path if variant.trunk is None else f"{variant.trunk.path} + {graph.path}"


def _runs(golden: GoldenRows) -> Iterator[NDArray[np.intp]]:
    """The golden rows of each batch to run."""
    yield np.arange(golden.rows)
    for start in golden.group_starts:
        yield np.array([start])


def _compare_task(
    golden: GoldenRows, rows: NDArray[np.intp], graph: str, task: str, prediction: Prediction
) -> Iterator[Comparison]:
    found = {"prediction": prediction.output, "routing_weights": prediction.routing_weights}
    for output, array in found.items():
        if array is not None:
            yield _compare(golden, rows, graph=graph, task=task, output=output, found=array)


def _compare(
    golden: GoldenRows,
    rows: NDArray[np.intp],
    *,
    graph: str,
    task: str,
    output: str,
    found: NDArray[np.generic],
) -> Comparison:
    oracle = golden.oracle[task, output][rows].reshape(len(rows), -1)
    allowed = np.broadcast_to(golden.bounds[task, output][rows, None], oracle.shape)
    values = found.astype(np.float64).reshape(oracle.shape)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        error = np.abs(values - oracle)
        ratio = np.where(error == 0, 0.0, error / allowed)
    is_within = error <= allowed  # False for NaN
    ratio = np.where(np.isnan(ratio), np.inf, ratio)
    row, column = np.unravel_index(int(np.argmax(ratio)), ratio.shape)
    return Comparison(
        graph=graph,
        task=task,
        output=output,
        batch=len(rows),
        row=int(rows[row]),
        column=int(column),
        expected=float(oracle[row, column]),
        found=float(values[row, column]),
        allowed=float(allowed[row, column]),
        ratio=float(ratio[row, column]),
        values_out_of_bound=int(np.count_nonzero(~is_within)),
    )


def _task_check(task: str, comparisons: Iterable[Comparison]) -> TaskCheck:
    own = [entry for entry in comparisons if entry.task == task]
    worst = max(own, key=lambda entry: (entry.values_out_of_bound > 0, entry.ratio))
    return TaskCheck(task, worst, sum(entry.values_out_of_bound for entry in own))
