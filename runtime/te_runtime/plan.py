"""Which of a bundle's graphs are opened, and why: the decision alone, before anything is loaded.

Measured on R (784 inputs, 8 experts, 5 tasks, fp32, one thread, onnxruntime 1.31, AMD EPYC), each figure over
one session on the joint graph in the same run; scripts/benchmark_runtime.py measures them again:

    mode    memory   all five tasks, B = 1 / 8 / 64   one task, B = 1 / 8 / 64, over its task graph alone
    joint     1.00       1.00 / 1.00 / 1.00               1.5 / 1.3 / 1.2  (computes every task)
    split     1.05       1.20 / 1.08 / 1.05               0.99 / 0.96 / 1.01
    task      3.8        3 to 4 times                     1.00

A session packs its weights for itself, so opening the joint graph beside the trunk takes twice the memory,
and leaving the packing out (mapped weights, which sessions share) makes B = 1 1.4 to 2 times slower. One
session with an ONNX `If` around each tail was built and taken out again: all five tasks gained nothing that
noise did not hide, one task took 1.04 to 1.12 times its task graph. The joint graph's tails behind one `If`,
with a session for each tail beside it, gave all five tasks 1.02 and took 1.27 to 1.40 times the memory. So with
several tasks split is what fits every caller within the memory of one joint session, and callers that always
ask for every task in small batches set mode="joint".

Mode pruned is mode task with the pruned graphs that a bundle has. They give other numbers than the other modes do:
the manifest says what each task loses.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, cast, get_args

from te_runtime.choices import parse_choice
from te_runtime.errors import InputError
from te_runtime.manifest import GraphSpec, TaskGraphs, Variant

__all__ = ["Mode", "Plan", "choose_plan", "own_graph"]

Mode = Literal["joint", "split", "task", "pruned"]


class Plan(NamedTuple):
    """What a loaded model runs. Print it to read it.

    Attributes:
        mode: `joint`: one graph that computes every task whatever is asked for; `split`: the trunk once, then
            the tails of the tasks asked for; `task`: a graph of its own per task, each with its own weights;
            `pruned`: the same without the experts that a task hardly uses, where the bundle has such a graph.
        graphs: paths of the opened graphs inside the bundle.
        reason: why this mode.
    """

    mode: Mode
    graphs: tuple[str, ...]
    reason: str

    def __str__(self) -> str:
        return "\n".join((f"mode {self.mode}: {self.reason}", *(f"  {path}" for path in self.graphs)))


def choose_plan(variant: Variant, mode: str | None) -> Plan:
    """Decide which graphs of `variant` to open.

    Args:
        variant: one precision of a bundle.
        mode: `joint`, `split`, `task` or `pruned`; None decides by what was measured, and never for `pruned`.

    Raises:
        InputError: there is no such mode, or the variant has no pruned graph.
    """
    if mode is None:
        return _automatic(variant)
    known = cast(Mode, parse_choice("mode", mode, get_args(Mode)))
    if known == "pruned" and all(task.pruned is None for task in variant.tasks):
        raise InputError(
            f"mode: variant {variant.precision} has no pruned graph: export with --prune-experts POINTS and "
            '--calibration-data F.npz, or take mode "task"'
        )
    return Plan(known, _graphs(variant, known), "asked for")


def own_graph(task: TaskGraphs, mode: Mode) -> GraphSpec:
    """The graph that answers a task by itself in mode `task` or `pruned`."""
    return task.pruned.graph if mode == "pruned" and task.pruned is not None else task.graph


def _automatic(variant: Variant) -> Plan:
    if len(variant.tasks) == 1:
        reason = "the only task needs one graph, in one session"
        return Plan("joint", _graphs(variant, "joint"), reason)
    if variant.trunk is None:
        reason = "the tasks share nothing, so each has a graph of its own and only those asked for run"
        return Plan("split", _graphs(variant, "split"), reason)
    reason = (
        "holds the weights once and runs only the tails asked for; "
        'mode="joint" is faster where every task is asked for in small batches'
    )
    return Plan("split", _graphs(variant, "split"), reason)


def _graphs(variant: Variant, mode: Mode) -> tuple[str, ...]:
    trunk = () if variant.trunk is None else (variant.trunk,)
    opened: dict[Mode, tuple[GraphSpec, ...]] = {
        "joint": (variant.joint,),
        "split": (*trunk, *(task.tail for task in variant.tasks)),
        "task": tuple(own_graph(task, "task") for task in variant.tasks),
        "pruned": tuple(own_graph(task, "pruned") for task in variant.tasks),
    }
    return tuple(graph.path for graph in opened[mode])
