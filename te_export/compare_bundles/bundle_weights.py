"""The weights of a bundle by name, and the part of the model that each is of.

Read from the fp32 trunk and tails, which hold each of them once; what joint, task and pruned graphs have beside them
is made of these.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import onnx

from te_export.compare_bundles.graph_file import GraphFile, read_graph
from te_export.compare_bundles.stacked_weights import take_apart
from te_export.compare_bundles.stored_tensor import StoredTensor
from te_runtime.bundle import Bundle
from te_runtime.interfaces import output_positions
from te_runtime.manifest import GraphSpec, TaskSpec, Variant

__all__ = ["Weight", "read_weights"]

_EXPERTS = re.compile(r"(?:^|\.)(?P<list>[a-z_]*(?:expert|component)[a-z_]*)[._]?(?P<number>\d+)?", re.I)
_PLAIN_LISTS = ("expert", "experts", "component", "components")
_NAMED_OWNERS = 3
_PASSING = ("Identity", "Reshape", "Squeeze", "Unsqueeze", "Transpose", "Flatten", "Split")


@dataclass(frozen=True)
class Weight:
    """One weight.

    Attributes:
        name: as the checkpoint has it, where the graphs tell; a weight that a rewrite computed has a name of its own.
        part: of the model, for a person: `backbone`, `expert 3`, `gate of click`.
        task: whose alone it is; None where tasks share it.
    """

    name: str
    tensor: StoredTensor
    part: str
    task: str | None


def read_weights(bundle: Bundle, variant: Variant) -> tuple[Weight, ...]:
    """Every weight of a variant: the trunk's, then each task's.

    Raises:
        BundleError: a graph cannot be read.
    """
    trunk = None if variant.trunk is None else read_graph(bundle, variant.trunk.path, variant.weights)
    shared = {} if trunk is None else trunk.weights
    tails = {graphs.task: read_graph(bundle, graphs.tail.path, variant.weights) for graphs in variant.tasks}
    pieces = take_apart(
        [*([] if trunk is None else [trunk]), *tails.values()], bundle.manifest.model.unused_parameters
    )
    found = [Weight(name, own, _trunk_part(name), None) for key in shared for name, own in pieces[key]]
    readers: dict[str, list[str]] = {}
    for task, tail in tails.items():
        for key in tail.weights:
            if key not in shared:
                readers.setdefault(key, []).append(task)
    specs = {graphs.task: graphs.tail for graphs in variant.tasks}
    places = {
        task.name: _tail_places(tails[task.name], specs[task.name], task) for task in bundle.manifest.tasks
    }
    for key, tasks in readers.items():
        owner = tasks[0] if len(tasks) == 1 else None
        for name, own in pieces[key]:
            place = _expert_part(name) or places[tasks[0]].get(key, "layers")
            found.append(Weight(name, own, _owned_part(place, tasks), owner))
    return tuple(found)


def _trunk_part(name: str) -> str:
    return _expert_part(name) or (name.split(".")[0] if "." in name else "trunk")


def _expert_part(name: str) -> str | None:
    """`expert 3`, `experts`, or the module's own name for a list of experts among others."""
    found = _EXPERTS.search(name)
    if found is None:
        return None
    if found["number"] is None or "+" in name:  # a piece of a stack whose names do not tell
        return found["list"]
    plain = found["list"].lower().rstrip("_") in _PLAIN_LISTS and found.start() == 0
    return f"expert {found['number']}" if plain else name[: found.end()]


def _owned_part(place: str, tasks: list[str]) -> str:
    """`gate of click`; of several tasks where a few have it in common."""
    if len(tasks) > _NAMED_OWNERS:
        return f"{place} shared by {len(tasks)} tasks"
    return f"{place} of {' and '.join(tasks)}"


def _tail_places(tail: GraphFile, spec: GraphSpec, task: TaskSpec) -> Mapping[str, str]:
    """Which weights of a tail only the routing weights depend on (gate), which they do not (head), and the rest."""
    prediction, routing = output_positions(spec, task)
    producers = {output: node for node in tail.nodes for output in node.output}
    to_prediction = spec.outputs[prediction].name
    if routing is None:
        return dict.fromkeys(_above(producers, [to_prediction], ()) & tail.weights.keys(), "head")
    cut = _softmax_to(producers, spec.outputs[routing].name)
    gate = _above(producers, cut, ()) & tail.weights.keys()
    head = _above(producers, [to_prediction], cut) & tail.weights.keys()
    return {
        name: "layers" if name in gate and name in head else "gate" if name in gate else "head"
        for name in gate | head
    }


def _softmax_to(producers: Mapping[str, onnx.NodeProto], routing: str) -> list[str]:
    """The routing weights, and what they are only another shape of."""
    same = [routing]
    while (node := producers.get(same[-1])) is not None and node.op_type in _PASSING and node.input:
        same.append(node.input[0])
    return same


def _above(producers: Mapping[str, onnx.NodeProto], values: Iterable[str], cut: Iterable[str]) -> set[str]:
    """The names that `values` depend on, not through those of `cut`."""
    seen = set(cut)
    waiting = [value for value in values if value not in seen]
    found: set[str] = set()
    while waiting:
        value = waiting.pop()
        if value in seen:
            continue
        seen.add(value)
        found.add(value)
        node = producers.get(value)
        waiting += [] if node is None else list(node.input)
    return found
