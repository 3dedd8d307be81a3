"""Gates that are no plain softmax, one a task: the bundle gives the weights that the module mixes its experts with."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import te_export
import te_runtime
from te_runtime.plan import Mode

FEATURES, EXPERTS, WIDTH, BEST = 6, 5, 4, 2
Scores = Tensor
Weigh = Callable[[Scores], Tensor]
Mix = Callable[[Scores, list[Tensor]], Tensor]


def spread(index: Tensor, weights: Tensor) -> Tensor:
    return weights.new_zeros(index.shape[0], EXPERTS).scatter(1, index, weights)


def largest(scores: Scores) -> tuple[Tensor, Tensor]:
    """Softmax of the best scores, and which they are."""
    values, index = scores.topk(BEST, dim=-1)
    return F.softmax(values, dim=-1), index


def renormalized(scores: Scores) -> Tensor:
    values, index = F.softmax(scores, -1).topk(BEST, dim=-1)
    return spread(index, values / values.sum(-1, keepdim=True))


def masked(scores: Scores) -> Tensor:
    floor = scores.topk(BEST, dim=-1).values[:, -1:]
    return F.softmax(scores.masked_fill(scores < floor, float("-inf")), -1)


def switch(scores: Scores) -> Tensor:
    weights = F.softmax(scores, -1)
    best, index = weights.max(-1, keepdim=True)
    return spread(index, best)


def share_of_sigmoids(scores: Scores) -> Tensor:
    shares = torch.sigmoid(scores)
    return shares / shares.sum(-1, keepdim=True)


def by_hand(scores: Scores) -> Tensor:
    powers = torch.exp(scores - scores.amax(-1, keepdim=True))
    return powers / powers.sum(-1, keepdim=True)


def share_of_positives(scores: Scores) -> Tensor:
    positives = F.relu(scores)
    return positives / (positives.sum(-1, keepdim=True) + 1e-6)


WEIGHTS: dict[str, Weigh] = {
    "scattered": lambda s: spread(*largest(s)[::-1]),
    "renormalized": renormalized,
    "masked": masked,
    "switch": switch,
    "sigmoids": torch.sigmoid,
    "share_of_sigmoids": share_of_sigmoids,
    "one_hot": lambda s: F.one_hot(s.argmax(-1), EXPERTS).float(),
    "by_hand": by_hand,
    "share_of_positives": share_of_positives,
    "cut_off": lambda s: F.softmax(s, -1) * (F.softmax(s, -1) > 0.15),
}


def multiply_and_sum(weights: Tensor, experts: list[Tensor]) -> Tensor:
    return (weights.unsqueeze(-1) * torch.stack(experts, 1)).sum(1)


def gathered(scores: Scores, experts: list[Tensor]) -> Tensor:
    weights, index = largest(scores)
    chosen = torch.stack(experts, 1).gather(1, index.unsqueeze(-1).expand(-1, -1, WIDTH))
    return (weights.unsqueeze(-1) * chosen).sum(1)


def indexed(scores: Scores, experts: list[Tensor]) -> Tensor:
    weights, index = largest(scores)
    rows = torch.arange(scores.shape[0]).unsqueeze(1)
    return torch.einsum("bj,bjd->bd", weights, torch.stack(experts, 1)[rows, index])


def weight_by_weight(scores: Scores, experts: list[Tensor]) -> Tensor:
    weights, index = largest(scores)
    total = torch.zeros_like(experts[0])
    for k, expert in enumerate(experts):
        total = total + (weights * (index == k)).sum(-1, keepdim=True) * expert
    return total


def chosen_by_where(scores: Scores, experts: list[Tensor]) -> Tensor:
    weights, index = largest(scores)
    total = torch.zeros_like(experts[0])
    for k in reversed(range(EXPERTS)):
        weight = torch.where(index == k, weights, torch.zeros_like(weights)).sum(-1)
        total = total + weight.unsqueeze(-1) * experts[k]
    return total


def looped(scores: Scores, experts: list[Tensor]) -> Tensor:
    weights = F.softmax(scores, -1)
    total = scores.new_zeros(scores.shape[0], WIDTH)
    for k, expert in enumerate(experts):
        total += expert * weights[:, k : k + 1]
    return total


def looped_from_the_last(scores: Scores, experts: list[Tensor]) -> Tensor:
    weights = renormalized(scores)
    total = weights[:, -1, None] * experts[-1]
    for k in reversed(range(EXPERTS - 1)):
        total = total + weights[:, k, None] * experts[k]
    return total


def by_a_none_index(scores: Scores, experts: list[Tensor]) -> Tensor:
    return (F.softmax(scores, -1)[:, :, None] * torch.stack(experts, 1)).sum(1)


def indexed_by_int32(scores: Scores, experts: list[Tensor]) -> Tensor:
    weights, index = largest(scores)
    rows = torch.arange(scores.shape[0]).unsqueeze(1)
    return (weights[:, :, None] * torch.stack(experts, 1)[rows, index.int()]).sum(1)


def switched_by_gather(scores: Scores, experts: list[Tensor]) -> Tensor:
    weight, index = F.softmax(scores, -1).max(-1, keepdim=True)
    return weight * torch.stack(experts, 1).gather(1, index.unsqueeze(-1).expand(-1, -1, WIDTH)).squeeze(1)


def switched_by_index(scores: Scores, experts: list[Tensor]) -> Tensor:
    weight, index = F.softmax(scores, -1).max(-1)
    return weight[:, None] * torch.stack(experts, 1)[torch.arange(scores.shape[0]), index]


def in_float64(scores: Scores, experts: list[Tensor]) -> Tensor:
    weights = F.softmax(scores.double(), -1)
    total = torch.zeros_like(experts[0].double())
    for k, expert in enumerate(experts):
        total = total + weights[:, k : k + 1] * expert.double()
    return total.to(scores.dtype)


def stacked_in_float64(scores: Scores, experts: list[Tensor]) -> Tensor:
    weights = torch.softmax(scores, -1, dtype=torch.float64)
    return (weights.unsqueeze(-1) * torch.stack(experts, 1).double()).sum(1).to(scores.dtype)


def weight_by_weight_in_float64(scores: Scores, experts: list[Tensor]) -> Tensor:
    values, index = scores.topk(BEST, dim=-1)
    weights = F.softmax(values.double(), -1)
    total = experts[0].new_zeros(scores.shape[0], WIDTH)
    for k, expert in enumerate(experts):
        total = total + ((index == k) * weights).sum(-1, keepdim=True).to(expert.dtype) * expert
    return total


def two_sets_at_once(scores: Scores, experts: list[Tensor]) -> Tensor:
    """One loop over two sums, of which the first is the gate's own."""
    weights, total = F.softmax(scores, -1), torch.tanh(experts[1]) + experts[2]
    for k, expert in enumerate(experts):
        total = total + weights[:, k : k + 1] * expert
        total = total + torch.tanh(expert)
    return total


