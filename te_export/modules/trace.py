"""ONE trace of a module: torch.export, then the same without in-place operators."""

from __future__ import annotations

import io
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Node
from torch.nn.utils.rnn import PackedSequence

from te_export.capture.tidy import BATCH
from te_export.capture.torch_capture import quiet_torch
from te_export.errors import CaptureError
from te_export.models.input_rows import InputRows
from te_export.modules.all_tasks import AllTasks
from te_export.modules.blame import line_of_error, line_of_node

__all__ = ["Traced", "ancestors", "batch_axis", "has_batch_first", "trace"]

_TRACED_ROWS = 13
"""Of the batch axis while tracing: a number that is not likely to be a size of the model, so that it can be told
where the axis came out static."""

_CAST = torch.ops.aten._to_copy.default

_CONSTANT_ADVICE = (
    "Take out of forward what turns the batch size into a Python number (int(x.shape[0]), len(x), .item(), view(8, -1), a "
    "slice by a length); write view(-1, …), x.new_zeros(x.shape[0], …), torch.where"
)
_BRANCH_ADVICE = (
    "Take the branch out of forward: compute both sides and choose with torch.where, or decide by settings that do not "
    "depend on the rows"
)
_PACKED_ADVICE = (
    "Run the layer over the padded sequence, and take the last place of each row by its length: out.gather(1, (lengths - "
    "1).view(-1, 1, 1).expand(-1, 1, out.shape[2])).squeeze(1). Its way back (bidirectional) would read the padding first: "
    "run that as a layer of its own over rows that are turned around by their lengths"
)
_OTHER_ADVICE = (
    "torch.export follows plain tensor operations: keep numpy, files and choices by value out of forward"
)


@dataclass(frozen=True)
class Traced:
    """A traced module.

    Attributes:
        program: functional; its outputs are those of AllTasks, its batch axis symbolic.
    """

    program: ExportedProgram

    @property
    def graph(self) -> torch.fx.Graph:
        graph: torch.fx.Graph = self.program.graph_module.graph
        return graph

    def inputs(self) -> list[Node]:
        """The placeholders of the module's own inputs, in order."""
        names = set(self.program.graph_signature.user_inputs)
        return [node for node in self.graph.nodes if node.op == "placeholder" and node.name in names]

    def parameter_names(self) -> dict[Node, str]:
        """By placeholder of a parameter, buffer or constant, its name."""
        kinds = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)
        targets = {
            spec.arg.name: spec.target
            for spec in self.program.graph_signature.input_specs
            if spec.kind in kinds and spec.target is not None
        }
        return {
            node: targets[node.name]
            for node in self.graph.nodes
            if node.op == "placeholder" and node.name in targets
        }

    def is_constant(self, name: str) -> bool:
        """Whether a tensor is neither parameter nor buffer of the module."""
        return name not in self.program.state_dict

    def tensor(self, name: str) -> Tensor:
        """A parameter, buffer or constant by its name."""
        held = self.program.state_dict.get(name)
        found = self.program.constants[name] if held is None else held
        assert isinstance(found, Tensor)
        return found

    def outputs(self) -> list[Node]:
        (output,) = (node for node in self.graph.nodes if node.op == "output")
        return list(output.args[0])


def trace(module: AllTasks, rows: InputRows) -> Traced:
    """Trace a module once, with a symbolic batch axis.

    Args:
        rows: that it accepts.

    Raises:
        CaptureError: torch cannot trace it, its batch axis comes out static, it changes itself, or its layers compute in
            16 bits; naming the line of the module and the usual mend.
    """
    inputs = rows[np.arange(_TRACED_ROWS) % len(rows)].tensors()
    batch = torch.export.Dim(BATCH)
    try:
        with quiet_torch(), _without_partial_graph(), torch.no_grad():
            program = torch.export.export(
                module, inputs, dynamic_shapes=tuple({0: batch} for _ in inputs), strict=False
            )
            functional = program.run_decompositions({})
    except Exception as error:  # the module's own code runs here, and may raise anything
        raise CaptureError(_told(module, inputs, error)) from error
    traced = Traced(functional)
    _drop_what_computes_nothing(traced)
    _refuse_changes(program, traced)
    _refuse_static_outputs(traced, module)
    _refuse_lower_precision(traced)
    return traced


