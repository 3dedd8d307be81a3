"""A loop over experts becomes one weighted sum where it is one, and stays what it is where not."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from te_export.models.input_rows import InputRows
from te_export.modules.gates.assemble_terms import assemble_terms
from te_export.modules.gates.find_gates import find_gates
from te_export.modules.trace import Traced
from te_export.modules.trace_rewrites.drop_zeros import drop_zeros
from te_export.modules.traced_module import record_values

FEATURES, EXPERTS, WIDTH, ROWS = 5, 4, 3, 9
aten = torch.ops.aten
TraceModule = Callable[..., Traced]


class Looped(nn.Module):
    """A task for each way of summing."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate = nn.Linear(FEATURES, EXPERTS)
        self.experts = nn.ModuleList(nn.Linear(FEATURES, WIDTH) for _ in range(EXPERTS))
        self.maps = nn.ModuleList(nn.Conv1d(1, 2, 1) for _ in range(EXPERTS))
        self.head, self.map_head = nn.Linear(WIDTH, 1), nn.Linear(2 * FEATURES, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        weights = F.softmax(self.gate(x), -1)
        experts = [torch.relu(expert(x)) for expert in self.experts]
        return {name: self.head(form(weights, experts)) for name, form in FORMS.items()} | {
            "maps": self.map_head(self._maps(weights, x).flatten(1))
        }

    def _maps(self, weights: Tensor, x: Tensor) -> Tensor:
        total = torch.zeros(x.shape[0], 2, FEATURES)
        for k, maps in enumerate(self.maps):
            total = total + weights[:, k, None, None] * maps(x.unsqueeze(1))
        return total


def summed(
    weights: Tensor, experts: list[Tensor], order: list[int], begin: Tensor | float | None = None
) -> Tensor:
    total = torch.zeros_like(experts[0]) if begin is None else begin
    for k in order:
        total = total + experts[k] * weights[:, k : k + 1]
    return total


FORMS: dict[str, Callable[[Tensor, list[Tensor]], Tensor]] = {
    "in_order": lambda w, e: summed(w, e, [0, 1, 2, 3]),
    "shuffled": lambda w, e: summed(w, e, [2, 0, 3, 1]),
    "crossed": lambda w, e: summed(w, [e[1], e[0], e[3], e[2]], [0, 1, 2, 3]),
    "pairs": lambda w, e: (w[:, :1] * e[0] + w[:, 1:2] * e[1]) + (w[:, 2:3] * e[2] + w[:, 3:] * e[3]),
    "doubled": lambda w, e: summed(w, e, [0, 1, 2, 3]) * 2,
    "one_twice": lambda w, e: summed(w, e, [0, 1, 2, 3, 3]),
    "one_left_out": lambda w, e: summed(w, e, [0, 1, 2]),
    "scaled": lambda w, e: torch.add(summed(w, e, [0, 1, 2]), w[:, 3:] * e[3], alpha=2),
    "begun_with_a_number": lambda w, e: torch.as_tensor(summed(w, e, [0, 1, 2, 3], 0)),
    "begun_with_a_shared_expert": lambda w, e: summed(w, e, [0, 1, 2, 3], torch.tanh(e[0])),
    "with_something_else": lambda w, e: e[0] + summed(w, e, [0, 1, 2, 3]),
    "stacked": lambda w, e: torch.stack([w[:, k, None] * e[k] for k in range(EXPERTS)]).sum(0),
}
ASSEMBLED = {
    "in_order",
    "shuffled",
    "crossed",
    "pairs",
    "doubled",
    "with_something_else",
    "begun_with_a_number",
    "one_twice",
    "begun_with_a_shared_expert",
}


class Case:
    """Each form's products and sums before and after, and its answers."""

    def __init__(self, traced: Traced) -> None:
        x = np.random.default_rng(0).standard_normal((ROWS, FEATURES)).astype(np.float32)
        rows = InputRows({"x": x})
        names = (*FORMS, "maps")
        self.before = dict(zip(names, self._answers(traced, rows), strict=True))
        drop_zeros(traced)
        found = find_gates(traced, record_values(traced, rows))
        assemble_terms(traced, (gate for gates in found.values() for gate in gates))
        traced.graph.eliminate_dead_code()
        traced.graph.lint()
        traced.program.graph_module.recompile()
        self.after = dict(zip(names, self._answers(traced, rows), strict=True))
        self.heads = dict(zip(names, traced.outputs(), strict=True))

    @staticmethod
    def _answers(traced: Traced, rows: InputRows) -> list[Tensor]:
        values = record_values(traced, rows)
        return [values[node] for node in traced.outputs()]


@pytest.fixture(scope="module")
def case(trace_module: TraceModule) -> Case:
    return Case(trace_module(Looped(), np.zeros((ROWS, FEATURES), np.float32)))


@pytest.mark.parametrize("form", [*FORMS, "maps"])
def test_the_numbers_are_the_same(form: str, case: Case) -> None:
    torch.testing.assert_close(case.after[form], case.before[form], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("form", [*FORMS, "maps"])
def test_a_plain_sum_of_every_expert_is_one_sum(form: str, case: Case) -> None:
    waiting, operators = [case.heads[form]], []
    while waiting:
        node = waiting.pop()
        operators.append(node.target)
        if node.target is not aten.softmax.int:
            waiting += [source for source in node.all_input_nodes if source.op == "call_function"]

    assert (operators.count(aten.mul.Tensor) < EXPERTS - 1) == (form in ASSEMBLED)
    assert aten.zeros_like.default not in operators
    assert aten.zeros.default not in operators
