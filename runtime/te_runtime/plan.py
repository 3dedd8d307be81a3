"""Which of a bundle's graphs are opened, and why: the decision alone, before anything is loaded.

Measured on R (784 inputs, 8 experts, 5 tasks, fp32, one thread, onnxruntime 1.31, AMD EPYC), each figure over
one session on the joint graph in the same run; scripts/benchmark_runtime.py measures them again:

    mode           memory   all five tasks, B = 1 / 8 / 64   one task, over its task graph alone
    joint            1.00       1.00 / 1.00 / 1.00               1.4 / 1.3 / 1.2  (computes every task)
    split, switch    1.03       1.04 to 1.13 / 1.07 / 1.02       1.04 to 1.11 / 1.05 / 1.01
    split, apart     1.05       1.09 to 1.20 / 1.06 / 1.03       0.98 / 1.00 / 1.00
    task             3.8        3 to 4 times                     1.00

(ranges: medians of several runs on a busy machine). Switch is the switch graph: trunk and tails in one session, each
tail behind a condition, which takes about 3 µs whether it is met or not. Apart is a session for the trunk and one for
each tail, on CUDA and where there are too many tasks for that (te_export/switch.py).

A session packs its weights for itself, so a second session that holds a weight again takes it again: the joint graph
beside the trunk is twice the memory, and the blocked tails of the joint graph in the switch, behind one condition
for all tasks, with a session for each tail beside it, 1.27 (all five tasks 1.03). Leaving the packing out (mapped
weights, which sessions share) makes B = 1 1.4 to 2 times slower.

Mode pruned is mode task with the pruned graphs that a bundle has. They give other numbers than the other modes do:
the manifest says what each task loses.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, cast, get_args

from te_runtime.choices import parse_choice
from te_runtime.errors import InputError
from te_runtime.manifest import GraphSpec, TaskGraphs, Variant
from te_runtime.providers import Provider

__all__ = ["Mode", "Plan", "choose_plan", "own_graph", "runs_switch"]

Mode = Literal["joint", "split", "task", "pruned"]


class Plan(NamedTuple):
    """What a loaded model runs. Print it to read it.

    Attributes:
        mode: `joint`: one graph that computes every task whatever is asked for; `split`: the trunk once, then
            the tails of the tasks asked for, all in one graph or each in its own; `task`: a graph of its own
            per task, each with its own weights; `pruned`: the same without the experts that a task hardly uses,
            where the bundle has such a graph.
        graphs: paths of the opened graphs inside the bundle.
        reason: why this mode.
    """

    mode: Mode
    graphs: tuple[str, ...]
    reason: str

    def __str__(self) -> str:
        return "\n".join((f"mode {self.mode}: {self.reason}", *(f"  {path}" for path in self.graphs)))


def choose_plan(variant: Variant, mode: str | None, provider: Provider = "cpu") -> Plan:
    """Decide which graphs of `variant` to open.

    Args:
        variant: one precision of a bundle.
        mode: `joint`, `split`, `task` or `pruned`; None decides by what was measured, and never for `pruned`.
        provider: where they will run.

    Raises:
        InputError: there is no such mode, or the variant has no pruned graph.
    """
    if mode is None:
        return _automatic(variant, provider)
    known = cast(Mode, parse_choice("mode", mode, get_args(Mode)))
    if known == "pruned" and all(task.pruned is None for task in variant.tasks):
        raise InputError(
            f"mode: variant {variant.precision} has no pruned graph: export with --prune-experts POINTS and "
            '--calibration-data F.npz, or take mode "task"'
        )
    return Plan(known, _graphs(variant, known, provider), "asked for")


def own_graph(task: TaskGraphs, mode: Mode) -> GraphSpec:
    """The graph that answers a task by itself in mode `task` or `pruned`."""
    return task.pruned.graph if mode == "pruned" and task.pruned is not None else task.graph


def _automatic(variant: Variant, provider: Provider) -> Plan:
    if len(variant.tasks) == 1:
        reason = "the only task needs one graph, in one session"
        return Plan("joint", _graphs(variant, "joint", provider), reason)
    reason = "holds the weights once and runs only the tails asked for"
    if runs_switch(variant, provider):
        reason += ", all of them in one session"
    else:
        reason += '; mode="joint" is faster where every task is asked for in small batches'
    return Plan("split", _graphs(variant, "split", provider), reason)


def runs_switch(variant: Variant, provider: Provider) -> bool:
    """Whether mode `split` is the switch graph: on the CPU, where the variant has one."""
    return variant.switch is not None and provider == "cpu"


def _graphs(variant: Variant, mode: Mode, provider: Provider) -> tuple[str, ...]:
    split = (variant.trunk, *(task.tail for task in variant.tasks))
    if variant.switch is not None and runs_switch(variant, provider):
        split = (variant.switch,)
    opened: dict[Mode, tuple[GraphSpec, ...]] = {
        "joint": (variant.joint,),
        "split": split,
        "task": tuple(own_graph(task, "task") for task in variant.tasks),
        "pruned": tuple(own_graph(task, "pruned") for task in variant.tasks),
    }
    return tuple(graph.path for graph in opened[mode])