def compared_with_sorted(scores: Scores, experts: list[Tensor]) -> Tensor:
    """No topk tells that the index is one of K; the loop runs backwards."""
    shares = F.softmax(scores, -1)
    index = shares.argsort(-1, descending=True)[:, :BEST]
    weights = shares.gather(1, index)
    total = torch.zeros_like(experts[0])
    for k in reversed(range(EXPERTS)):
        total = weights.masked_fill(index != k, 0.0).sum(-1, keepdim=True) * experts[k] + total
    return total


def chosen_twice(scores: Scores, experts: list[Tensor]) -> Tensor:
    weights, index = largest(scores)
    weights, index = torch.cat([weights * 0.25, weights * 0.75], 1), index.repeat(1, 2)
    chosen = torch.stack(experts, 1).gather(1, index.unsqueeze(-1).expand(-1, -1, WIDTH))
    return (weights.unsqueeze(-1) * chosen).sum(1)


def with_a_bias_for_the_choice(scores: Scores, experts: list[Tensor]) -> Tensor:
    return multiply_and_sum(biased(scores), experts)


def biased(scores: Scores) -> Tensor:
    """Sigmoids, chosen by a biased score, over their sum."""
    shares = torch.sigmoid(scores)
    index = (shares + torch.linspace(0, 0.5, EXPERTS, dtype=scores.dtype)).topk(BEST, dim=-1).indices
    weights = shares.gather(1, index)
    return spread(index, weights / (weights.sum(-1, keepdim=True) + 1e-20))


def largest_share(scores: Scores) -> Tensor:
    values, index = F.softmax(scores, -1).topk(BEST, dim=-1)
    return spread(index, values)


def beside_another(scores: Scores, experts: list[Tensor]) -> Tensor:
    weights, total = F.softmax(scores, -1), torch.tanh(experts[0])
    for k, expert in enumerate(experts):
        total = total + weights[:, k : k + 1] * expert
    return total