def ancestors(node: Node) -> set[Node]:
    """Every node that a node depends on."""
    seen: set[Node] = set()
    waiting = list(node.all_input_nodes)
    while waiting:
        current = waiting.pop()
        if current not in seen:
            seen.add(current)
            waiting += current.all_input_nodes
    return seen


def batch_axis(node: Node) -> int | None:
    """Which axis of a traced value is the batch; None where it has none."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return None
    return next((axis for axis, size in enumerate(value.shape) if _is_symbolic(size)), None)


def has_batch_first(node: Node) -> bool:
    """Whether a traced value has the batch, and not a multiple of it such as 6·B rows of tokens, as its first axis."""
    return batch_axis(node) == 0 and str(node.meta["val"].shape[0]).isidentifier()


def _is_symbolic(size: object) -> bool:
    return isinstance(size, torch.SymInt)


@contextmanager
def _without_partial_graph() -> Iterator[None]:
    """torch prints how far it came before it raises: dozens of lines above the one that says what is wrong."""
    held = io.StringIO()
    try:
        with redirect_stderr(held):
            yield
    finally:
        partial = str(getattr(sys.exc_info()[1], "partial_fx_graph", ""))
        printed = held.getvalue()
        sys.stderr.write(printed.replace(f"{partial}\n", "") if partial.strip() else printed)


def _told(module: AllTasks, inputs: tuple[Tensor, ...], error: Exception) -> str:
    message = str(error)
    name = type(module.module).__name__
    if "data-dependent" in message or "GuardOnDataDependent" in type(error).__name__:
        what = "its control flow, or the size of a value, depends on the data"
        return f"{name} cannot be traced: {what}{_at(line_of_error(error))}. {_BRANCH_ADVICE}"
    if "Constraints violated" in message or "specialized" in message:
        where = _where_static(module, inputs) or line_of_error(error)
        return (
            f"the batch axis of {name} comes out static{_at(where)}: the graph would be right only at the traced batch "
            f"size. {_CONSTANT_ADVICE}"
        )
    if "assigned during export" in message:
        found = re.search(r"self\.(\S+?)[ `,]", message)
        which = f"self.{found[1]}" if found else "an attribute"
        return (
            f"{name} changes itself: {which} is assigned in forward{_at(line_of_error(error))}. Return such values "
            "instead, or keep them out of eval mode"
        )
    if _is_of_packed_sequences(error):
        return f"torch cannot trace {name}: it packs sequences{_at(line_of_error(error))}. {_PACKED_ADVICE}"
    first = message.strip().split("\n\n")[0].rstrip(".")
    advice = (
        _CONSTANT_ADVICE if re.search(r"\bs\d+\b|\bs\d+\*|size of tensor|shape", first) else _OTHER_ADVICE
    )
    return f"torch cannot trace {name}: {type(error).__name__}: {first:.600}{_at(line_of_error(error))}. {advice}"


def _is_of_packed_sequences(error: BaseException) -> bool:
    """Whether it left torch's own code for them, or a recurrent layer that was given one."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return any(
        frame.f_code.co_name in ("pack_padded_sequence", "pad_packed_sequence")
        or (
            frame.f_code.co_name == "forward" and isinstance(frame.f_locals.get("orig_input"), PackedSequence)
        )
        for frame in frames
    )


def _at(where: str) -> str:
    return f" ({where})" if where else ""


def _where_static(module: AllTasks, inputs: tuple[Tensor, ...]) -> str:
    """The first line at which the traced number of rows stands as a constant, found by a trace without any symbol."""
    try:
        with quiet_torch(), _without_partial_graph(), torch.no_grad():
            program = torch.export.export(module, inputs, strict=False)
    except Exception:  # noqa: BLE001 - only the line is lost; the error itself is told by the caller
        return ""
    for node in program.graph.nodes:
        if node.op == "call_function" and (_TRACED_ROWS in _integers(node.args) or _is_row_by_row(node)):
            where = line_of_node(node)
            if where:
                return where
    return ""


