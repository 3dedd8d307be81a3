"""Which of a bundle's graphs are opened, and why: the decision alone, before anything is loaded.

Measured on R (784 inputs, 8 experts, 5 tasks, fp32, one thread, onnxruntime 1.31, AMD EPYC), each figure over
one session on the joint graph in the same run; scripts/benchmark_runtime.py measures them again:

    mode    memory   all five tasks, B = 1 / 8 / 64   one task, B = 1 / 8 / 64, over its task graph alone
    joint     1.00       1.00 / 1.00 / 1.00               1.5 / 1.3 / 1.2  (computes every task)
    split     1.05       1.20 / 1.08 / 1.05               0.99 / 0.96 / 1.01
    task      3.8        3 to 4 times                     1.00

A session packs its weights for itself, so opening the joint graph beside the trunk takes twice the memory,
and leaving the packing out (mapped weights, which sessions share) makes B = 1 1.4 to 2 times slower. One
session with an ONNX `If` around each tail took 1.13 times a task graph for one task and 1.16 for five. So
with several tasks split is what fits every caller within the memory of one joint session, and callers that
always ask for every task in small batches set mode="joint".
"""

from __future__ import annotations

from typing import Literal, NamedTuple, cast, get_args

from te_runtime.choices import parse_choice
from te_runtime.manifest import GraphSpec, Variant

__all__ = ["Mode", "Plan", "choose_plan"]

Mode = Literal["joint", "split", "task"]


class Plan(NamedTuple):
    """What a loaded model runs. Print it to read it.

    Attributes:
        mode: `joint`: one graph that computes every task whatever is asked for; `split`: the trunk once, then
            the tails of the tasks asked for; `task`: a graph of its own per task, each with its own weights.
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
        mode: `joint`, `split` or `task`; None decides by what was measured.

    Raises:
        InputError: there is no such mode.
    """
    if mode is None:
        return _automatic(variant)
    known = cast(Mode, parse_choice("mode", mode, get_args(Mode)))
    return Plan(known, _graphs(variant, known), "asked for")


def _automatic(variant: Variant) -> Plan:
    if len(variant.tasks) == 1:
        reason = "the only task needs one graph, in one session"
        return Plan("joint", _graphs(variant, "joint"), reason)
    reason = (
        "holds the weights once and runs only the tails asked for; "
        'mode="joint" is faster where every task is asked for in small batches'
    )
    return Plan("split", _graphs(variant, "split"), reason)


def _graphs(variant: Variant, mode: Mode) -> tuple[str, ...]:
    opened: dict[Mode, tuple[GraphSpec, ...]] = {
        "joint": (variant.joint,),
        "split": (variant.trunk, *(task.tail for task in variant.tasks)),
        "task": tuple(task.graph for task in variant.tasks),
    }
    return tuple(graph.path for graph in opened[mode])
