"""Loads the graphs of one mode for a device, and picks what runs them."""

from __future__ import annotations

from collections.abc import Callable

from te_runtime.bundle import Bundle
from te_runtime.cuda_graphs import GraphExecutor
from te_runtime.deferred_session import DeferredSession
from te_runtime.device_executor import Answer, Device, DeviceExecutor, DeviceGraphs
from te_runtime.executor import Executor
from te_runtime.file_marks import FileMarks
from te_runtime.interfaces import variant_graphs
from te_runtime.manifest import GraphSpec, Variant
from te_runtime.plan import Mode, own_graph
from te_runtime.providers import CudaOptions, Provider
from te_runtime.session import OrtSession, open_session
from te_runtime.task_mode import TaskModeExecutor

__all__ = ["open_device_executor"]


def open_device_executor(
    bundle: Bundle,
    variant: Variant,
    mode: Mode,
    *,
    provider: Provider,
    threads: int,
    cuda: CudaOptions | None = None,
) -> Executor:
    """Load what every call of one mode needs, the trunk or the joint graph; the others wait until they are needed,
    unless batch sizes are to be recorded: mode `task` then begins with the trunk and every tail. In mode `pruned` each
    graph brings the trunk's weights to the device again.

    Args:
        bundle: the bundle.
        variant: which of its variants.
        mode: which graphs.
        provider: `cuda`; `cpu` runs the same code on the CPU, for tests.
        threads: CPU threads per graph.
        cuda: which GPU, and the batch sizes to record.

    Raises:
        BundleError, ProviderError: as open_session.
        InputError: batch sizes are to be recorded and a graph has another open axis.
    """
    options = cuda or CudaOptions()

    def opened(spec: GraphSpec) -> OrtSession:
        path = bundle.path(spec.path)
        return open_session(path, spec, provider=provider, threads=threads, cuda=options)

    device = Device(provider, options.device_id if provider == "cuda" else 0)

    def executor(graphs_of: Mode, *, joint_tails: bool = True) -> Executor:
        graphs = _open_graphs(
            bundle, variant, graphs_of, provider=provider, opened=opened, joint_tails=joint_tails
        )
        if not options.graph_batch_sizes:
            return DeviceExecutor(graphs, device)
        return GraphExecutor(graphs, device, bundle.manifest.inputs, options.graph_batch_sizes)

    if mode != "task" or variant.trunk is None or len(variant.tasks) == 1:
        return executor(mode)
    if options.graph_batch_sizes:
        return executor("split", joint_tails=False)
    return TaskModeExecutor(lambda: executor("task"), lambda: executor("split", joint_tails=False))


def _open_graphs(
    bundle: Bundle,
    variant: Variant,
    mode: Mode,
    *,
    provider: Provider,
    opened: Callable[[GraphSpec], OrtSession],
    joint_tails: bool,
) -> DeviceGraphs:
    marks = FileMarks(bundle, [variant.weights, *(graph.path for graph in variant_graphs(variant))])

    def deferred(spec: GraphSpec) -> DeferredSession[OrtSession]:
        def load() -> OrtSession:
            marks.require_unchanged(spec.path, variant.weights)
            return opened(spec)

        return DeferredSession(spec, load)

    def of_every_task(session: DeferredSession[OrtSession]) -> dict[str, Answer]:
        return {task.name: Answer.of(session, task, provider) for task in tasks}

    tasks = bundle.manifest.tasks
    if mode == "joint":
        joint = deferred(variant.joint)
        joint.get()
        return DeviceGraphs(None, of_every_task(joint))
    trunk = deferred(variant.trunk).get() if mode == "split" and variant.trunk is not None else None
    answers = {
        task.name: Answer.of(deferred(own_graph(own, mode) if trunk is None else own.tail), task, provider)
        for task, own in zip(tasks, variant.tasks, strict=True)
    }
    if trunk is None or variant.joint_tails is None or not joint_tails:
        return DeviceGraphs(trunk, answers)
    return DeviceGraphs(trunk, answers, of_every_task(deferred(variant.joint_tails)))