def combined_by_einsum(scores: Scores, experts: list[Tensor]) -> Tensor:
    weights, index = largest(scores)
    combined = torch.einsum("bj,bjk->bk", weights, F.one_hot(index, EXPERTS).to(weights.dtype))
    return torch.einsum("bk,bkd->bd", combined, torch.stack(experts, 1))


MIXTURES: dict[str, tuple[Mix, Weigh]] = {
    "gathered": (gathered, WEIGHTS["scattered"]),
    "indexed": (indexed, WEIGHTS["scattered"]),
    "weight_by_weight": (weight_by_weight, WEIGHTS["scattered"]),
    "chosen_by_where": (chosen_by_where, WEIGHTS["scattered"]),
    "by_a_none_index": (by_a_none_index, lambda s: F.softmax(s, -1)),
    "indexed_by_int32": (indexed_by_int32, WEIGHTS["scattered"]),
    "switched_by_gather": (switched_by_gather, WEIGHTS["switch"]),
    "switched_by_index": (switched_by_index, WEIGHTS["switch"]),
    "in_float64": (in_float64, lambda s: F.softmax(s, -1)),
    "stacked_in_float64": (stacked_in_float64, lambda s: F.softmax(s, -1)),
    "weight_by_weight_in_float64": (weight_by_weight_in_float64, WEIGHTS["scattered"]),
    "two_sets_at_once": (two_sets_at_once, lambda s: F.softmax(s, -1)),
    "compared_with_sorted": (compared_with_sorted, largest_share),
    "chosen_twice": (chosen_twice, WEIGHTS["scattered"]),
    "with_a_bias_for_the_choice": (with_a_bias_for_the_choice, biased),
    "beside_another": (beside_another, lambda s: F.softmax(s, -1)),
    "combined_by_einsum": (combined_by_einsum, WEIGHTS["scattered"]),
    "looped": (looped, lambda s: F.softmax(s, -1)),
    "looped_from_the_last": (looped_from_the_last, renormalized),
    **{
        name: (lambda s, e, weigh=weigh: multiply_and_sum(weigh(s), e), weigh)
        for name, weigh in WEIGHTS.items()
    },
}


