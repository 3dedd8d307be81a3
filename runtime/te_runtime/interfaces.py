"""Whether the graphs a manifest names fit the model's inputs, its tasks, and each other.

Whoever writes a manifest anew can make its checksum true, so what could give another task's numbers must show
here: every graph is named once, in its variant's folder, and gives exactly what its task
promises.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from te_runtime.errors import BundleError
from te_runtime.manifest import GraphSpec, Manifest, TaskSpec, TensorSpec, Variant

__all__ = ["BATCH_AXIS", "check_interfaces", "output_positions", "variant_graphs"]

BATCH_AXIS = "batch"


def check_interfaces(manifest: Manifest, where: str) -> None:
    """Check every graph's inputs and outputs against the model's inputs and tasks.

    Args:
        manifest: a parsed manifest.
        where: how to name the manifest in errors.

    Raises:
        BundleError: at the first graph or tensor that does not fit.
    """
    try:
        _check_batch_axes(manifest)
        for variant in manifest.variants:
            _check_paths(variant)
            _check_joint(manifest, variant.joint, manifest.inputs)
            if variant.trunk is not None:
                _check_trunk(manifest, variant.trunk)
            made = () if variant.trunk is None else variant.trunk.outputs
            if variant.joint_tails is not None:
                _check_joint_tails(manifest, variant, variant.joint_tails, (*manifest.inputs, *made))
            for task, graphs in zip(manifest.tasks, variant.tasks, strict=True):
                _check_task_graph(task, graphs.graph, manifest.inputs)
                _check_task_graph(task, graphs.tail, (*manifest.inputs, *made))
                if variant.trunk is None and graphs.tail != graphs.graph:
                    raise _MisfitError(
                        f"tail of task {task.name!r} is {graphs.tail.path!r}, expected its task graph "
                        f"{graphs.graph.path!r} where trunk is null"
                    )
                if graphs.standalone is not None:
                    _check_task_graph(task, graphs.standalone, manifest.inputs)
                if graphs.pruned is not None:
                    _check_task_graph(task, graphs.pruned.graph, manifest.inputs)
    except _MisfitError as error:
        advice = "Copy the bundle again whole, or export the model again."
        raise BundleError(f"{where}: {error}. {advice}") from error


def variant_graphs(variant: Variant) -> Iterator[GraphSpec]:
    """Every graph of a variant: the joint graph, the trunk, the joint tails, then each task's graphs."""
    yield variant.joint
    if variant.trunk is not None:
        yield variant.trunk
    if variant.joint_tails is not None:
        yield variant.joint_tails
    for task in variant.tasks:
        yield task.graph
        if variant.trunk is not None:  # without one, tail and task graph are one file
            yield task.tail
        if task.standalone is not None:
            yield task.standalone
        if task.pruned is not None:
            yield task.pruned.graph


def output_positions(graph: GraphSpec, task: TaskSpec) -> tuple[int, int | None]:
    """Where a graph gives a task's prediction and, if the task has a gate, its routing weights.

    The joint graph puts the task's name before the output's, as in `task_0.prediction`; a graph of one task
    may.

    Returns:
        Positions in `graph.outputs`.

    Raises:
        BundleError: `graph` does not give them. check_interfaces has made sure that it does.
    """
    try:
        prediction = _position(graph, task, "prediction")
        return prediction, _position(graph, task, "routing_weights") if task.routing_weights else None
    except _MisfitError as error:
        raise BundleError(str(error)) from error


class _MisfitError(Exception):
    """What does not fit; check_interfaces adds the place and the advice."""


def _check_batch_axes(manifest: Manifest) -> None:
    """Each input and output must begin with the batch axis, and each output must have no other open axis."""
    for spec in manifest.inputs:
        if spec.shape[:1] != (BATCH_AXIS,):
            raise _MisfitError(f"input {spec.name!r} has shape {spec.shape}, expected {BATCH_AXIS!r} first")
    for task in manifest.tasks:
        for output in filter(None, (task.prediction, task.routing_weights)):
            if output.shape[:1] != (BATCH_AXIS,) or not all(
                isinstance(axis, int) for axis in output.shape[1:]
            ):
                raise _MisfitError(
                    f"output {output.name!r} of task {task.name!r} has shape {output.shape}, "
                    f"expected {BATCH_AXIS!r} first and numbers after it"
                )


