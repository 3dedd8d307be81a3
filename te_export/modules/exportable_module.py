"""From a module and example inputs to an ExportableModel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from te_export.capture.joint_graph import prediction_name, routing_weights_name
from te_export.models.exportable import ExportableModel, ModelInput, TaskOutput
from te_export.models.input_rows import InputRows
from te_export.modules.all_tasks import PARAMETER_PREFIX, AllTasks, evaluating
from te_export.modules.check_behaviour import check_nothing_is_drawn, check_rows_apart, check_stays_as_it_is
from te_export.modules.example_inputs import Example, read_example_inputs
from te_export.modules.forward_form import ForwardForm, find_forward_form, shown_form
from te_export.modules.gates.assemble_terms import assemble_terms
from te_export.modules.gates.find_gates import find_gates, last_gate
from te_export.modules.module_inputs import module_inputs, sample_rows
from te_export.modules.program_outputs import TaskNodes, give_outputs
from te_export.modules.trace import Traced, ancestors, trace
from te_export.modules.trace_rewrites.chosen_columns import join_chosen_columns
from te_export.modules.trace_rewrites.drop_zeros import drop_zeros
from te_export.modules.trace_rewrites.exact_sigmoids import write_out_sigmoids
from te_export.modules.trace_rewrites.integers import keep_integers
from te_export.modules.trace_rewrites.lower_embedding_bags import lower_embedding_bags
from te_export.modules.trace_rewrites.narrow_columns import Narrowed, narrow_columns
from te_export.modules.trace_rewrites.same_nodes import merge_same_nodes
from te_export.modules.traced_module import TracedModule, record_values

__all__ = ["make_exportable"]


def make_exportable(
    module: nn.Module,
    example: Example,
    *,
    task_names: Sequence[str] | None = None,
    tasks: Sequence[str] | None = None,
    family: str | None = None,
    config: Mapping[str, bool | int | float | str | tuple[int, ...]] | None = None,
    notes: Sequence[str] = (),
) -> ExportableModel:
    """Trace a module and find its tasks and gates.

    Args:
        module: on the CPU in float32; it stays as it is.
        example: inputs that it accepts.
        task_names: a name for every task, where its own are none or others are wanted.
        tasks: the tasks to export, or None for all.
        family: of a checkpoint that has one; else the module's class stands for it.
        config: what the manifest is to say of it beside the form of its forward.
        notes: what is known of it before.

    Raises:
        UsageError: inputs, task names and what forward takes and returns do not go together.
        CaptureError: the module cannot be traced, or does what no graph can.
    """
    inputs = read_example_inputs(example, module)
    with evaluating(module) as changed:
        form = find_forward_form(module, inputs, task_names).of_tasks(tasks)
        every = AllTasks(module, inputs, form)
        traced = trace(every, inputs.rows)  # first, since it can name lines
        check_nothing_is_drawn(traced, inputs.rows)
        check_stays_as_it_is(every, inputs.rows)
    lower_embedding_bags(traced)
    keep_integers(traced)
    write_out_sigmoids(traced)
    drop_zeros(traced)
    merge_same_nodes(traced.graph)
    join_chosen_columns(traced)
    narrowed = narrow_columns(traced)
    specs = module_inputs(inputs, traced)
    sample = sample_rows(specs, inputs.rows, traced)
    check_rows_apart(traced, sample)
    found = _with_gates(traced, form, sample)
    give_outputs(traced, found)
    told = (
        *notes,
        *inputs.notes,
        *changed,
        *form.notes,
        *_gate_notes(found),
        *_constant_notes(traced, narrowed),
    )
    made = _Made(every, traced, found, specs, narrowed.sources)
    return _assemble(
        made,
        family=family or _class_name(module),
        config={"forward": shown_form(form), **(config or {})} if family is None else dict(config or {}),
        notes=told,
    )


def _class_name(module: nn.Module) -> str:
    return "program of torch.export" if isinstance(module, torch.fx.GraphModule) else type(module).__name__


def _with_gates(traced: Traced, form: ForwardForm, sample: InputRows) -> list[TaskNodes]:
    found = find_gates(traced, record_values(traced, sample))
    tasks = []
    for name, output in zip(form.tasks, traced.outputs(), strict=True):
        gate = last_gate(found[output])
        tasks.append(TaskNodes(name, output, gate, has_several=gate is None and bool(found[output])))
    assemble_terms(traced, (gate for gates in found.values() for gate in gates))
    return tasks


def _gate_notes(tasks: Sequence[TaskNodes]) -> list[str]:
    several = [task.name for task in tasks if task.has_several]
    without = [task.name for task in tasks if task.gate is None and not task.has_several]
    notes = []
    if several:
        notes.append(
            f"several gates side by side for {', '.join(several)}: none stands for the task, none is given"
        )
    if len(without) == len(tasks):
        notes.append(
            "no gate was found: no task has weights of experts (a softmax, a sigmoid, a choice of the largest) that feed "
            "the experts' weighted sum in a form that is recognised, so there are no routing weights. docs/modules.md lists "
            "the forms"
        )
    elif without:
        notes.append(f"no gate was found for {', '.join(without)}, and so no routing weights")
    return notes


def _constant_notes(traced: Traced, narrowed: Narrowed) -> list[str]:
    constants = [
        tensor
        for name, tensor in traced.program.constants.items()
        if isinstance(tensor, Tensor)
        and tensor.is_floating_point()
        and tensor.numel() > 1
        and name not in narrowed.sources
    ]
    if not constants:
        return []
    total = sum(tensor.numel() for tensor in constants)
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
    tasks: Sequence[TaskNodes]
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
        name: frozenset(names[above] for above in ancestors(node) if above in names)
        for name, node in zip(outputs, traced.outputs(), strict=True)
    }


def _unused(made: _Made, reached: frozenset[str]) -> tuple[str, ...]:
    """Parameters and buffers of floats that no prediction depends on."""
    origins = {_short(made.sources.get(f"{PARAMETER_PREFIX}{name}", name)) for name in reached}
    module = made.every.module
    tensors = (*module.named_parameters(), *module.named_buffers())
    return tuple(name for name, tensor in tensors if tensor.is_floating_point() and name not in origins)


def _multiply_adds(module: TracedModule, specs: Sequence[ModelInput], parameters: int) -> int:
    """Of one row, where they are clearly more than one for each parameter; else 0."""
    row = InputRows({spec.name: np.asarray(spec.examples)[:1] for spec in specs})
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        module(*row.tensors())
    found = counter.get_total_flops() // 2
    return found if found > 1.1 * parameters else 0