class EveryForm(nn.Module):
    """A task for each form, with experts that all share."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(FEATURES, FEATURES)
        self.experts = nn.ModuleList(nn.Linear(FEATURES, WIDTH) for _ in range(EXPERTS))
        self.gates = nn.ModuleList(nn.Linear(FEATURES, EXPERTS) for _ in MIXTURES)
        self.heads = nn.ModuleList(nn.Linear(WIDTH, 2) for _ in MIXTURES)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = torch.tanh(self.body(x))
        experts = [expert(h) for expert in self.experts]
        return {
            name: head(mix(3 * gate(h), experts))
            for gate, head, (name, (mix, _)) in zip(self.gates, self.heads, MIXTURES.items(), strict=True)
        }

    def weights(self, x: Tensor) -> dict[str, Tensor]:
        h = torch.tanh(self.body(x))
        return {
            name: weigh(3 * gate(h))
            for gate, (name, (_, weigh)) in zip(self.gates, MIXTURES.items(), strict=True)
        }


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> te_export.ExportResult:
    folder = tmp_path_factory.mktemp("forms") / "bundle"
    options = te_export.ExportOptions(precisions=("fp32", "fp16"))
    return te_export.export(EveryForm(), folder, options, example_inputs=torch.randn(8, FEATURES))


@pytest.mark.parametrize("mode", ["joint", "split", "task"])
def test_the_bundle_gives_what_the_module_mixes_with(
    mode: Mode,
    exported: te_export.ExportResult,
    load_for_all_tasks: Callable[..., AbstractContextManager[Any]],
) -> None:
    module = EveryForm().eval()
    rows = torch.from_numpy(np.random.default_rng(3).standard_normal((40, FEATURES)).astype(np.float32))
    with torch.no_grad():
        own = module(rows), module.weights(rows)
        exact = module.double()(rows.double()), module.weights(rows.double())

    with load_for_all_tasks(exported.bundle, mode=mode, threads=1) as model:
        answers = model.predict(rows.numpy())

    for name in MIXTURES:
        found = answers[name].output, answers[name].routing_weights
        for array, single, double in zip(found, own, exact, strict=True):
            assert array is not None, name
            allowed = 2e-6 + 4 * float((single[name] - double[name]).abs().max())
            np.testing.assert_allclose(array, double[name], rtol=0, atol=allowed, err_msg=name)


def test_fp16_chooses_in_float32(exported: te_export.ExportResult) -> None:
    assert exported.failed_variants == ()
    rows = np.random.default_rng(4).standard_normal((200, FEATURES)).astype(np.float32)
    with te_runtime.load(exported.bundle, precision="fp16", threads=1) as model:
        answers = model.predict(rows)
    for name in ("renormalized", "gathered", "indexed", "weight_by_weight"):
        weights = answers[name].routing_weights
        assert weights is not None
        np.testing.assert_allclose(weights.sum(1), 1.0, rtol=0, atol=1e-6)
        assert (np.count_nonzero(weights, axis=1) == BEST).all()


def test_a_gate_keeps_its_kind_in_what_is_told(exported: te_export.ExportResult) -> None:
    assert not any("no gate" in note for note in exported.notes)
    parity = {entry.task: entry for entry in exported.manifest.variants[0].parity}
    assert all(parity[name].routing_weights is not None for name in MIXTURES)


@pytest.mark.parametrize("form", ["bmm", "matmul", "einsum"])
def test_one_softmax_over_the_scores_of_all_tasks_is_pulled_apart(form: str, tmp_path: Path) -> None:
    products: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "bmm": torch.bmm, "matmul": torch.matmul, "einsum": lambda w, e: torch.einsum("btk,bkd->btd", w, e)
    }  # fmt: skip

    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.experts = nn.ModuleList(nn.Linear(FEATURES, WIDTH) for _ in range(EXPERTS))
            self.gate = nn.Linear(FEATURES, 3 * EXPERTS)
            self.heads = nn.ModuleList(nn.Linear(WIDTH, 2) for _ in range(3))

        def weights(self, x: Tensor) -> Tensor:
            return F.softmax(self.gate(x).view(-1, 3, EXPERTS), dim=-1)

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            mixed = products[form](self.weights(x), torch.stack([expert(x) for expert in self.experts], 1))
            return tuple(head(mixed[:, task]) for task, head in enumerate(self.heads))

    module = Fused()
    x = torch.randn(4, FEATURES)

    result = te_export.export(module, tmp_path / "bundle", example_inputs=x)

    with te_runtime.load(result.bundle, threads=1) as model, torch.no_grad():
        for task, answer in enumerate(model.predict(x.numpy()).values()):
            np.testing.assert_allclose(answer.output, module(x)[task], rtol=0, atol=1e-6)
            np.testing.assert_allclose(answer.routing_weights, module.weights(x)[:, task], rtol=0, atol=1e-6)
    graph = onnx.load(result.bundle / "fp32" / "task-task_0.onnx", load_external_data=False).graph
    assert [EXPERTS, FEATURES] in [list(tensor.dims) for tensor in graph.initializer]  # its own scores alone


class Alone(nn.Module):
    """What the modules below are made of."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gates = nn.ModuleList(nn.Linear(FEATURES, 1) for _ in range(EXPERTS))
        self.gate, self.second = nn.Linear(FEATURES, EXPERTS), nn.Linear(FEATURES, 3)
        self.experts = nn.ModuleList(nn.Linear(FEATURES, WIDTH) for _ in range(EXPERTS))
        self.others = nn.ModuleList(nn.Linear(FEATURES, WIDTH) for _ in range(2))
        self.shares = nn.Parameter(torch.randn(EXPERTS))
        self.table = nn.Parameter(torch.randn(3, EXPERTS, WIDTH))
        self.same, self.head = nn.Linear(FEATURES, FEATURES), nn.Linear(WIDTH, 1)
        self.wide_head = nn.Linear(FEATURES, 1)


class OwnSigmoids(Alone):
    """Each expert has a gate of its own; the loop runs backwards, and adds on the left."""

    def forward(self, x: Tensor) -> Tensor:
        total = torch.zeros(x.shape[0], WIDTH)
        for k in reversed(range(EXPERTS)):
            total = torch.sigmoid(self.gates[k](x)) * torch.relu(self.experts[k](x)) + total
        found: Tensor = self.head(total)
        return found

    def weights(self, x: Tensor) -> Tensor:
        return torch.cat([torch.sigmoid(gate(x)) for gate in self.gates], 1)


class ConstantShares(Alone):
    """The gate does not read the row."""

    def forward(self, x: Tensor) -> Tensor:
        experts = torch.stack([expert(x) for expert in self.experts], 1)
        found: Tensor = self.head((self.weights(x).unsqueeze(-1) * experts).sum(1))
        return found

    def weights(self, x: Tensor) -> Tensor:
        return torch.softmax(self.shares, -1).expand(x.shape[0], -1)


