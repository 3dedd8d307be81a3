"""Every way of writing a weighted sum of experts is a gate; weighted sums of anything else are none."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import te_export
import te_runtime
from te_export.models.input_rows import InputRows
from te_export.modules.gates.find_gates import Gate, find_gates, last_gate
from te_export.modules.trace import Traced
from te_export.modules.trace_rewrites.same_nodes import merge_same_nodes
from te_export.modules.traced_module import record_values

FEATURES, EXPERTS, WIDTH = 6, 3, 5
ROWS = 7
Mix = Callable[[Tensor, list[Tensor]], Tensor]
TraceModule = Callable[..., Traced]


def found_gates(trace_module: TraceModule, module: nn.Module, *shape: int) -> list[tuple[Gate, ...]]:
    """The gates of every output, in order; one tensor is one task."""
    rows = np.random.default_rng(0).standard_normal((ROWS, *(shape or (FEATURES,)))).astype(np.float32)
    with torch.no_grad():
        names = ("only",) if isinstance(module(torch.from_numpy(rows)), Tensor) else None
    traced = trace_module(module, rows, names)
    merge_same_nodes(traced.graph)
    found = find_gates(traced, record_values(traced, InputRows({"x": rows})))
    return [found[output] for output in traced.outputs()]


def chosen_gates(trace_module: TraceModule, module: nn.Module, *shape: int) -> list[Gate | None]:
    return [last_gate(gates) for gates in found_gates(trace_module, module, *shape)]


class Several(nn.Module):
    """Modules side by side, a task each: one trace for all, since traces are what takes time here."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(modules)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [part(x) for part in self.parts]


def gates_by_name(
    trace_module: TraceModule, modules: Mapping[str, nn.Module], *shape: int
) -> dict[str, tuple[Gate, ...]]:
    return dict(zip(modules, found_gates(trace_module, Several(list(modules.values())), *shape), strict=True))


def linears(count: int = EXPERTS, width: int = WIDTH) -> nn.ModuleList:
    return nn.ModuleList(nn.Linear(FEATURES, width) for _ in range(count))


class Moe(nn.Module):
    """One task: a linear gate, experts that are a linear layer each, and a tower."""

    def __init__(self, mix: Mix, count: int = EXPERTS) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mix = mix
        self.gate = nn.Linear(FEATURES, count)
        self.experts = linears(count)
        self.tower = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        weights = F.softmax(self.gate(x), dim=-1)
        fused: Tensor = self.tower(self.mix(weights, [torch.relu(expert(x)) for expert in self.experts]))
        return fused


# What is a gate


def chain(weights: Sequence[Tensor], experts: Sequence[Tensor]) -> Tensor:
    total = weights[0] * experts[0]
    for weight, expert in zip(weights[1:], experts[1:], strict=True):
        total = total + expert * weight
    return total


