"""What is computed from constants alone is a constant.

    y = x · softmax(select(W, 1))        y = x · w,   w = softmax(select(W, 1))   (W is gone)

A chain is every such node that hangs together with others by a value, or by a float constant that both read. It is
folded as a whole, and what the rest of the graph reads of it becomes initializers. Only where they take 4 kB in all, or
no more than the float constants that nothing but the chain reads, which then are gone; where none of them is a second
copy of a constant that stays; and where outputs depend on the same parameters afterwards: an initializer counts as all
parameters behind it, so a Concat of two that are read apart stays. Where a chain is too large, its largest end is left
in the graph, and the rest of it is judged again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from te_export.rewrite.constant_values import (
    MOVES,
    SMALL_BYTES,
    Values,
    compute_constants,
    is_constant,
    size_bytes,
)
from te_export.rewrite.edit import Edit
from te_export.rewrite.log import Applied, Declined, Findings
from te_export.verify.dependencies import dependencies_of
from te_export.verify.regions import Region

__all__ = ["RULE", "fold_constants"]

RULE = "fold_constants"

_COPY_BYTES = 256
"""Smaller tensors stand in several graphs anyway (bundle/weights_file.py)."""

Chain = tuple[ir.Node, ...]
Asked = Mapping[ir.Value, frozenset[Region]]


@dataclass(frozen=True)
class _Kept:
    """A value of a chain that the rest of the graph reads, as the initializer that it becomes.

    Attributes:
        sources: the constants that it counts as.
    """

    value: ir.Value
    tensor: ir.TensorProtocol
    sources: tuple[str, ...]


@dataclass(frozen=True)
class _Fold:
    """A chain, or what is left of one.

    Attributes:
        saved_bytes: of the constants that are gone.
    """

    chain: Chain
    kept: tuple[_Kept, ...]
    saved_bytes: int


@dataclass(frozen=True)
class _Refused:
    """Why a chain cannot be folded with this node in it."""

    node: ir.Node
    reason: str


def fold_constants(graph: ir.Graph) -> Findings:
    """Put initializers in the place of what is computed from constants alone, in place."""
    constants = compute_constants(graph)
    if not constants.nodes and not constants.refused:
        return Findings()
    asked = _asked(graph)
    applied: list[Applied] = []
    declined = [Declined(RULE, str(node.name), reason) for node, reason in constants.refused.items()]
    sources: dict[str, tuple[str, ...]] = {}
    for chain in _chains(constants.nodes):
        folds, refused = _check(chain, constants.values, asked)
        for fold in folds:
            sources |= _rewrite(graph, fold)
            applied.append(Applied(RULE, str(fold.chain[0].name), _what(fold)))
        declined += [Declined(RULE, str(first.node.name), first.reason) for first in refused[:1]]
    return Findings(tuple(applied), tuple(declined), sources)


def _asked(graph: ir.Graph) -> Asked:
    """The regions of each value that the graph's outputs are made of."""
    asked: dict[ir.Value, frozenset[Region]] = {}
    for output in graph.outputs:
        for value, regions in dependencies_of(output).needed.items():
            asked[value] = asked.get(value, frozenset()) | regions
    return asked


def _chains(nodes: Sequence[ir.Node]) -> list[Chain]:
    """The nodes that hang together, in the order of `nodes`; shapes and indices that several read join nothing."""
    holders: dict[ir.Value, list[ir.Node]] = {}
    for node in nodes:
        for value in _links(node):
            holders.setdefault(value, []).append(node)
    chain_of: dict[ir.Node, int] = {}
    for number, first in enumerate(nodes):
        waiting = [first]
        while waiting:
            node = waiting.pop()
            if node not in chain_of:
                chain_of[node] = number
                waiting += [other for value in _links(node) for other in holders[value]]
    chains: dict[int, list[ir.Node]] = {}
    for node in nodes:
        chains.setdefault(chain_of[node], []).append(node)
    return [tuple(chain) for chain in chains.values()]


def _links(node: ir.Node) -> list[ir.Value]:
    read = [value for value in node.inputs if value is not None]
    return [*(value for value in read if value.producer() is not None or _is_float(value)), *node.outputs]


def _is_float(value: ir.Value) -> bool:
    return value.dtype is not None and value.dtype.is_floating_point()


def _check(
    chain: Chain, values: Mapping[ir.Value, Values], asked: Asked
) -> tuple[list[_Fold], list[_Refused]]:
    """What of a chain is folded, and why not more; whatever is left is judged again without what was refused."""
    folds: list[_Fold] = []
    refused: list[_Refused] = []
    waiting = [chain]
    while waiting:
        part = waiting.pop()
        checked = _check_whole(part, values, asked)
        if isinstance(checked, _Refused):
            refused.append(checked)
            waiting += _chains(_without(part, checked.node))
        elif checked.kept:
            folds.append(checked)
    return folds, refused