class Levels(Alone):
    """The sum of one loop is an expert of the next; the first task takes the inner one."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        inner, outer = F.softmax(self.gate(x), -1), self.weights(x)
        first = torch.zeros(x.shape[0], WIDTH)
        for k, expert in enumerate(self.experts):
            first = first + inner[:, k : k + 1] * expert(x)
        total = torch.zeros(x.shape[0], WIDTH) + outer[:, :1] * first
        for k, expert in enumerate(self.others):
            total = total + outer[:, k + 1 : k + 2] * expert(x)
        return {"inner": self.head(first), "outer": self.head(total)}

    def weights(self, x: Tensor) -> Tensor:
        return F.softmax(self.second(x), -1)


class TwoFactors(Alone):
    """The weight of an expert is a product of two numbers, of which the second comes after the expert."""

    def forward(self, x: Tensor) -> Tensor:
        weights, total = F.softmax(self.gate(x), -1), torch.zeros(x.shape[0], WIDTH)
        for k, expert in enumerate(self.experts):
            total = total + weights[:, k : k + 1] * expert(x) * torch.sigmoid(self.gates[k](x))
        found: Tensor = self.head(total)
        return found


class Highway(Alone):
    def forward(self, x: Tensor) -> Tensor:
        carry = torch.sigmoid(self.gates[0](x))
        found: Tensor = self.wide_head(carry * torch.relu(self.same(x)) + (1 - carry) * x)
        return found


class OwnAnswersAsFactors(Alone):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        click, buy = (torch.sigmoid(gate(x)) for gate in self.gates[:2])
        return {"click": click, "buy": buy, "value": click * self.experts[0](x) + buy * self.experts[1](x)}


class LookedUp(Alone):
    """Rows of a table that an input names: no expert reads the row."""

    def forward(self, x: Tensor, group: Tensor) -> Tensor:
        weights, index = largest(self.gate(x))
        chosen = self.table[group.unsqueeze(1), index]
        found: Tensor = self.head((weights.unsqueeze(-1) * chosen).sum(1))
        return found


class CountedFromTheEnd(Alone):
    def forward(self, x: Tensor) -> Tensor:
        weights, index = largest(self.gate(x))
        experts = torch.stack([expert(x) for expert in self.experts], 1)
        rows = torch.arange(x.shape[0]).unsqueeze(1)
        found: Tensor = self.head((weights.unsqueeze(-1) * experts[rows, index - EXPERTS]).sum(1))
        return found


class SharedByLevels(Alone):
    """Both tasks apply the same second experts to mixtures of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(EXPERTS))
        self.mine = nn.ModuleList(nn.Linear(FEATURES, EXPERTS) for _ in range(4))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        answers = []
        for task in range(2):
            first = multiply_and_sum(
                F.softmax(self.mine[task](x), -1), [torch.relu(e(x)) for e in self.experts]
            )
            seconds = [torch.relu(e(first)) for e in self.seconds]
            answers.append(self.head(multiply_and_sum(F.softmax(self.mine[task + 2](x), -1), seconds)))
        return tuple(answers)


@pytest.mark.parametrize(
    "make", [OwnSigmoids, ConstantShares, Levels, TwoFactors, Highway, OwnAnswersAsFactors, LookedUp,
             CountedFromTheEnd, SharedByLevels],
)  # fmt: skip
def test_single_modules_are_exported_right(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    module = make()
    inputs = {"x": torch.randn(8, FEATURES)} | ({"group": torch.arange(8) % 3} if make is LookedUp else {})

    result = te_export.export(module, tmp_path / "bundle", example_inputs=inputs)

    with te_runtime.load(result.bundle, threads=1) as model, torch.no_grad():
        answers = list(model.predict({name: value.numpy() for name, value in inputs.items()}).values())
        wanted = module(**inputs)
        if isinstance(wanted, dict):
            wanted = tuple(wanted.values())
        for answer, tensor in zip(answers, wanted if isinstance(wanted, tuple) else (wanted,), strict=True):
            np.testing.assert_allclose(answer.output, tensor, rtol=0, atol=2e-6)
        found = answers[-1].routing_weights
        if not hasattr(module, "weights"):
            assert (found is None) == (make is not SharedByLevels)
            return
        np.testing.assert_allclose(found, module.weights(inputs["x"]), rtol=0, atol=2e-6)