FORMS: dict[str, Mix] = {
    "multiply and sum": lambda w, e: (w.unsqueeze(-1) * torch.stack(e, 1)).sum(1),
    "multiply and sum, experts on the left": lambda w, e: (torch.stack(e, 1) * w[..., None]).sum(dim=-2),
    "multiply and sum, experts last": lambda w, e: (w.unsqueeze(1) * torch.stack(e, 2)).sum(2),
    "multiply and sum, experts first": lambda w, e: (w.t().unsqueeze(-1) * torch.stack(e)).sum(0),
    "multiply and sum with a kept axis": lambda w, e: (
        (w.unsqueeze(-1) * torch.stack(e, 1)).sum(1, keepdim=True).squeeze(1)
    ),
    "multiply and sum of expanded weights": lambda w, e: (
        w.unsqueeze(-1).expand(-1, -1, WIDTH) * torch.stack(e, 1)
    ).sum(1),
    "cat in place of stack": lambda w, e: (
        w.unsqueeze(-1) * torch.cat([part.unsqueeze(1) for part in e], 1)
    ).sum(1),
    "matmul": lambda w, e: (w.unsqueeze(1) @ torch.stack(e, 1)).squeeze(1),
    "matmul, experts on the left": lambda w, e: torch.matmul(torch.stack(e, -1), w.unsqueeze(-1)).squeeze(-1),
    "bmm": lambda w, e: torch.bmm(w.unsqueeze(1), torch.stack(e, 1)).flatten(1),
    "bmm, experts on the left": lambda w, e: torch.bmm(
        torch.stack(e, 1).transpose(1, 2), w.unsqueeze(2)
    ).squeeze(2),
    "einsum": lambda w, e: torch.einsum("bk,bkd->bd", w, torch.stack(e, 1)),
    "einsum, experts on the left": lambda w, e: torch.einsum("bkd,bk->bd", torch.stack(e, 1), w),
    "einsum, experts first": lambda w, e: torch.einsum("bk,kbd->bd", w, torch.stack(e)),
    "einsum, experts first and on the left": lambda w, e: torch.einsum("kbd,bk->bd", torch.stack(e), w),
    "einsum of an ellipsis": lambda w, e: torch.einsum("...k,...kd->...d", w, torch.stack(e, 1)),
    "select by select": lambda w, e: chain([w[:, k].unsqueeze(1) for k in range(len(e))], e),
    "slice by slice": lambda w, e: chain([w[:, k : k + 1] for k in range(len(e))], e),
    "unbound": lambda w, e: chain([part.unsqueeze(-1) for part in w.unbind(1)], e),
    "split": lambda w, e: chain(list(w.split(1, dim=1)), e),
    "chunked": lambda w, e: chain(list(w.chunk(len(e), dim=1)), e),
    "Python's sum": lambda w, e: torch.as_tensor(sum(w[:, k : k + 1] * part for k, part in enumerate(e))),
    "terms stacked and summed": lambda w, e: torch.stack(
        [w[:, k : k + 1] * part for k, part in enumerate(e)]
    ).sum(0),
    "terms added from the last": lambda w, e: chain([w[:, k : k + 1] for k in range(len(e))][::-1], e[::-1]),
    "terms of stacked experts": lambda w, e: chain(
        [w[:, k : k + 1] for k in range(len(e))], torch.stack(e, 1).unbind(1)
    ),
}


@pytest.fixture(scope="module")
def gates_of_forms(trace_module: TraceModule) -> dict[str, tuple[Gate, ...]]:
    return gates_by_name(trace_module, {name: Moe(mix) for name, mix in FORMS.items()})


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_the_weighted_sum_is_a_gate(
    form: str, gates_of_forms: dict[str, tuple[Gate, ...]]
) -> None:
    (gate,) = gates_of_forms[form]

    assert gate.num_experts == EXPERTS


def test_any_number_of_experts(trace_module: TraceModule) -> None:
    """As many experts as rows among them."""
    forms = ("multiply and sum", "einsum", "slice by slice")
    modules = {f"{form} {count}": Moe(FORMS[form], count) for form in forms for count in (2, ROWS)}

    found = gates_by_name(trace_module, modules)

    assert {name: [gate.num_experts for gate in gates] for name, gates in found.items()} == {
        f"{form} {count}": [count] for form in forms for count in (2, ROWS)
    }


GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "a temperature": lambda scores: F.softmax(scores / 0.3, dim=1),
    "dropout before": lambda scores: F.softmax(F.dropout(scores, 0.5, training=False), dim=1),
    "dropout after": lambda scores: F.dropout(F.softmax(scores, dim=1), 0.5, training=False),
    "an axis of length one": lambda scores: F.softmax(scores.unsqueeze(1), dim=-1).squeeze(1),
    "a mask": lambda scores: F.softmax(scores.masked_fill(scores < -100, -1e9), dim=1),
    "float32 asked for": lambda scores: F.softmax(scores, dim=1, dtype=torch.float32),
}