def _without(chain: Chain, node: ir.Node) -> list[ir.Node]:
    """The chain without a node and all that is computed from it."""
    gone = {node}
    for other in chain:
        if any(value is not None and value.producer() in gone for value in other.inputs):
            gone.add(other)
    return [other for other in chain if other not in gone]


def _check_whole(chain: Chain, values: Mapping[ir.Value, Values], asked: Asked) -> _Fold | _Refused:
    nodes = frozenset(chain)
    read_elsewhere = [
        value
        for node in chain
        for value in node.outputs
        if any(use.node not in nodes for use in value.uses())
    ]
    gone = _gone(nodes)
    size, saved = sum(map(size_bytes, read_elsewhere)), sum(map(size_bytes, gone))
    if size > max(SMALL_BYTES, saved):
        node = _producer(max(read_elsewhere, key=size_bytes))
        return _Refused(
            node,
            f"as constants, what is computed from constants here would take {size:,} bytes, more than the "
            f"{SMALL_BYTES:,} that are allowed and the {saved:,} that would be saved",
        )
    kept: list[_Kept] = []
    for value in read_elsewhere:
        checked = _check_value(value, values[value], asked.get(value, frozenset()), gone)
        if isinstance(checked, str):
            return _Refused(_producer(value), checked)
        kept.append(checked)
    return _Fold(chain, tuple(kept), saved)


def _gone(nodes: frozenset[ir.Node]) -> frozenset[ir.Value]:
    """The float constants that nothing but `nodes` read."""
    read = {value for node in nodes for value in node.inputs if value is not None and is_constant(value)}
    return frozenset(
        value
        for value in read
        if _is_float(value) and not value.is_graph_output() and all(use.node in nodes for use in value.uses())
    )


def _producer(value: ir.Value) -> ir.Node:
    node = value.producer()
    assert node is not None  # it is a value of a chain
    return node


def _check_value(
    value: ir.Value, values: Values, regions: frozenset[Region], gone: frozenset[ir.Value]
) -> _Kept | str:
    sources = dependencies_of(value).parameters({})
    staying = sorted(str(leaf.name) for leaf in _moved_from(value) - gone)
    if staying and size_bytes(value) >= _COPY_BYTES:
        return f"what it gives would be a second copy of {', '.join(staying)}, which something else reads"
    if sources and _is_integer(value):
        return f"as constants, its integers would no longer be seen to depend on {', '.join(sorted(sources))}"
    if any(dependencies_of(value, region).parameters({}) != sources for region in regions):
        return f"its output {value.name} is read in parts that come from different ones of {', '.join(sorted(sources))}"
    assert value.dtype is not None  # compute_constants saw it
    with np.errstate(over="ignore"):  # looked for here
        rounded = np.array(values, value.dtype.numpy(), order="C")
    if (np.isinf(rounded) & np.isfinite(values)).any():
        return f"its output {value.name} passes the largest {rounded.dtype}"
    return _Kept(value, ir.tensor(rounded), tuple(sorted(sources)))


def _is_integer(value: ir.Value) -> bool:
    return value.dtype is not None and value.dtype.is_integer()


def _moved_from(value: ir.Value) -> frozenset[ir.Value]:
    """The float constants whose elements a value is made of, as they are; none where it is computed."""
    node = value.producer()
    if node is None:
        return frozenset({value}) if _is_float(value) else frozenset()
    if node.op_type not in MOVES:
        return frozenset()
    return frozenset[ir.Value]().union(*(_moved_from(read) for read in node.inputs if read is not None))


def _rewrite(graph: ir.Graph, fold: _Fold) -> dict[str, tuple[str, ...]]:
    edit = Edit(graph)
    sources: dict[str, tuple[str, ...]] = {}
    made: dict[object, ir.Value] = {}
    for kept in fold.kept:
        alike = (kept.tensor.dtype, tuple(kept.tensor.shape.numpy()), kept.tensor.tobytes(), kept.sources)
        if alike not in made:
            made[alike] = edit.initializer(kept.tensor, name=_name(graph, kept))
            sources[str(made[alike].name)] = kept.sources
        edit.replace(kept.value, made[alike])
    edit.done()
    return sources


def _name(graph: ir.Graph, kept: _Kept) -> str:
    """The value's name, which is one in all graphs, after that of the largest constant in it."""
    named = [name for name in kept.sources if name in graph.initializers]  # a part of a stack is not
    if not named:
        return f"{kept.value.name}.folded"
    return f"{max(named, key=lambda name: size_bytes(graph.initializers[name]))}.{kept.value.name}"


def _what(fold: _Fold) -> str:
    size = sum(kept.tensor.nbytes for kept in fold.kept)
    nodes = "1 node" if len(fold.chain) == 1 else f"{len(fold.chain)} nodes"
    return f"{nodes} computed ahead, with {size:,} bytes in the place of {fold.saved_bytes:,}"
