"""Small multi-task modules of the common architectures, written from their papers, one for each form of forward.

Shared bottom: Caruana 1997. MMoE: Ma et al. 2018. CGC and PLE: Tang et al. 2020. Multi-task attention: Liu et al.
2019. Cross-stitch: Misra et al. 2016. Mixtures are written in the different ways that people write them, since a
search for gates meets them all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["REWRITTEN_MODELS", "Inputs", "RewrittenModel"]

Inputs = Tensor | dict[str, Tensor] | tuple[Tensor, ...]
Call = Callable[[nn.Module, Inputs], dict[str, Tensor]]
MixtureForm = Literal["multiply and sum", "einsum", "bmm", "matmul", "columns", "experts first"]

EXAMPLE_ROWS = 5
FEATURES, HIDDEN, EXPERT = 6, 10, 7
USERS, ITEMS = 30, 50
SIDE = 12


@dataclass(frozen=True)
class RewrittenModel:
    """A module in eval mode and what its export must find.

    Attributes:
        make_rows: inputs of a number of rows, from a seed.
        task_names: in the order of the outputs.
        call: every task's prediction, by calling the module the way its author meant.
        gates: the submodule whose output is a task's routing weights; tasks that are not in it have none.
        experts: how many experts each of those gates weighs.
        gates_may_stay_hidden: finding no gate is no fault, since its weights do not go from a softmax straight
            into a weighted sum; finding other weights is.
    """

    module: nn.Module
    make_rows: Callable[[int, int], Inputs]
    task_names: tuple[str, ...]
    call: Call
    gates: Mapping[str, str] = field(default_factory=dict)
    experts: Mapping[str, int] = field(default_factory=dict)
    gates_may_stay_hidden: bool = False

    @property
    def example_inputs(self) -> Inputs:
        return self.make_rows(EXAMPLE_ROWS, 0)


class Mlp(nn.Module):
    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


class Gate(nn.Module):
    """Routing weights (B, K) of a row: a softmax over linear scores."""

    def __init__(self, features: int, experts: int, *, temperature: float = 1.0, axis: int = -1) -> None:
        super().__init__()
        self.scores = nn.Linear(features, experts)
        self.temperature = temperature
        self.axis = axis

    def forward(self, x: Tensor) -> Tensor:
        return F.softmax(self.scores(x) / self.temperature, dim=self.axis)


class TopGate(nn.Module):
    """The two largest of a softmax, brought back to a sum of one; the other experts weigh nothing."""

    def __init__(self, features: int, experts: int) -> None:
        super().__init__()
        self.scores = nn.Linear(features, experts)

    def forward(self, x: Tensor) -> Tensor:
        weights = F.softmax(self.scores(x), dim=-1)
        largest, places = weights.topk(2, dim=-1)  # (B, 2)
        kept = torch.zeros_like(weights).scatter(-1, places, largest)
        return kept / kept.sum(dim=-1, keepdim=True)


class NormalizedGate(nn.Module):
    """Routing weights that no softmax makes: positive scores over their sum."""

    def __init__(self, features: int, experts: int) -> None:
        super().__init__()
        self.scores = nn.Linear(features, experts)

    def forward(self, x: Tensor) -> Tensor:
        shares = F.softplus(self.scores(x)) + 0.1
        return shares / shares.sum(dim=-1, keepdim=True)


def mix(weights: Tensor, experts: Sequence[Tensor], form: MixtureForm) -> Tensor:
    """Σ_k weights[:, k] · experts[k], with experts of shape (B, …).

    Args:
        weights: (B, K).
        experts: K tensors (B, D); for "experts first" also (B, C, H, W).
    """
    if form == "multiply and sum":
        stacked = torch.stack(list(experts), dim=1)  # (B, K, D)
        return (weights.unsqueeze(-1) * stacked).sum(dim=1)
    if form == "einsum":
        return torch.einsum("bk,bkd->bd", weights, torch.stack(list(experts), dim=1))
    if form == "bmm":
        return torch.bmm(weights.unsqueeze(1), torch.stack(list(experts), dim=1)).squeeze(1)
    if form == "matmul":
        return (torch.stack(list(experts), dim=-1) @ weights.unsqueeze(-1)).squeeze(
            -1
        )  # (B, D, K) @ (B, K, 1)
    if form == "experts first":
        return torch.einsum("kb...,bk->b...", torch.stack(list(experts)), weights)
    total = weights[:, :1] * experts[0]
    for index in range(1, len(experts)):
        total = total + weights[:, index : index + 1] * experts[index]
    return total


class MmoeCore(nn.Module):
    """Experts that every task shares, and a gate and a tower for each task."""

    def __init__(
        self,
        widths: Mapping[str, int],
        experts: int,
        form: MixtureForm,
        make_gate: Callable[[int, int], nn.Module] = Gate,
        features: int = FEATURES,
    ) -> None:
        super().__init__()
        self.form: MixtureForm = form
        self.experts = nn.ModuleList(Mlp(features, HIDDEN, EXPERT) for _ in range(experts))
        self.gates = nn.ModuleDict({task: make_gate(features, experts) for task in widths})
        self.towers = nn.ModuleDict({task: Mlp(EXPERT, HIDDEN, width) for task, width in widths.items()})

    def task(self, x: Tensor, task: str) -> Tensor:
        outputs = [F.relu(expert(x)) for expert in self.experts]
        return self.towers[task](mix(self.gates[task](x), outputs, self.form))

    def every_task(self, x: Tensor) -> dict[str, Tensor]:
        outputs = [F.relu(expert(x)) for expert in self.experts]
        return {
            task: tower(mix(self.gates[task](x), outputs, self.form)) for task, tower in self.towers.items()
        }


class MmoeToDict(MmoeCore):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return self.every_task(x)


class MmoeToTuple(MmoeCore):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.every_task(x).values())


class MmoeToColumns(MmoeCore):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([torch.sigmoid(logit) for logit in self.every_task(x).values()], dim=1)  # (B, T)


class MmoeByTaskId(MmoeCore):
    def forward(self, x: Tensor, task_id: int) -> Tensor:
        return self.task(x, list(self.towers)[task_id])


class MmoeByTaskName(MmoeCore):
    def forward(self, x: Tensor, task_name: str) -> Tensor:
        return self.task(x, task_name)


class MmoeWithAux(MmoeCore):
    """Hands back the routing weights and a balancing loss beside the prediction."""

    def forward(self, x: Tensor, task_id: int) -> tuple[Tensor, dict[str, Tensor]]:
        name = list(self.towers)[task_id]
        weights = self.gates[name](x)
        outputs = [F.relu(expert(x)) for expert in self.experts]
        prediction = self.towers[name](mix(weights, outputs, self.form))
        return prediction, {"routing_weights": weights, "balance": (weights.mean(dim=0) ** 2).sum()}


class MmoeWithOptionalTask(MmoeCore):
    """Every task in a dict where none is named."""

    def forward(self, x: Tensor, task_name: str | None = None) -> dict[str, Tensor]:
        names = list(self.towers) if task_name is None else [task_name]
        return {name: self.task(x, name) for name in names}


class BatchedMmoe(nn.Module):
    """All experts in one weight (K, in, D), so nothing is stacked."""

    def __init__(self, widths: Mapping[str, int], experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(experts, FEATURES, EXPERT) * 0.4)
        self.bias = nn.Parameter(torch.randn(experts, EXPERT) * 0.1)
        self.gates = nn.ModuleDict({task: Gate(FEATURES, experts) for task in widths})
        self.towers = nn.ModuleDict({task: nn.Linear(EXPERT, width) for task, width in widths.items()})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        experts = F.relu(torch.einsum("bi,kid->bkd", x, self.weight) + self.bias)  # (B, K, D)
        return {
            task: tower(torch.einsum("bkd,bk->bd", experts, self.gates[task](x)))
            for task, tower in self.towers.items()
        }


class SoftmaxesThatAreNoGates(nn.Module):
    """Attention over a history of items, attention over features, and class probabilities as predictions."""

    def __init__(self, widths: Mapping[str, int]) -> None:
        super().__init__()
        self.item = nn.Embedding(ITEMS, HIDDEN)
        self.scores = nn.Linear(HIDDEN, 1)
        self.importance = nn.Linear(HIDDEN, HIDDEN)
        self.heads = nn.ModuleDict({task: nn.Linear(HIDDEN, width) for task, width in widths.items()})

    def forward(self, history: Tensor) -> dict[str, Tensor]:
        items = self.item(history)  # (B, L, D)
        attended = (F.softmax(self.scores(items), dim=1) * items).sum(dim=1)  # (B, D)
        chosen = F.softmax(self.importance(attended), dim=-1) * attended
        return {task: F.softmax(head(chosen), dim=-1) for task, head in self.heads.items()}


class SharedBottom(nn.Module):
    """One bottom, a head per task, a column per head."""

    def __init__(self, tasks: int) -> None:
        super().__init__()
        self.bottom = nn.Sequential(
            nn.Linear(FEATURES, HIDDEN), nn.BatchNorm1d(HIDDEN), nn.ReLU(), nn.Dropout(0.3)
        )
        self.heads = nn.ModuleList(nn.Linear(HIDDEN, 1) for _ in range(tasks))

    def forward(self, x: Tensor) -> Tensor:
        h = self.bottom(x)
        return torch.cat([head(h) for head in self.heads], dim=1)


class FlatAnswers(nn.Module):
    """One number (B,) per task, as regressions often give it, in a list."""

    def __init__(self, tasks: int) -> None:
        super().__init__()
        self.bottom = Mlp(FEATURES, HIDDEN, HIDDEN)
        self.heads = nn.ModuleList(nn.Linear(HIDDEN, 1) for _ in range(tasks))

    def forward(self, x: Tensor) -> list[Tensor]:
        h = F.relu(self.bottom(x))
        return [head(h).squeeze(-1) for head in self.heads]


class DensePredictions(nn.Module):
    """A map (B, C, H, W) per task, from a shared encoder."""

    def __init__(self, widths: Mapping[str, int]) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 5, kernel_size=3, stride=2, padding=1), nn.ReLU())
        self.heads = nn.ModuleDict(
            {task: nn.ConvTranspose2d(5, width, kernel_size=2, stride=2) for task, width in widths.items()}
        )

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        h = self.encoder(images)
        return {task: head(h) for task, head in self.heads.items()}


class OneGate(nn.Module):
    """A mixture of experts below all tasks: they share its one gate."""

    def __init__(self, widths: Mapping[str, int], experts: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList(Mlp(FEATURES, HIDDEN, EXPERT) for _ in range(experts))
        self.gate = Gate(FEATURES, experts)
        self.heads = nn.ModuleDict({task: nn.Linear(EXPERT, width) for task, width in widths.items()})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        mixed = mix(self.gate(x), [F.relu(expert(x)) for expert in self.experts], "einsum")
        return {task: head(mixed) for task, head in self.heads.items()}


class EncodesAHistory(nn.Module):
    """A sequence of ids through a transformer or a GRU; attention is no gate."""

    def __init__(self, widths: Mapping[str, int], encoder: Literal["transformer", "gru"]) -> None:
        super().__init__()
        self.item = nn.Embedding(ITEMS, 8)
        self.encoder = (
            nn.TransformerEncoderLayer(8, nhead=2, dim_feedforward=HIDDEN, batch_first=True)
            if encoder == "transformer"
            else nn.GRU(8, 8, batch_first=True)
        )
        self.heads = nn.ModuleDict({task: nn.Linear(8, width) for task, width in widths.items()})

    def forward(self, history: Tensor) -> dict[str, Tensor]:
        encoded = self.encoder(self.item(history))
        states = encoded[0] if isinstance(encoded, tuple) else encoded  # (B, L, 8)
        return {task: head(states.mean(dim=1)) for task, head in self.heads.items()}


class OfKeywords(nn.Module):
    """Features by keyword alone, of which one task reads one more than the others."""

    def __init__(self) -> None:
        super().__init__()
        self.user = nn.Embedding(USERS, 4)
        self.bottom = nn.Linear(4 + 1, HIDDEN)
        self.click = nn.Linear(HIDDEN, 1)
        self.buy = nn.Linear(HIDDEN + 4, 2)
        self.item = nn.Embedding(ITEMS, 4)

    def forward(self, *, user: Tensor, item: Tensor, age: Tensor) -> dict[str, Tensor]:
        h = F.relu(self.bottom(torch.cat([self.user(user), age.unsqueeze(1)], dim=1)))
        return {"click": self.click(h), "buy": self.buy(torch.cat([h, self.item(item)], dim=1))}


class SharedBottomOneHead(nn.Module):
    """All tasks are columns of one last layer, which no concatenation tells apart."""

    def __init__(self, tasks: int) -> None:
        super().__init__()
        self.bottom = Mlp(FEATURES, HIDDEN, HIDDEN)
        self.head = nn.Linear(HIDDEN, tasks)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.head(F.relu(self.bottom(x))))


class Embedded(nn.Module):
    """Named features (B,) made one vector (B, 9): two embeddings and a dense number."""

    width = 9

    def __init__(self) -> None:
        super().__init__()
        self.user = nn.Embedding(USERS, 4)
        self.item = nn.Embedding(ITEMS, 4)

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        dense = features["age"].unsqueeze(1)
        return torch.cat([self.user(features["user"]), self.item(features["item"]), dense], dim=1)


class Extraction(nn.Module):
    """One level of PLE: experts of each task and shared ones, a gate per task, and one over all but in the last."""

    def __init__(
        self, features: int, tasks: int, *, own: int, shared: int, is_last: bool, form: MixtureForm
    ) -> None:
        super().__init__()
        self.form: MixtureForm = form
        self.own = nn.ModuleList(
            nn.ModuleList(Mlp(features, HIDDEN, EXPERT) for _ in range(own)) for _ in range(tasks)
        )
        self.shared = nn.ModuleList(Mlp(features, HIDDEN, EXPERT) for _ in range(shared))
        self.gates = nn.ModuleList(Gate(features, own + shared) for _ in range(tasks))
        self.shared_gate = None if is_last else Gate(features, tasks * own + shared)

    def forward(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """From an input per task and one for the shared experts to the same of the next level."""
        own = [
            [F.relu(expert(x)) for expert in experts]
            for x, experts in zip(inputs[:-1], self.own, strict=True)
        ]
        shared = [F.relu(expert(inputs[-1])) for expert in self.shared]
        outputs = [
            mix(gate(x), [*experts, *shared], self.form)
            for x, experts, gate in zip(inputs[:-1], own, self.gates, strict=True)
        ]
        if self.shared_gate is not None:
            every = [expert for experts in own for expert in experts] + shared
            outputs.append(mix(self.shared_gate(inputs[-1]), every, self.form))
        return outputs


class CgcOfFeatures(nn.Module):
    """CGC over a dict of ids and numbers."""

    def __init__(self, widths: Mapping[str, int]) -> None:
        super().__init__()
        self.embedded = Embedded()
        tasks = len(widths)
        self.level = Extraction(Embedded.width, tasks, own=2, shared=1, is_last=True, form="multiply and sum")
        self.heads = nn.ModuleDict({task: nn.Linear(EXPERT, width) for task, width in widths.items()})

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        x = self.embedded(features)
        outputs = self.level([x] * (len(self.heads) + 1))
        return {task: head(h) for (task, head), h in zip(self.heads.items(), outputs, strict=True)}


class Ple(nn.Module):
    def __init__(self, tasks: int, form: MixtureForm) -> None:
        super().__init__()
        self.levels = nn.ModuleList(
            Extraction(width, tasks, own=1, shared=2, is_last=is_last, form=form)
            for width, is_last in ((FEATURES, False), (EXPERT, True))
        )
        self.heads = nn.ModuleList(Mlp(EXPERT, HIDDEN, 1) for _ in range(tasks))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        inputs: list[Tensor] = [x] * (len(self.heads) + 1)
        for level in self.levels:
            inputs = level(inputs)
        return tuple(head(h) for head, h in zip(self.heads, inputs, strict=True))


class TwoInputs(nn.Module):
    """MMoE over ids (B,) and numbers (B, n) that come as two arguments."""

    def __init__(self, widths: Mapping[str, int]) -> None:
        super().__init__()
        self.user = nn.Embedding(USERS, 3)
        self.core = MmoeCore(widths, 3, "bmm", features=FEATURES + 3)

    def forward(self, user: Tensor, dense: Tensor) -> dict[str, Tensor]:
        return self.core.every_task(torch.cat([self.user(user), dense], dim=1))


class Attention(nn.Module):
    """A task's mask over shared features, from them and what it attended to so far."""

    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__()
        self.mask = nn.Sequential(
            nn.Conv2d(channels_in, 4, kernel_size=1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Conv2d(4, channels, kernel_size=1),
            nn.Sigmoid(),
        )
        self.after = nn.Conv2d(channels, channels, kernel_size=3, padding=1, bias=False)
        self.pool = nn.MaxPool2d(2)

    def forward(self, shared: Tensor, attended: Tensor | None) -> Tensor:
        seen = shared if attended is None else torch.cat([shared, attended], dim=1)
        return self.pool(F.relu(self.after(self.mask(seen) * shared)))


class TaskAttention(nn.Module):
    """Two shared blocks of convolutions; each task attends to both. Masks are sigmoids: there is no gate."""

    def __init__(self, widths: Mapping[str, int]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, 5, kernel_size=3, padding=1), nn.BatchNorm2d(5), nn.ReLU())
            for a in (3, 5)
        )
        self.pool = nn.MaxPool2d(2)
        self.attention = nn.ModuleDict(
            {task: nn.ModuleList([Attention(5, 5), Attention(10, 5)]) for task in widths}
        )
        self.heads = nn.ModuleDict({task: nn.Linear(5, width) for task, width in widths.items()})

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        first = self.blocks[0](images)  # (B, 5, H, W)
        second = self.blocks[1](self.pool(first))  # (B, 5, H/2, W/2)
        found = {}
        for task, head in self.heads.items():
            attended: Tensor | None = None
            for shared, attention in zip((first, second), self.attention[task], strict=True):
                attended = attention(shared, attended)
            assert attended is not None
            found[task] = head(attended.mean(dim=(2, 3)))
        return found