class Around(Moe):
    """BatchNorm, and more, around the softmax."""

    def __init__(self, softmax: Callable[[Tensor], Tensor]) -> None:
        super().__init__(FORMS["multiply and sum"])
        self.softmax = softmax
        self.norm = nn.BatchNorm1d(EXPERTS)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.softmax(self.norm(self.gate(x)))
        return self.mix(weights, [expert(x) for expert in self.experts])


def test_what_stands_around_the_softmax_does_not_hide_it(trace_module: TraceModule) -> None:
    found = gates_by_name(trace_module, {name: Around(softmax) for name, softmax in GATES.items()})

    assert {name: len(gates) for name, gates in found.items()} == dict.fromkeys(GATES, 1)


BATCHED: dict[str, tuple[tuple[int, ...], Callable[[Tensor, Tensor], Tensor]]] = {
    "einsum": ((EXPERTS, FEATURES, WIDTH), lambda x, w: torch.einsum("bd,kde->bke", x, w)),
    "einsum, weights on the left": (
        (EXPERTS, WIDTH, FEATURES),
        lambda x, w: torch.einsum("ked,bd->bke", w, x),
    ),
    "matmul": ((EXPERTS, FEATURES, WIDTH), lambda x, w: (x[:, None, None, :] @ w).squeeze(2)),
    "bmm": (
        (EXPERTS, FEATURES, WIDTH),
        lambda x, w: torch.bmm(x.unsqueeze(0).expand(EXPERTS, -1, -1), w).transpose(0, 1),
    ),
    "one wide layer": (
        (EXPERTS * WIDTH, FEATURES),
        lambda x, w: F.linear(x, w).view(-1, EXPERTS, WIDTH),
    ),
    "one wide layer with experts last": (
        (EXPERTS * WIDTH, FEATURES),
        lambda x, w: F.linear(x, w).view(-1, WIDTH, EXPERTS).transpose(1, 2),
    ),
    "one wide layer in chunks": (
        (EXPERTS * WIDTH, FEATURES),
        lambda x, w: torch.stack(F.linear(x, w).chunk(EXPERTS, dim=1), 1),
    ),
    "one wide product": ((FEATURES, EXPERTS * WIDTH), lambda x, w: (x @ w).unflatten(1, (EXPERTS, WIDTH))),
}


