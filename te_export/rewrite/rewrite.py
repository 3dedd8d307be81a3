"""Exact rewrites: the same function of the input in fewer and cheaper nodes.

    captured joint graph → rewrite → (partition) → rewrite_cut → graphs to write

`rewrite` works on the joint graph before it is cut, so every graph shares what it finds; `rewrite_cut` works
on the graphs after it, and blocks the tails of the joint graph and of the joint tails, which no other graph has
together; `rewrite_alone` works on a task graph that was cut before any rewrite. Rules look at operators, constants
and uses, never at names. Each is applied until it finds nothing more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import onnx_ir as ir

from te_export.capture.joint_graph import JointGraph
from te_export.partition import GraphSet, cut_task, order_initializers
from te_export.rewrite.assemble_experts import assemble_experts
from te_export.rewrite.batch_linears import batch_linears
from te_export.rewrite.block_gates import block_gates
from te_export.rewrite.cancel_shapes import cancel_shapes
from te_export.rewrite.flatten_sequences import flatten_sequences
from te_export.rewrite.fold_batch_norms import fold_batch_norms
from te_export.rewrite.fold_constants import fold_constants
from te_export.rewrite.fold_linears import fold_linears
from te_export.rewrite.fuse_experts import fuse_experts
from te_export.rewrite.graph_cost import measure_cost
from te_export.rewrite.log import Applied, Declined, Findings, GraphCosts, RewriteLog
from te_export.rewrite.stack import stack_of
from te_export.rewrite.stack_linears import stack_linears
from te_export.rewrite.turn_heads import turn_heads
from te_runtime.manifest import OptimizeLevel, TargetProvider

__all__ = ["Rewritten", "rewrite", "rewrite_alone", "rewrite_cut"]

Rule = Callable[[ir.Graph], Findings]

_MOST_ROUNDS = 100


@dataclass(frozen=True)
class Rewritten:
    """The joint graph after the rewrites that come before the cut."""

    graph: JointGraph
    log: RewriteLog


def rewrite(captured: JointGraph, *, provider: TargetProvider, level: OptimizeLevel) -> Rewritten:
    """Rewrite the joint graph before it is cut; `captured` stays as it is.

    Args:
        provider: what the graphs are shaped for; they run anywhere.
        level: "none" gives the graph as captured.
    """
    if level == "none":
        return Rewritten(captured, RewriteLog())
    model = captured.model.clone()
    rules: list[Rule] = [*_before_cut(provider, {}), partial(turn_heads, provider=provider)]
    log, sources = _apply(rules, model.graph, captured.sources)
    return Rewritten(replace(captured, model=model, sources=sources), log)


def rewrite_alone(
    graph: JointGraph, *, provider: TargetProvider, level: OptimizeLevel, laid_out: Mapping[str, int]
) -> JointGraph:
    """Rewrite a graph of one task that shares its weights with graphs rewritten before; `graph` stays as it is.

    Args:
        laid_out: as stack_linears takes it.
    """
    if level == "none":
        return graph
    model = graph.model.clone()
    _, sources = _apply([*_before_cut(provider, laid_out), cancel_shapes], model.graph, graph.sources)
    order_initializers(model.graph)
    return replace(graph, model=model, sources=sources)


def _before_cut(provider: TargetProvider, laid_out: Mapping[str, int]) -> list[Rule]:
    """The rules for a graph whose layers are all apart."""
    return [
        flatten_sequences,
        fold_constants,
        flatten_sequences,  # weights that were computed are constants now
        fold_batch_norms,
        fold_linears,
        partial(stack_linears, before_cut=True, laid_out=laid_out),
        partial(batch_linears, provider=provider, before_cut=True),
        assemble_experts,
        fuse_experts,
    ]


def rewrite_cut(
    graphs: GraphSet, captured: JointGraph, log: RewriteLog, *, provider: TargetProvider, level: OptimizeLevel
) -> tuple[GraphSet, RewriteLog]:
    """Rewrite the graphs after the cut, in place, and block the tails where a graph has those of all tasks.

    Args:
        captured: the joint graph before any rewrite, to say what was gained.
        log: what was done before the cut.

    Returns:
        The graphs, with the sources of what was made, and the log with what was added.
    """
    if level == "none":
        return graphs, log
    for model in graphs.models:
        if model not in graphs.joined:
            _apply([cancel_shapes], model.graph, {})
    batch = partial(batch_linears, provider=provider, before_cut=False)
    rules: list[Rule] = [
        cancel_shapes,
        partial(stack_linears, before_cut=False),
        batch,
        block_gates,
        batch,
        cancel_shapes,
    ]
    added, sources = _apply(rules, graphs.joint.graph, graphs.sources)
    if graphs.joint_tails is not None:  # the same tails, so the log would say everything twice
        _, of_tails = _apply(rules, graphs.joint_tails.graph, sources)
        sources |= of_tails
    for model in graphs.models:
        order_initializers(model.graph)
    graphs = replace(graphs, sources=sources)
    applied = log.applied + added.applied
    done = {(entry.rule, entry.where) for entry in applied}
    left = [entry for entry in log.declined + added.declined if (entry.rule, entry.where) not in done]
    log = RewriteLog(
        applied=applied,
        declined=tuple(dict.fromkeys(left)),
        costs=_costs(captured, graphs),
    )
    return graphs, log


def _costs(captured: JointGraph, graphs: GraphSet) -> tuple[GraphCosts, ...]:
    """What the joint graph and the largest task graph cost, as captured and as rewritten."""
    costs = {name: measure_cost(model.graph) for name, model in graphs.tasks.items()}
    largest = max(costs, key=lambda name: costs[name].multiply_adds)
    before = cut_task(captured, largest)
    return (
        GraphCosts("joint", measure_cost(captured.model.graph), measure_cost(graphs.joint.graph)),
        GraphCosts(f"task-{largest}", measure_cost(before.graph), costs[largest]),
    )


def _apply(
    rules: Sequence[Rule], graph: ir.Graph, sources: Mapping[str, tuple[str, ...]]
) -> tuple[RewriteLog, dict[str, tuple[str, ...]]]:
    applied: list[Applied] = []
    declined: list[Declined] = []
    known = dict(sources)
    for rule in rules:
        for _ in range(_MOST_ROUNDS):
            found = rule(graph)
            applied += found.applied
            for name, made_from in found.sources.items():
                known[name] = _flat(made_from, known)
            if not found.applied:
                break
            known |= _stacked(graph, known)  # a later rule may turn a stack, which is then gone
        declined += found.declined
    return RewriteLog(tuple(applied), tuple(dict.fromkeys(declined))), known


def _stacked(graph: ir.Graph, known: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """The checkpoint's parameters behind the stacks of a graph."""
    return {
        name: _flat([part.name for part in stack.parts], known)
        for name, value in graph.initializers.items()
        if (stack := stack_of(value.const_value)) is not None
    }


def _flat(names: Sequence[str], known: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    """The checkpoint's parameters behind `names`, each once."""
    return tuple(dict.fromkeys(source for name in names for source in known.get(name, (name,))))