class ImageMmoe(nn.Module):
    """Experts are convolutions; their mixture is a feature map; K differs between the tasks."""

    def __init__(self, widths: Mapping[str, int]) -> None:
        super().__init__()
        self.shared = nn.ModuleList(self._expert() for _ in range(2))
        self.own = nn.ModuleDict(
            {
                task: nn.ModuleList(self._expert() for _ in range(1 + index))
                for index, task in enumerate(widths)
            }
        )
        self.gates = nn.ModuleDict(
            {task: Gate(3 * SIDE * SIDE, 3 + index) for index, task in enumerate(widths)}
        )
        self.heads = nn.ModuleDict({task: nn.Linear(4, width) for task, width in widths.items()})

    def _expert(self) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 4, kernel_size=3, stride=2, bias=False), nn.BatchNorm2d(4), nn.ReLU()
        )

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        shared = [expert(images) for expert in self.shared]
        found = {}
        for task, head in self.heads.items():
            experts = [*shared, *(expert(images) for expert in self.own[task])]
            mixed = mix(self.gates[task](images.flatten(1)), experts, "experts first")  # (B, 4, H, W)
            found[task] = head(F.adaptive_avg_pool2d(mixed, 1).flatten(1))
        return found


class CrossStitch(nn.Module):
    """A network per task; after each layer every task takes a learned combination of all."""

    def __init__(self, tasks: int, layers: int) -> None:
        super().__init__()
        widths = [FEATURES] + [HIDDEN] * layers
        self.layers = nn.ModuleList(
            nn.ModuleList(nn.Linear(a, b) for _ in range(tasks)) for a, b in pairwise(widths)
        )
        self.stitches = nn.Parameter(torch.eye(tasks).repeat(layers, 1, 1) * 0.8 + 0.1)  # (layers, T, T)
        self.heads = nn.ModuleList(nn.Linear(HIDDEN, 2) for _ in range(tasks))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        states = [x] * len(self.heads)
        for level, layers in enumerate(self.layers):
            before = [F.relu(layer(state)) for layer, state in zip(layers, states, strict=True)]
            stacked = torch.stack(before)  # (T, B, D)
            states = list(torch.einsum("st,tbd->sbd", self.stitches[level], stacked).unbind(0))
        return {
            f"task_{index}": head(state)
            for index, (head, state) in enumerate(zip(self.heads, states, strict=True))
        }