def _is_row_by_row(node: Node) -> bool:
    """Whether it takes apart, or puts together, as many pieces as there are rows."""
    made = node.meta.get("val")
    lists = [value for value in (made, *node.args) if isinstance(value, list | tuple)]
    return any(len(value) == _TRACED_ROWS for value in lists)


def _integers(value: object) -> Iterator[int]:
    if isinstance(value, list | tuple):
        for part in value:
            yield from _integers(part)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield value


def _drop_what_computes_nothing(traced: Traced) -> None:
    """AllTasks copies its inputs, which a functional program need not; and what torch notes of dtypes and sizes holds for
    float32 rows, and would stop the oracle's float64.
    """
    for node in traced.inputs():
        for user in [user for user in node.users if user.target is torch.ops.aten.clone.default]:
            user.replace_all_uses_with(node)
            traced.graph.erase_node(user)
    for node in list(traced.graph.nodes):
        if node.target is torch.ops.aten.slice.Tensor and _takes_everything(
            node
        ):  # x[:, :, None] begins with two
            node.replace_all_uses_with(node.args[0])
            traced.graph.erase_node(node)
        elif (
            node.target is torch.ops.aten.cat.default
        ):  # a piece that is empty reads what made it, and gives nothing of it
            given: list[Any] = [*node.args]
            parts = [part for part in given[0] if 0 not in part.meta["val"].shape]
            node.args = (parts or given[0], *given[1:])
    for node in reversed(list(traced.graph.nodes)):
        name = getattr(node.target, "__name__", str(node.target))
        if node.op == "call_function" and not node.users and ("assert" in name or "sym_constrain" in name):
            traced.graph.erase_node(node)
    traced.program.graph_module.recompile()


def _takes_everything(node: Node) -> bool:
    """Whether a slice leaves out nothing."""
    given: list[Any] = [*node.args]
    step = given[4] if len(given) > 4 else 1
    sizes = [list(map(str, each.meta["val"].shape)) for each in (node, given[0])]
    return step == 1 and not node.kwargs and sizes[0] == sizes[1]


def _refuse_changes(raw: ExportedProgram, traced: Traced) -> None:
    for program in (raw, traced.program):
        signature = program.graph_signature
        for made, name in signature.buffers_to_mutate.items():
            where = next((line_of_node(node) for node in program.graph.nodes if node.name == made), "")
            raise CaptureError(
                f"the module changes itself: {name.removeprefix('module.')} is written to in forward{_at(where)}. Have "
                "forward do so in training mode alone (if self.training), or return the new value"
            )


def _refuse_static_outputs(traced: Traced, module: AllTasks) -> None:
    for node in traced.outputs():
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or not _is_symbolic(value.shape[0]):
            shape = tuple(value.shape) if isinstance(value, Tensor) else "unknown"
            raise CaptureError(
                f"the batch axis of an output of {type(module.module).__name__} comes out static ({shape})"
                f"{_at(line_of_node(node))}: the graph would be right only at the traced batch size. {_CONSTANT_ADVICE}"
            )


def _refuse_lower_precision(traced: Traced) -> None:
    """Layers under torch.autocast: what they read of the weights is 16 bits wide, and no float32 graph is exact to that."""
    parameters = set(traced.parameter_names())
    for node in traced.graph.nodes:
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or value.dtype not in (torch.float16, torch.bfloat16):
            continue
        read = [source.args[0] if source.target is _CAST else source for source in node.all_input_nodes]
        if node.target is not _CAST and any(source in parameters for source in read):
            raise CaptureError(
                f"forward computes in {value.dtype}{_at(line_of_node(node))}, expected float32: take torch.autocast, "
                ".half() and .bfloat16() out of it, or keep them to training (torch.autocast(..., enabled=self.training)). "
                "--precision fp32,fp16 adds a variant of half precision to the bundle"
            )
