"""From a module and example inputs to an ExportableModel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.export.graph_signature import OutputKind, OutputSpec, TensorArgument
from torch.fx import Node
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from te_export.capture.joint_graph import prediction_name, routing_weights_name
from te_export.models.exportable import ExportableModel, ModelInput, TaskOutput
from te_export.models.input_rows import InputRows, join_rows
from te_export.models.task_names import select_tasks
from te_export.modules.all_tasks import PARAMETER_PREFIX, AllTasks, evaluating
from te_export.modules.check_behaviour import MIDDLE, check_rows_apart, check_stays_as_it_is
from te_export.modules.example_inputs import Example, ExampleInputs, input_dtype, read_example_inputs
from te_export.modules.find_gates import Gate, find_gates, last_gate
from te_export.modules.forward_form import ForwardForm, find_forward_form, shown_form
from te_export.modules.narrow_columns import narrow_columns
from te_export.modules.same_nodes import merge_same_nodes
from te_export.modules.trace import Traced, trace
from te_export.modules.traced_module import TracedModule, record_values
from te_export.verify.probe_rows import draw_rows

__all__ = ["FAMILY", "make_exportable"]

FAMILY = "module"
_aten = torch.ops.aten
_SAMPLE = 12
_CASTS = frozenset({_aten._to_copy.default, _aten.unsqueeze.default, _aten.view.default, _aten.squeeze.dim,
                    _aten.reshape.default, _aten.select.int, _aten.slice.Tensor})  # fmt: skip


@dataclass(frozen=True)
class _Task:
    name: str
    prediction: Node
    gate: Gate | None


def make_exportable(
    module: nn.Module,
    example: Example,
    *,
    task_names: Sequence[str] | None = None,
    tasks: Sequence[str] | None = None,
    family: str = FAMILY,
    config: Mapping[str, bool | int | float | str | tuple[int, ...]] | None = None,
    notes: Sequence[str] = (),
) -> ExportableModel:
    """Trace a module and find its tasks and gates.

    Args:
        module: on the CPU in float32; it stays as it is.
        example: inputs that it accepts.
        task_names: a name for every task, where its own are none or others are wanted.
        tasks: the tasks to export, or None for all.
        family, config: what the manifest is to say of it.
        notes: what is known of it before.

    Raises:
        UsageError: inputs, task names and what forward takes and returns do not go together.
        CaptureError: the module cannot be traced, or does what no graph can.
    """
    inputs = read_example_inputs(example, module)
    with evaluating(module) as changed:
        form = find_forward_form(module, inputs, task_names)
        chosen = select_tasks(form.tasks, tasks)
        form = replace(
            form, tasks=tuple(form.tasks[i] for i in chosen), keys=tuple(form.keys[i] for i in chosen)
        )
        every = AllTasks(module, inputs, form)
        traced = trace(every, inputs.rows)  # first, since it can name lines
        check_stays_as_it_is(every, inputs.rows)
    merge_same_nodes(traced.graph)
    narrowed = narrow_columns(traced)
    specs = _specs(inputs, traced)
    sample = _sample(specs, inputs.rows, traced)
    check_rows_apart(traced, sample)
    found = _with_gates(traced, form, sample)
    _give(traced, found)
    told = (*notes, *inputs.notes, *changed, *form.notes, *_gate_notes(found), *_constant_notes(traced))
    made = _Made(every, traced, found, specs, narrowed.sources)
    return _assemble(
        made,
        family=family,
        config={**(_config(module, form) if family == FAMILY else {}), **(config or {})},
        notes=told,
    )


def _config(module: nn.Module, form: ForwardForm) -> dict[str, bool | int | float | str | tuple[int, ...]]:
    return {"module": type(module).__name__, "forward": shown_form(form)}


def _specs(example: ExampleInputs, traced: Traced) -> tuple[ModelInput, ...]:
    return tuple(
        ModelInput(
            name=name,
            dtype=input_dtype(array),
            shape=array.shape[1:],
            examples=array,
            below=_embedding_rows(node) if array.dtype.kind == "i" else None,
        )
        for (name, array), node in zip(example.rows.arrays.items(), traced.inputs(), strict=True)
    )


def _embedding_rows(node: Node) -> int | None:
    """The fewest rows of the embeddings that read these indices, where nothing else is known of them."""
    rows: list[int] = []
    for user in node.users:
        if user.target is _aten.embedding.default and user.args[1] is node:
            weight = user.args[0]
            value = weight.meta["val"] if isinstance(weight, Node) else None
            if isinstance(value, Tensor):
                rows.append(int(value.shape[0]))
        elif user.target in _CASTS:
            inner = _embedding_rows(user)
            rows += [] if inner is None else [inner]
    return min(rows, default=None)


def _sample(specs: Sequence[ModelInput], examples: InputRows, traced: Traced) -> InputRows:
    """Two halves of different rows but for one in the middle; examples where the module has no finite answer to random
    rows.
    """
    rng = np.random.default_rng(0)
    drawn = draw_rows(specs, rng, _SAMPLE)
    known = examples[np.arange(_SAMPLE) % len(examples)]
    with torch.no_grad():
        finite = [torch.isfinite(out).all() for out in TracedModule(traced)(*drawn.tensors())]
    rows = drawn if all(finite) else known
    half = _SAMPLE // 2
    same = half + MIDDLE
    return join_rows([rows[:same], rows[[MIDDLE]], rows[same + 1 :]])


def _with_gates(traced: Traced, form: ForwardForm, sample: InputRows) -> list[_Task]:
    gates = find_gates(traced, record_values(traced, sample))
    return [
        _Task(name, output, last_gate(gates[output]))
        for name, output in zip(form.tasks, traced.outputs(), strict=True)
    ]


def _give(traced: Traced, tasks: Sequence[_Task]) -> None:
    """Have the program give every prediction and the routing weights of every gate, each by a node of its own."""
    graph = traced.graph
    (end,) = (node for node in graph.nodes if node.op == "output")
    given: list[Node] = []
    with graph.inserting_before(end):
        for task in tasks:
            given.append(_own(graph, task.prediction, given))
            if task.gate is not None:
                given.append(_own(graph, _as_rows(graph, task.gate), given))
    end.args = (tuple(given),)
    program = traced.program
    program._graph_signature = replace(
        program.graph_signature,
        output_specs=[OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(node.name), None) for node in given],
    )
    signature = program.module_call_graph[0].signature
    assert signature is not None  # the entry of the whole module has one
    signature.outputs = [TensorArgument(node.name) for node in given]
    signature.out_spec = pytree.tree_structure(tuple(given))
    graph.eliminate_dead_code()
    graph.lint()
    program.graph_module.recompile()


def _as_rows(graph: torch.fx.Graph, gate: Gate) -> Node:
    """The routing weights as (B, K)."""
    value = gate.softmax.meta["val"]
    if value.ndim == 2:
        return gate.softmax
    rows = graph.call_function(_aten.view.default, (gate.softmax, [-1, gate.num_experts]))
    rows.meta["val"] = value.reshape(-1, gate.num_experts)
    return rows


def _own(graph: torch.fx.Graph, node: Node, given: Sequence[Node]) -> Node:
    if node not in given and node.op != "placeholder":
        return node
    copy = graph.call_function(_aten.clone.default, (node,))
    copy.meta["val"] = node.meta["val"]
    return copy


def _gate_notes(tasks: Sequence[_Task]) -> list[str]:
    without = [task.name for task in tasks if task.gate is None]
    if not without:
        return []
    if len(without) == len(tasks):
        return [
            "no gate was found: no task has a softmax over experts that feeds their weighted sum, so there are no "
            "routing weights"
        ]
    return [f"no gate was found for {', '.join(without)}, and so no routing weights"]


def _constant_notes(traced: Traced) -> list[str]:
    constants = [
        name
        for name in traced.program.constants
        if isinstance(traced.program.constants[name], Tensor)
        and traced.program.constants[name].is_floating_point()
        and traced.program.constants[name].numel() > 1
    ]
    if not constants:
        return []
    total = sum(traced.program.constants[name].numel() for name in constants)
    return [
        f"{len(constants)} tensors ({total:,} numbers) are neither parameters nor buffers of the module: they were taken as "
        "they are, and no checkpoint sets them (a plain list or dict of layers hides those; use ModuleList, ModuleDict)"
    ]


@dataclass(frozen=True)
class _Made:
    """A traced module with everything that was found in it.

    Attributes:
        sources: by the full name of a parameter that is some rows of another, that other.
    """

    every: AllTasks
    traced: Traced
    tasks: Sequence[_Task]
    specs: tuple[ModelInput, ...]
    sources: Mapping[str, str]


def _assemble(
    made: _Made,
    *,
    family: str,
    config: Mapping[str, bool | int | float | str | tuple[int, ...]],
    notes: tuple[str, ...],
) -> ExportableModel:
    traced, tasks = made.traced, made.tasks
    needed = _needed(made)
    predictions = [needed[prediction_name(task.name)] for task in tasks]
    trunk = frozenset.intersection(*predictions)
    reached = frozenset[str]().union(*predictions)
    sizes = {
        _short(name): traced.tensor(name).numel()
        for name in traced.parameter_names().values()
        if not traced.is_constant(name)
    }
    module = TracedModule(traced)
    idle = [spec.name for spec, node in zip(made.specs, traced.inputs(), strict=True) if not node.users]
    if idle:
        notes = (*notes, f"inputs that no task reads are left out of the bundle: {', '.join(idle)}")
    return ExportableModel(
        family=family,
        config=dict(config),
        module=module,
        inputs=made.specs,
        tasks=tuple(
            TaskOutput(
                name=task.name,
                output_shape=tuple(int(size) for size in task.prediction.meta["val"].shape[1:]),
                num_experts=None if task.gate is None else task.gate.num_experts,
                tail_parameters=own - trunk,
            )
            for task, own in zip(tasks, predictions, strict=True)
        ),
        expert_features=None,
        trunk_parameters=trunk,
        unused_parameters=_unused(made, reached),
        notes=notes,
        parameter_prefix=PARAMETER_PREFIX,
        parameter_sizes=sizes,
        program=traced.program,
        multiply_adds=_multiply_adds(module, made.specs, sum(sizes[name] for name in reached)),
        needed=needed,
        sources={_short(new): (_short(old),) for new, old in made.sources.items()},
        eager=made.every,
    )


def _short(name: str) -> str:
    return name.removeprefix(PARAMETER_PREFIX)


def _needed(made: _Made) -> dict[str, frozenset[str]]:
    """By output name, the parameters of floats that it depends on."""
    traced = made.traced
    names = {
        node: _short(name)
        for node, name in traced.parameter_names().items()
        if traced.tensor(name).is_floating_point() and not traced.is_constant(name)
    }
    outputs: list[str] = []
    for task in made.tasks:
        outputs.append(prediction_name(task.name))
        if task.gate is not None:
            outputs.append(routing_weights_name(task.name))
    return {
        name: frozenset(names[above] for above in _above(node) if above in names)
        for name, node in zip(outputs, traced.outputs(), strict=True)
    }


def _unused(made: _Made, reached: frozenset[str]) -> tuple[str, ...]:
    """Parameters and buffers of floats that no prediction depends on."""
    origins = {_short(made.sources.get(f"{PARAMETER_PREFIX}{name}", name)) for name in reached}
    module = made.every.module
    tensors = (*module.named_parameters(), *module.named_buffers())
    return tuple(name for name, tensor in tensors if tensor.is_floating_point() and name not in origins)


def _above(node: Node) -> set[Node]:
    seen: set[Node] = set()
    waiting = [node]
    while waiting:
        current = waiting.pop()
        if current not in seen:
            seen.add(current)
            waiting += current.all_input_nodes
    return seen


def _multiply_adds(module: TracedModule, specs: Sequence[ModelInput], parameters: int) -> int:
    """Of one row, where they are clearly more than one for each parameter; else 0."""
    row = InputRows({spec.name: np.asarray(spec.examples)[:1] for spec in specs})
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        module(*row.tensors())
    found = counter.get_total_flops() // 2
    return found if found > 1.1 * parameters else 0