def as_if_trained(module: nn.Module, seed: int) -> nn.Module:
    """In eval mode, with running statistics and affine parameters that are not the trivial ones."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
                for tensor, low in (
                    (part.running_mean, -0.3),
                    (part.running_var, 0.6),
                    (part.weight, 0.7),
                    (part.bias, -0.3),
                ):
                    assert tensor is not None
                    tensor.copy_(torch.rand(tensor.shape, generator=generator) * 0.6 + low)
    return module.eval()


def vectors(rows: int, seed: int) -> Tensor:
    return torch.randn(rows, FEATURES, generator=torch.Generator().manual_seed(seed))


def images(rows: int, seed: int) -> Tensor:
    return torch.randn(rows, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def named_features(rows: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "user": torch.randint(0, USERS, (rows,), generator=generator),
        "item": torch.randint(0, ITEMS, (rows,), generator=generator),
        "age": torch.randn(rows, generator=generator),
    }


def user_and_dense(rows: int, seed: int) -> tuple[Tensor, Tensor]:
    return named_features(rows, seed)["user"], vectors(rows, seed)


def histories(rows: int, seed: int) -> Tensor:
    return torch.randint(0, ITEMS, (rows, 5), generator=torch.Generator().manual_seed(seed))


WIDTHS = MappingProxyType({"click": 1, "buy": 2, "rating": 5})
CLASSES = MappingProxyType({"genre": 3, "mood": 4})
BINARY = MappingProxyType({"click": 1, "buy": 1, "refund": 1})
TASKS = tuple(WIDTHS)


def _call_all(names: Sequence[str] = TASKS) -> Call:
    """The forward gives every task, as a dict, a tuple or columns."""

    def call(module: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
        output = module(*inputs) if isinstance(inputs, tuple) else module(inputs)
        if isinstance(output, dict):
            return output
        if isinstance(output, Tensor):
            return {task: output[:, index : index + 1] for index, task in enumerate(names)}
        return dict(zip(names, output, strict=True))

    return call


def _call_by_id(module: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    outputs = {task: module(inputs, index) for index, task in enumerate(TASKS)}
    return {task: out[0] if isinstance(out, tuple) else out for task, out in outputs.items()}


def _call_by_name(module: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    return {task: module(inputs, task) for task in TASKS}


def _mmoe(
    kind: type[MmoeCore],
    form: MixtureForm,
    seed: int,
    *,
    call: Call | None = None,
    make_gate: Callable[[int, int], nn.Module] = Gate,
    widths: Mapping[str, int] = WIDTHS,
    experts: int = 4,
    may_stay_hidden: bool = False,
) -> RewrittenModel:
    torch.manual_seed(seed)
    names = tuple(widths)
    return RewrittenModel(
        as_if_trained(kind(widths, experts, form, make_gate), seed),
        vectors,
        names,
        call or _call_all(names),
        gates={task: f"gates.{task}" for task in names},
        experts=dict.fromkeys(names, experts),
        gates_may_stay_hidden=may_stay_hidden,
    )


def _warm_gate(features: int, experts: int) -> nn.Module:
    return Gate(features, experts, temperature=0.5, axis=1)


def _plain(
    module: nn.Module, make_rows: Callable[[int, int], Inputs], names: tuple[str, ...], seed: int
) -> RewrittenModel:
    return RewrittenModel(as_if_trained(module, seed), make_rows, names, _call_all(names))


def _shared_bottom() -> RewrittenModel:
    torch.manual_seed(20)
    return _plain(SharedBottom(3), vectors, tuple(BINARY), 20)


def _one_head() -> RewrittenModel:
    torch.manual_seed(21)
    return _plain(SharedBottomOneHead(3), vectors, tuple(BINARY), 21)


def _cgc() -> RewrittenModel:
    torch.manual_seed(22)
    return RewrittenModel(
        as_if_trained(CgcOfFeatures(WIDTHS), 22),
        named_features,
        TASKS,
        _call_all(),
        gates={task: f"level.gates.{index}" for index, task in enumerate(TASKS)},
        experts=dict.fromkeys(TASKS, 3),
    )


def _ple() -> RewrittenModel:
    torch.manual_seed(23)
    return RewrittenModel(
        as_if_trained(Ple(3, "einsum"), 23),
        vectors,
        TASKS,
        _call_all(),
        gates={task: f"levels.1.gates.{index}" for index, task in enumerate(TASKS)},
        experts=dict.fromkeys(TASKS, 3),
    )


def _two_inputs() -> RewrittenModel:
    torch.manual_seed(24)
    return RewrittenModel(
        as_if_trained(TwoInputs(WIDTHS), 24),
        user_and_dense,
        TASKS,
        _call_all(),
        gates={task: f"core.gates.{task}" for task in TASKS},
        experts=dict.fromkeys(TASKS, 3),
    )


def _attention() -> RewrittenModel:
    torch.manual_seed(25)
    return _plain(TaskAttention(WIDTHS), images, TASKS, 25)


def _image_mmoe() -> RewrittenModel:
    torch.manual_seed(26)
    return RewrittenModel(
        as_if_trained(ImageMmoe(WIDTHS), 26),
        images,
        TASKS,
        _call_all(),
        gates={task: f"gates.{task}" for task in TASKS},
        experts={task: 3 + index for index, task in enumerate(TASKS)},
    )


def _cross_stitch() -> RewrittenModel:
    torch.manual_seed(27)
    return _plain(CrossStitch(3, 2), vectors, ("task_0", "task_1", "task_2"), 27)


def _batched_mmoe() -> RewrittenModel:
    torch.manual_seed(28)
    return RewrittenModel(
        as_if_trained(BatchedMmoe(WIDTHS, 4), 28),
        vectors,
        TASKS,
        _call_all(),
        gates={task: f"gates.{task}" for task in TASKS},
        experts=dict.fromkeys(TASKS, 4),
    )


def _no_gates() -> RewrittenModel:
    torch.manual_seed(29)
    return _plain(SoftmaxesThatAreNoGates(CLASSES), histories, tuple(CLASSES), 29)


def _flat_answers() -> RewrittenModel:
    torch.manual_seed(30)
    return _plain(FlatAnswers(3), vectors, tuple(BINARY), 30)


def _dense_predictions() -> RewrittenModel:
    torch.manual_seed(31)
    return _plain(DensePredictions(CLASSES), images, tuple(CLASSES), 31)


def _one_gate() -> RewrittenModel:
    torch.manual_seed(32)
    return RewrittenModel(
        as_if_trained(OneGate(WIDTHS, 3), 32),
        vectors,
        TASKS,
        _call_all(),
        gates=dict.fromkeys(TASKS, "gate"),
        experts=dict.fromkeys(TASKS, 3),
    )


def _history(encoder: Literal["transformer", "gru"]) -> RewrittenModel:
    torch.manual_seed(33)
    return _plain(EncodesAHistory(CLASSES, encoder), histories, tuple(CLASSES), 33)


def _of_keywords() -> RewrittenModel:
    torch.manual_seed(34)

    def call(module: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
        assert isinstance(inputs, dict)
        output: dict[str, Tensor] = module(**inputs)
        return output

    return RewrittenModel(as_if_trained(OfKeywords(), 34), named_features, ("click", "buy"), call)


REWRITTEN_MODELS: Mapping[str, Callable[[], RewrittenModel]] = MappingProxyType(
    {
        "mmoe to a dict": lambda: _mmoe(MmoeToDict, "multiply and sum", 1),
        "mmoe to a tuple": lambda: _mmoe(MmoeToTuple, "einsum", 2),
        "mmoe to columns": lambda: _mmoe(MmoeToColumns, "matmul", 3, widths=BINARY),
        "mmoe by task id": lambda: _mmoe(MmoeByTaskId, "bmm", 4, call=_call_by_id),
        "mmoe by task name": lambda: _mmoe(
            MmoeByTaskName, "multiply and sum", 5, call=_call_by_name, make_gate=_warm_gate
        ),
        "mmoe with aux": lambda: _mmoe(MmoeWithAux, "experts first", 6, call=_call_by_id),
        "mmoe with an optional task": lambda: _mmoe(MmoeWithOptionalTask, "einsum", 7),
        "mmoe column by column": lambda: _mmoe(MmoeToDict, "columns", 8, may_stay_hidden=True),
        "mmoe of two experts at a time": lambda: _mmoe(
            MmoeToDict, "multiply and sum", 9, make_gate=TopGate, may_stay_hidden=True
        ),
        "mmoe without a softmax": lambda: _mmoe(
            MmoeToDict, "multiply and sum", 10, make_gate=NormalizedGate, may_stay_hidden=True
        ),
        "shared bottom": _shared_bottom,
        "shared bottom with one head": _one_head,
        "cgc of features": _cgc,
        "ple": _ple,
        "mmoe of two inputs": _two_inputs,
        "task attention": _attention,
        "mmoe of images": _image_mmoe,
        "cross-stitch": _cross_stitch,
        "mmoe with batched experts": _batched_mmoe,
        "softmaxes that are no gates": _no_gates,
        "flat answers": _flat_answers,
        "dense predictions": _dense_predictions,
        "one gate for all": _one_gate,
        "transformer of a history": lambda: _history("transformer"),
        "gru of a history": lambda: _history("gru"),
        "features by keyword": _of_keywords,
    }
)