def _check_paths(variant: Variant) -> None:
    seen = {variant.weights.lower()}
    for graph in variant_graphs(variant):
        if graph.path.lower() in seen:
            raise _MisfitError(
                f"variant {variant.precision} uses {graph.path!r} twice, expected one file per graph"
            )
        seen.add(graph.path.lower())
    for path in seen:
        if not path.startswith(f"{variant.precision}/"):
            raise _MisfitError(f"{path!r} is not in folder {variant.precision!r} of its variant")


def _check_joint(manifest: Manifest, joint: GraphSpec, feeding: Iterable[TensorSpec]) -> None:
    _check_inputs(joint, feeding)
    promised = 0
    for task in manifest.tasks:
        for kind, spec in _promises(task):
            name = f"{task.name}.{kind}"
            found = next((output for output in joint.outputs if output.name == name), None)
            _check_tensor(joint, name, found, spec)
            promised += 1
    _check_count(joint, promised)


def _check_joint_tails(
    manifest: Manifest, variant: Variant, joint_tails: GraphSpec, feeding: Iterable[TensorSpec]
) -> None:
    if variant.trunk is None or len(variant.tasks) == 1:
        raise _MisfitError(
            f"variant {variant.precision} has joint_tails {joint_tails.path!r}, expected null where trunk is null or "
            "there is one task"
        )
    _check_joint(manifest, joint_tails, feeding)


def _check_trunk(manifest: Manifest, trunk: GraphSpec) -> None:
    _check_inputs(trunk, manifest.inputs)
    names = [spec.name for spec in (*manifest.inputs, *trunk.outputs)]
    if len(set(names)) != len(names):
        raise _MisfitError(f"two values of graph {trunk.path!r} have one name: {', '.join(names):.200}")


def _check_task_graph(task: TaskSpec, graph: GraphSpec, feeding: Iterable[TensorSpec]) -> None:
    _check_inputs(graph, feeding)
    promises = _promises(task)
    for kind, spec in promises:
        position = _position(graph, task, kind)
        _check_tensor(graph, kind, graph.outputs[position], spec)
    _check_count(graph, len(promises))


def _promises(task: TaskSpec) -> list[tuple[str, TensorSpec]]:
    promises = [("prediction", task.prediction)]
    if task.routing_weights is not None:
        promises.append(("routing_weights", task.routing_weights))
    return promises


def _position(graph: GraphSpec, task: TaskSpec, kind: str) -> int:
    names = [output.name for output in graph.outputs]
    for name in (f"{task.name}.{kind}", kind):
        if name in names:
            return names.index(name)
    raise _MisfitError(
        f"graph {graph.path!r} gives {', '.join(names):.200}; expected {kind!r} of task {task.name!r}"
    )


def _check_inputs(graph: GraphSpec, feeding: Iterable[TensorSpec]) -> None:
    offered = {spec.name: spec for spec in feeding}
    names = [spec.name for spec in graph.inputs]
    if len(set(names)) != len(names):
        raise _MisfitError(f"two inputs of graph {graph.path!r} have one name: {', '.join(names):.200}")
    for spec in graph.inputs:
        if spec.name not in offered:
            known = ", ".join(offered)
            raise _MisfitError(
                f"graph {graph.path!r} reads {spec.name!r}, which nothing gives; given are {known:.200}"
            )
        _check_tensor(graph, spec.name, spec, offered[spec.name])


def _check_tensor(graph: GraphSpec, name: str, found: TensorSpec | None, expected: TensorSpec) -> None:
    if found is None:
        raise _MisfitError(f"graph {graph.path!r} does not give {name!r}")
    if (found.dtype, found.shape) != (expected.dtype, expected.shape):
        raise _MisfitError(
            f"{name!r} of graph {graph.path!r} is {found.dtype} {found.shape}, "
            f"expected {expected.dtype} {expected.shape}"
        )


def _check_count(graph: GraphSpec, promised: int) -> None:
    if len(graph.outputs) != promised:
        raise _MisfitError(f"graph {graph.path!r} gives {len(graph.outputs)} outputs, expected {promised}")
