"""Which of a bundle's graphs are opened, and why: the decision alone, before anything is loaded.

Measured on R (784 inputs, 8 experts, 5 tasks, fp32, one thread, onnxruntime 1.31, AMD EPYC), each figure over
one session on the joint graph in the same run; scripts/benchmark_runtime.py measures them again:

    mode    memory after all tasks   all five tasks, B = 1 / 8 / 64   one task, B = 1 / 8 / 64, over its task graph
    joint           1.00                   1.00 / 1.00 / 1.00               1.4 / 1.4 / 1.2  (computes every task)
    split           1.01                1.04 to 1.07 / 1.02 / 1.02          1.03 / 1.03 / 1.00
    task        0.92 to 1.05              1.13 to 1.24 / 1.1 / 1.1          1.00; from the second task on as split

A session packs its weights for itself. So the joint graph beside the trunk would take twice the memory, and split has the
joint tails instead: the tails of all tasks as one graph, in the joint graph's own blocks. Five tails apart take 1.13 to
1.24 times the joint graph at B = 1; a hundred of them 1.5 times, where the joint tails take no longer than it.

Gates and heads are a fifth of R's weights, with 20 tasks half, so that a tail for each and the joint tails beside them
would take 1.25 and 1.65 times the memory. Hence a graph that only some calls need is loaded by the first that does: who
asks for all tasks has one copy, who asks for some of them less, and only who does both 1.24.

The joint tails run where nine tenths of the tasks or more are asked for. 18 of 20 tails take 1.03 / 1.05 / 1.03 times the
joint graph at B = 1 / 8 / 64, 15 of 20 take 0.89 / 0.96 / 0.91; of R's five, four take no longer than the joint tails.

Mode task is for a process that asks for one task at a time. The only one asked for runs its own graph: 0.85 of the
memory, nothing handed from graph to graph. From the second task on its graph is let go of, and the trunk and a tail for
each run instead, never the joint tails: so memory holds every weight once, whatever is asked for.
A task graph for each would take 3.65 times the memory for R's five; trunk and tails one by one and then together take
1.05, with 20 tasks 1.13, with 100 tasks 1.22, which are sessions more than weights. Mapping the weights of task graphs
without packing them, which sessions share, was measured: 1.12 of the memory for five tasks, but one task then takes 1.3
to 2.9 times as long in float32 and 3 to 33 times in int8.

One session with an ONNX `If` around each tail was built and taken out again: all five tasks gained nothing that
noise did not hide, one task took 1.04 to 1.12 times its task graph.

Mode pruned has a graph per task, the pruned one where the bundle has it, each with weights of its own. They give other
numbers than the other modes do: the manifest says what each task loses.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, cast, get_args

from te_runtime.choices import parse_choice
from te_runtime.errors import InputError
from te_runtime.manifest import GraphSpec, TaskGraphs, Variant

__all__ = ["Mode", "Plan", "choose_plan", "own_graph", "takes_joint_tails"]

Mode = Literal["joint", "split", "task", "pruned"]


class Plan(NamedTuple):
    """What a loaded model runs. Print it to read it.

    Attributes:
        mode: `joint`: one graph that computes every task whatever is asked for; `split`: the trunk once, then
            the tails of the tasks asked for, or the joint tails for all of them; `task`: a task's own graph as long as
            no other task is asked for, then the trunk and tails; `pruned`: a graph of its own per task, each with its
            own weights, without the experts that the task hardly uses where the bundle has such a graph.
        graphs: paths of the graphs inside the bundle that may run. The trunk and the joint graph are loaded with the
            model, the others when a call first needs them.
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


def takes_joint_tails(asked: int, *, of: int) -> bool:
    """Whether that many of the tasks are answered faster by the joint tails than by a tail for each."""
    return asked * 10 >= of * 9


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
        "runs only the tails asked for, and those of all tasks as one graph; "
        "each graph is loaded when it is first needed"
    )
    return Plan("split", _graphs(variant, "split"), reason)


def _graphs(variant: Variant, mode: Mode) -> tuple[str, ...]:
    shared = tuple(graph for graph in (variant.trunk, variant.joint_tails) if graph is not None)
    own = tuple(task.graph for task in variant.tasks)
    together = variant.trunk is not None and len(own) > 1
    opened: dict[Mode, tuple[GraphSpec, ...]] = {
        "joint": (variant.joint,),
        "split": (*shared, *(task.tail for task in variant.tasks)),
        "task": (*own, *shared[:1], *(task.tail for task in variant.tasks)) if together else own,
        "pruned": tuple(own_graph(task, "pruned") for task in variant.tasks),
    }
    return tuple(graph.path for graph in opened[mode])