class BatchedMoe(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        shape, self.make = BATCHED[name]
        self.gate = nn.Linear(FEATURES, EXPERTS)
        self.weight = nn.Parameter(torch.randn(shape))
        self.bias = nn.Parameter(torch.randn(EXPERTS, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        experts = torch.relu(self.make(x, self.weight) + self.bias)
        return (F.softmax(self.gate(x), dim=1).unsqueeze(2) * experts).sum(1)


@pytest.fixture(scope="module")
def gates_of_batched(trace_module: TraceModule) -> dict[str, tuple[Gate, ...]]:
    return gates_by_name(trace_module, {name: BatchedMoe(name) for name in BATCHED})


@pytest.mark.parametrize("name", BATCHED)
def test_experts_in_one_tensor(name: str, gates_of_batched: dict[str, tuple[Gate, ...]]) -> None:
    (gate,) = gates_of_batched[name]

    assert gate.num_experts == EXPERTS


def test_a_wide_layer_taken_apart_term_by_term(trace_module: TraceModule) -> None:
    class Terms(BatchedMoe):
        def forward(self, x: Tensor) -> Tensor:
            weights = F.softmax(self.gate(x), dim=1)
            experts = F.linear(x, self.weight).chunk(EXPERTS, dim=1)
            return chain([weights[:, k : k + 1] for k in range(EXPERTS)], experts)

    (gate,) = chosen_gates(trace_module, Terms("one wide layer"))

    assert gate is not None


def test_experts_of_one_number_each(trace_module: TraceModule) -> None:
    class Scalars(Moe):
        def __init__(self) -> None:
            super().__init__(FORMS["multiply and sum"])
            self.experts = linears(width=1)

        def forward(self, x: Tensor) -> Tensor:
            experts = torch.cat([expert(x) for expert in self.experts], 1)
            return (F.softmax(self.gate(x), dim=1) * experts).sum(1, keepdim=True)

    (gate,) = chosen_gates(trace_module, Scalars())

    assert gate is not None


def test_tasks_may_have_gates_over_different_numbers_of_experts(trace_module: TraceModule) -> None:
    class Uneven(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.experts = linears(4)
            self.gates = nn.ModuleList(nn.Linear(FEATURES, count) for count in (2, 3, 4))

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            made = [expert(x) for expert in self.experts]
            return tuple(
                FORMS["bmm"](F.softmax(gate(x), -1), made[: gate.out_features]) for gate in self.gates
            )

    gates = chosen_gates(trace_module, Uneven())

    assert [gate and gate.num_experts for gate in gates] == [2, 3, 4]


class OneGate(nn.Module):
    """Two tasks that share a gate; `own` gives each task experts of its own."""

    def __init__(self, mix: Mix, *, own: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mix = mix
        self.gate = nn.Linear(FEATURES, EXPERTS)
        self.experts = linears()
        self.others = linears() if own else self.experts
        self.towers = nn.ModuleList(nn.Linear(WIDTH, 1) for _ in range(2))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        weights = F.softmax(self.gate(x), -1)
        return tuple(
            tower(self.mix(weights, [expert(x) for expert in experts]))
            for tower, experts in zip(self.towers, (self.experts, self.others), strict=True)
        )


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("form", ["multiply and sum", "slice by slice"])
def test_a_gate_that_tasks_share_is_each_tasks_gate(form: str, own: bool, trace_module: TraceModule) -> None:
    gates = chosen_gates(trace_module, OneGate(FORMS[form], own=own))

    assert None not in gates
    assert len({gate.weights for gate in gates if gate}) == 1


def test_one_softmax_over_two_sets_of_experts_is_one_gate(trace_module: TraceModule) -> None:
    class Both(OneGate):
        def forward(self, x: Tensor) -> Tensor:
            one, other = super().forward(x)
            return one + other

    (gate,) = chosen_gates(trace_module, Both(FORMS["einsum"], own=True))

    assert gate is not None


class Levels(nn.Module):
    """Progressive extraction of two levels."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = linears(2, FEATURES), linears(3)
        self.first_gate, self.second_gate = nn.Linear(FEATURES, 2), nn.Linear(FEATURES, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = FORMS["einsum"](F.softmax(self.first_gate(x), -1), [expert(x) for expert in self.first])
        return FORMS["einsum"](F.softmax(self.second_gate(h), -1), [expert(h) for expert in self.second])


def test_of_several_levels_the_last_is_chosen(trace_module: TraceModule) -> None:
    (gates,) = found_gates(trace_module, Levels())
    chosen = last_gate(gates)

    assert [gate.num_experts for gate in gates] == [3, 2]
    assert chosen is not None
    assert chosen.num_experts == 3


def test_of_two_gates_side_by_side_none_is_chosen(trace_module: TraceModule) -> None:
    class Side(Levels):
        def forward(self, x: Tensor) -> Tensor:
            one = FORMS["einsum"](F.softmax(self.first_gate(x), -1), [expert(x) for expert in self.first])
            other = FORMS["einsum"](F.softmax(self.second_gate(x), -1), [expert(x) for expert in self.second])
            return torch.cat([one, other], 1)

    (gates,) = found_gates(trace_module, Side())

    assert len(gates) == 2
    assert last_gate(gates) is None


def test_a_task_without_a_gate_beside_one_with(trace_module: TraceModule) -> None:
    class Mixed(Moe):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            return super().forward(x), self.experts[0](x)

    with_gate, without = chosen_gates(trace_module, Mixed(FORMS["bmm"]))

    assert with_gate is not None
    assert without is None


# What is none


class Sequences(nn.Module):
    """Rows that are sequences (B, L, D), pooled or attended to."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.key, self.value = nn.Linear(FEATURES, FEATURES), nn.Linear(FEATURES, FEATURES)
        self.scores = nn.Linear(FEATURES, 1)
        self.square = nn.Parameter(torch.randn(FEATURES, FEATURES))
        self.one = nn.Linear(FEATURES, WIDTH)

    def pooling(self, x: Tensor) -> Tensor:
        return F.softmax(self.scores(x).squeeze(-1), dim=1)  # (B, L)


class AttentionPooling(Sequences):
    def forward(self, x: Tensor) -> Tensor:
        return (self.pooling(x).unsqueeze(-1) * torch.relu(self.value(x))).sum(1)


class PoolingOfTheInput(Sequences):
    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bl,bld->bd", self.pooling(x), x)


class PoolingOfAProduct(Sequences):
    """As many places as features: the weight (D, E) has an axis of length L, which does not count places."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(self.pooling(x).unsqueeze(1), x @ self.square).squeeze(1)


class PoolingOfAnEinsum(Sequences):
    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(self.pooling(x).unsqueeze(1), torch.einsum("bld,de->ble", x, self.square)).squeeze(1)


class PoolingOfAWalk(Sequences):
    """The same layer for each place."""

    def forward(self, x: Tensor) -> Tensor:
        places = [self.one(x[:, place]) for place in range(x.shape[1])]
        return (self.pooling(x).unsqueeze(-1) * torch.stack(places, 1)).sum(1)


class PoolingTermByTerm(Sequences):
    def forward(self, x: Tensor) -> Tensor:
        weights = self.pooling(x)
        return chain([weights[:, k : k + 1] for k in range(x.shape[1])], self.value(x).unbind(1))


class PoolingOfAWalkTermByTerm(Sequences):
    def forward(self, x: Tensor) -> Tensor:
        weights = self.pooling(x)
        places = [self.one(x[:, place]) for place in range(x.shape[1])]
        return chain([weights[:, k : k + 1] for k in range(x.shape[1])], places)


class PoolingAroundAQuery(Sequences):
    def forward(self, x: Tensor) -> Tensor:
        weights = F.softmax(self.key(x) @ self.scores.weight.squeeze(0), dim=-1)
        return (weights.unsqueeze(1) @ self.value(x)).squeeze(1)


class SelfAttention(Sequences):
    def forward(self, x: Tensor) -> Tensor:
        weights = F.softmax(x @ self.key(x).transpose(1, 2), dim=-1)
        return (weights @ self.value(x)).mean(1)


class TorchsAttention(Sequences):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(FEATURES, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.attention(x, x, x)[0]
        return found[:, 0]


@pytest.fixture(scope="module")
def gates_of_sequences(trace_module: TraceModule) -> dict[str, tuple[Gate, ...]]:
    """With as many places as features, so that a weight's axis might be taken to count places."""
    modules = {make.__name__: make() for make in Sequences.__subclasses__()}
    return gates_by_name(trace_module, modules, FEATURES, FEATURES)


@pytest.mark.parametrize("name", [make.__name__ for make in Sequences.__subclasses__()])
def test_attention_over_a_sequence_is_no_gate(
    name: str, gates_of_sequences: dict[str, tuple[Gate, ...]]
) -> None:
    assert gates_of_sequences[name] == ()


class Vectors(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate = nn.Linear(FEATURES, EXPERTS)
        self.layer = nn.Linear(FEATURES, EXPERTS)
        self.wide = nn.Linear(FEATURES, 2 * EXPERTS)
        self.experts = linears()
        self.labels = nn.Parameter(torch.randn(EXPERTS, WIDTH))
        self.tower = nn.Linear(EXPERTS * WIDTH, 1)

    def weights(self, x: Tensor) -> Tensor:
        return F.softmax(self.gate(x), dim=-1)


class ClassProbabilities(Vectors):
    def forward(self, x: Tensor) -> Tensor:
        return self.weights(x)


class ExpectedLabel(Vectors):
    def forward(self, x: Tensor) -> Tensor:
        return self.weights(x) @ self.labels


class ExpectedLabelOfEveryRow(Vectors):
    def forward(self, x: Tensor) -> Tensor:
        labels = self.labels.unsqueeze(0).expand(x.shape[0], -1, -1)
        return torch.bmm(self.weights(x).unsqueeze(1), labels).squeeze(1)


class FeedsNothing(Vectors):
    def forward(self, x: Tensor) -> Tensor:
        self.weights(x)
        return torch.stack([expert(x) for expert in self.experts], 1).sum(1)


class MultipliesWithoutASum(Vectors):
    def forward(self, x: Tensor) -> Tensor:
        experts = torch.stack([expert(x) for expert in self.experts], 1)
        weighed: Tensor = self.tower((self.weights(x).unsqueeze(-1) * experts).flatten(1))
        return weighed


class SumsOverFeatures(Vectors):
    """The sum is over each expert's features, and not over the experts."""

    def forward(self, x: Tensor) -> Tensor:
        experts = torch.stack([expert(x) for expert in self.experts], 1)
        return (self.weights(x).unsqueeze(-1) * experts).sum(2)


class WeighsFeatures(Vectors):
    def forward(self, x: Tensor) -> Tensor:
        return (self.weights(x) * torch.relu(self.layer(x))).sum(1, keepdim=True)


class WeighsFeaturesByAProduct(Vectors):
    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(self.weights(x).unsqueeze(1), self.layer(x).unsqueeze(2)).squeeze(2)


class WeighsFeaturesTermByTerm(Vectors):
    def forward(self, x: Tensor) -> Tensor:
        weights, features = self.weights(x), self.layer(x)
        columns = [features[:, k : k + 1] for k in range(EXPERTS)]
        return chain([weights[:, k : k + 1] for k in range(EXPERTS)], columns)


class WeighsTheSameVector(Vectors):
    """Σ w_k · h is h: no expert is another."""

    def forward(self, x: Tensor) -> Tensor:
        return (self.weights(x).unsqueeze(-1) * self.wide(x).unsqueeze(1)).sum(1)


class WeighsCopies(Vectors):
    def forward(self, x: Tensor) -> Tensor:
        copies = self.wide(x).unsqueeze(1).expand(-1, EXPERTS, -1)
        return (self.weights(x).unsqueeze(-1) * copies).sum(1)


class WeightsOfAnySign(Vectors):
    """A layer's own numbers: some are below 0."""

    def forward(self, x: Tensor) -> Tensor:
        experts = torch.stack([expert(x) for expert in self.experts], 1)
        return (self.gate(x).unsqueeze(-1) * experts).sum(1)


class ActivationsThatNeedNotSumToOne(Vectors):
    """As a hidden layer times what others make: positive, and no share of anything."""

    def forward(self, x: Tensor) -> Tensor:
        experts = torch.stack([expert(x) for expert in self.experts], 1)
        return (torch.relu(self.gate(x)).unsqueeze(-1) * experts).sum(1)


class LayerOfAHypernetwork(Vectors):
    """One layer makes the weights of another, which reads gated features."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(torch.sigmoid(self.gate(x)).unsqueeze(1), self.wide(x).view(-1, EXPERTS, 2)).squeeze(
            1
        )


class GatedUnits(Vectors):
    def forward(self, x: Tensor) -> Tensor:
        tower: Tensor = self.tower(
            (torch.sigmoid(self.wide(x)) * self.wide(x)).repeat(1, 3)[:, : EXPERTS * WIDTH]
        )
        return tower


class ScoresOfTwoOutputs(Vectors):
    """Click times price and purchase times margin: sums of single numbers, not of features."""

    def forward(self, x: Tensor) -> Tensor:
        click, buy = torch.sigmoid(self.gate(x)[:, :1]), torch.sigmoid(self.layer(x)[:, :1])
        return click * self.layer(x)[:, 1:2] + buy * self.gate(x)[:, 1:2]


class OneExpertOfTwo(Vectors):
    """Two of three weights are used: their sum is no weighted sum of all."""

    def forward(self, x: Tensor) -> Tensor:
        weights = self.weights(x)
        return weights[:, :1] * self.experts[0](x) + weights[:, 1:2] * self.experts[1](x)


@pytest.fixture(scope="module")
def gates_of_others(trace_module: TraceModule) -> dict[str, tuple[Gate, ...]]:
    return gates_by_name(trace_module, {make.__name__: make() for make in Vectors.__subclasses__()})


@pytest.mark.parametrize("name", [make.__name__ for make in Vectors.__subclasses__()])
def test_other_weighted_sums_are_no_gates(name: str, gates_of_others: dict[str, tuple[Gate, ...]]) -> None:
    assert gates_of_others[name] == ()


def test_weights_that_are_all_zero_have_their_own_experts(trace_module: TraceModule) -> None:
    """Two experts that no row chose have the same column: each term keeps its place all the same."""

    class Skewed(Moe):
        def forward(self, x: Tensor) -> Tensor:
            weights = F.softmax(
                self.gate(x).masked_fill(torch.tensor([True, False, True]), float("-inf")), -1
            )
            mixed: Tensor = self.tower(
                chain([weights[:, k : k + 1] for k in range(3)], [e(x) for e in self.experts])
            )
            return mixed

    (gate,) = chosen_gates(trace_module, Skewed(FORMS["einsum"]))

    assert gate is not None
    assert [next(iter(term.expert.args)) for term in gate.terms]
    assert len({term.expert for term in gate.terms}) == 3


def test_a_softmax_over_scores_of_all_tasks_at_once_is_no_gate(trace_module: TraceModule) -> None:
    class Together(Vectors):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            weights = F.softmax(self.wide(x), dim=-1)  # (B, 2·K), of which each task takes K
            experts = torch.stack([expert(x) for expert in self.experts], 1)
            return tuple((part.unsqueeze(-1) * experts).sum(1) for part in weights.chunk(2, dim=1))

    assert found_gates(trace_module, Together()) == [(), ()]


class TokensAsRows(nn.Module):
    """A gate for each of the 6 tokens of a row, the tokens laid out as rows (6·B, FEATURES)."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts, self.tower = (
            nn.Linear(FEATURES, EXPERTS),
            linears(EXPERTS),
            nn.Linear(WIDTH, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(x.shape[0] * 6, FEATURES)
        weights = F.softmax(self.gate(rows), dim=-1)
        fused = (weights.unsqueeze(-1) * torch.stack([expert(rows) for expert in self.experts], 1)).sum(1)
        answer: Tensor = self.tower(fused).reshape(x.shape[0], 6)
        return answer


def test_a_gate_of_tokens_that_are_laid_out_as_rows_has_no_weights_of_the_row(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, x = TokensAsRows().eval(), torch.randn(5, 6, FEATURES)

    result = te_export.export(
        module, tmp_path / "bundle", example_inputs=x, task_names=[f"t{i}" for i in range(6)]
    )

    assert any("no gate was found" in note for note in result.notes)
    with te_runtime.load(result.bundle, threads=1) as model, torch.no_grad():
        found, exact = model.predict(x.numpy()), module(x).numpy()
    np.testing.assert_allclose(
        np.concatenate([answer.output for answer in found.values()], 1), exact, rtol=0, atol=1e-5
    )
