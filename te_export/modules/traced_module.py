"""Running a traced program in torch: as a module, and with every value in between kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Interpreter, Node

from te_export.models.input_rows import InputRows
from te_export.modules.trace import Traced
from te_export.verify.oracle import in_float64

__all__ = ["TracedModule", "record_values"]


class TracedModule(nn.Module):
    """forward: one tensor per input → the program's outputs. It reads the tensors of the module that was traced."""

    def __init__(self, traced: Traced) -> None:
        super().__init__()
        self._program = traced.program.graph_module
        self._inputs = {node: index for index, node in enumerate(traced.inputs())}
        self._held = {node: traced.tensor(name).detach() for node, name in traced.parameter_names().items()}
        self._placeholders = [node for node in traced.graph.nodes if node.op == "placeholder"]

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(Interpreter(self._program).run(*self.arguments(inputs)))

    def arguments(self, inputs: tuple[Tensor, ...]) -> list[Tensor]:
        """What every placeholder of the graph stands for, in order."""
        return [
            inputs[self._inputs[node]] if node in self._inputs else self._held[node]
            for node in self._placeholders
        ]


class _Recorder(Interpreter):
    def __init__(self, traced: Traced) -> None:
        super().__init__(traced.program.graph_module, garbage_collect_values=False)
        self.values: dict[Node, Any] = {}

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        self.values[n] = value
        return value


@torch.no_grad()
def record_values(traced: Traced, rows: InputRows) -> Mapping[Node, Any]:
    """Every value of the program on some rows, in float64."""
    recorder, module = _Recorder(traced), TracedModule(traced)
    with in_float64(rows) as tensors:
        recorder.run(*module.arguments(tensors))
    return recorder.values
