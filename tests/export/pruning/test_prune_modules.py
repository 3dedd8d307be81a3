"""--prune-experts for modules that nobody knew: whatever form their sum has, experts answer their means in torch as well."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

import te_export
import te_runtime
from te_export.errors import UsageError
from te_export.options import ExportOptions, ExportResult

FEATURES, WIDTH, COUNT, ROWS = 12, 8, 5, 300
HARDLY_USED = {"a": (1, 3), "b": (0,)}
FAR = 14.0
"""Off a gate's bias: softmax leaves e^-14 or about 1e-6 of a share."""
SMALL = 2e-5
"""Of outputs of size one: float32 sums, and weights of 1e-6 that other experts' means take the place of."""

Mix = Callable[[Tensor, Tensor], Tensor]


def multiply_and_sum(scores: Tensor, experts: Tensor) -> Tensor:
    return (F.softmax(scores, -1).unsqueeze(-1) * experts).sum(1)


def batched_product(scores: Tensor, experts: Tensor) -> Tensor:
    return torch.bmm(F.softmax(scores, -1).unsqueeze(1), experts).squeeze(1)


def turned_product(scores: Tensor, experts: Tensor) -> Tensor:
    return (experts.transpose(1, 2) @ F.softmax(scores, -1).unsqueeze(-1)).squeeze(-1)


def by_einsum(scores: Tensor, experts: Tensor) -> Tensor:
    return torch.einsum("bk,bkd->bd", F.softmax(scores, -1), experts)


def looped(scores: Tensor, experts: Tensor) -> Tensor:
    weights = F.softmax(scores, -1)
    total = torch.zeros_like(experts[:, 0])
    for k in range(COUNT):
        total = total + weights[:, k : k + 1] * experts[:, k]
    return total


def chosen(scores: Tensor, experts: Tensor) -> Tensor:
    values, index = scores.topk(2, -1)
    picked = experts.gather(1, index.unsqueeze(-1).expand(-1, -1, experts.shape[-1]))
    return (F.softmax(values, -1).unsqueeze(-1) * picked).sum(1)


def sigmoids(scores: Tensor, experts: Tensor) -> Tensor:
    return (torch.sigmoid(scores).unsqueeze(-1) * experts).sum(1)


FORMS: dict[str, Mix] = {
    form.__name__: form
    for form in (
        multiply_and_sum,
        batched_product,
        turned_product,
        by_einsum,
        looped,
        chosen,
        sigmoids,
    )
}


class Mixture(nn.Module):
    """Two tasks that hardly use some experts; `gone` are experts that answer `means`."""

    def __init__(self, mix: Mix, heads: Sequence[int] = (3, 1)) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.mix = mix
        self.body = nn.Linear(FEATURES, 16)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, WIDTH)) for _ in range(COUNT)
        )
        self.gates = nn.ModuleDict({task: nn.Linear(16, COUNT) for task in HARDLY_USED})
        self.heads = nn.ModuleDict(
            {task: nn.Linear(WIDTH, size) for task, size in zip(HARDLY_USED, heads, strict=True)}
        )
        with torch.no_grad():
            for task, experts in HARDLY_USED.items():
                gate = self.gates[task]
                gate.weight *= 0.3
                gate.bias.zero_()
                gate.bias[list(experts)] = -FAR

    def stacked(self, h: Tensor) -> Tensor:
        return torch.stack([expert(h) for expert in self.experts], 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = torch.relu(self.body(x))
        experts = self.stacked(h)
        return {task: self.heads[task](self.mix(gate(h), experts)) for task, gate in self.gates.items()}


def rows() -> NDArray[np.float32]:
    return np.random.default_rng(8).standard_normal((ROWS, FEATURES)).astype(np.float32)


def pruned(module: nn.Module, folder: Path, **changes: object) -> ExportResult:
    np.savez(folder / "rows.npz", x=rows())
    options = ExportOptions(calibration_data=folder / "rows.npz", prune_experts=1.0, **changes)  # type: ignore[arg-type]
    return te_export.export(module, folder / "bundle", options, example_inputs=rows()[:4])


def with_means(module: Mixture, experts: Sequence[int]) -> dict[str, NDArray[np.float64]]:
    """What the module answers in float64 while these experts answer their means over the even rows."""
    exact = Mixture(module.mix, [head.out_features for head in module.heads.values()]).double().eval()
    exact.load_state_dict(module.state_dict())
    x = torch.from_numpy(rows()).double()
    with torch.no_grad():
        means = exact.stacked(torch.relu(exact.body(x[0::2]))).mean(0)
        for expert in experts:
            exact.experts[expert].register_forward_hook(
                lambda _module, _inputs, output, mean=means[expert]: mean.expand_as(output)
            )
        return {task: output.numpy() for task, output in exact(x).items()}


@pytest.mark.parametrize("name", FORMS)
def test_whatever_form_the_sum_has(name: str, tmp_path: Path) -> None:
    module = Mixture(FORMS[name]).eval()

    result = pruned(module, tmp_path)

    told = {one.task: one for one in result.pruning}
    with te_runtime.load(result.bundle, mode="pruned") as model:
        assert model.verify().ok
        found = model.predict(rows())
    for task, experts in HARDLY_USED.items():
        assert set(experts) <= set(told[task].removed), told[task].reason
        loss = told[task].loss_points
        assert loss is not None
        assert loss <= 1.0
        np.testing.assert_allclose(
            found[task].output, with_means(module, told[task].removed)[task], rtol=0, atol=SMALL
        )
        assert found[task].routing_weights.shape == (ROWS, COUNT)
        graph = onnx.load(result.bundle / f"fp32/pruned-{task}.onnx", load_external_data=False).graph
        names = {tensor.name for tensor in graph.initializer}
        assert not [n for n in names for expert in told[task].removed if n.startswith(f"experts.{expert}.")]


def test_a_mixture_that_is_the_prediction(tmp_path: Path) -> None:
    class Bare(Mixture):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            h = torch.relu(self.body(x))
            return {task: self.mix(gate(h), self.stacked(h)) for task, gate in self.gates.items()}

    result = pruned(Bare(multiply_and_sum).eval(), tmp_path)

    assert {one.task: set(one.removed) >= set(HARDLY_USED[one.task]) for one in result.pruning} == {
        "a": True,
        "b": True,
    }
    with te_runtime.load(result.bundle, mode="pruned") as model:
        assert model.verify().ok


def test_experts_of_a_task_beside_those_of_all(tmp_path: Path) -> None:
    """Own experts and shared ones are stacked apart and joined, as in PLE."""

    class OwnAndShared(Mixture):
        def stacked(self, h: Tensor) -> Tensor:
            own = torch.stack([self.experts[0](h), self.experts[1](h)], 1)
            return torch.cat([own, torch.stack([expert(h) for expert in self.experts[2:]], 1)], 1)

    result = pruned(OwnAndShared(batched_product).eval(), tmp_path)

    for one in result.pruning:
        assert set(HARDLY_USED[one.task]) <= set(one.removed), one.reason
    with te_runtime.load(result.bundle, mode="pruned") as model:
        assert model.verify().ok


class ReadByTheHead(Mixture):
    """The head reads what every expert gives, beside their sum."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = torch.relu(self.body(x))
        features = self.stacked(h)
        return {
            task: self.heads[task](self.mix(gate(h), features) + features.amax(1))
            for task, gate in self.gates.items()
        }


class BesideAResidual(ReadByTheHead):
    """The same of one expert."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = torch.relu(self.body(x))
        features = self.stacked(h)
        return {
            task: self.heads[task](self.mix(gate(h), features) + torch.tanh(features[:, 2]))
            for task, gate in self.gates.items()
        }


class OneLayerForAll(Mixture):
    """The experts are one layer that has weights for each."""

    def __init__(self, mix: Mix) -> None:
        super().__init__(mix)
        self.weight = nn.Parameter(torch.randn(COUNT, 16, WIDTH))

    def stacked(self, h: Tensor) -> Tensor:
        return torch.relu(torch.einsum("bh,khd->bkd", h, self.weight))


class ReadTwice(Mixture):
    """What an expert is made of is read by the gates, too."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = torch.relu(self.body(x))
        features = self.stacked(h)
        read = sum(0.01 * features[:, k].sum(-1, keepdim=True) for k in range(COUNT))
        return {
            task: self.heads[task](self.mix(gate(h) + read * torch.arange(COUNT), features))
            for task, gate in self.gates.items()
        }


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (ReadByTheHead, "what its joined experts make is not their sum by the routing weights"),
        (BesideAResidual, "what its joined experts make is not their sum by the routing weights"),
        (OneLayerForAll, "not joined into one value that only their sum"),
        (ReadTwice, "not joined into one value that only their sum"),
    ],
)
def test_what_cannot_be_taken_apart_is_left_alone_with_the_reason(
    make: type[Mixture], reason: str, tmp_path: Path
) -> None:
    result = pruned(make(multiply_and_sum).eval(), tmp_path)

    assert [one.removed for one in result.pruning] == [(), ()]
    assert all(one.reason and reason in one.reason for one in result.pruning)
    assert all(task.pruned is None for task in result.manifest.variants[0].tasks)


def test_a_task_without_a_gate_is_told(tmp_path: Path) -> None:
    class Uneven(Mixture):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            h = torch.relu(self.body(x))
            features = self.stacked(h)
            mixed = self.heads["a"](self.mix(self.gates["a"](h), features))
            return {"a": mixed, "b": self.heads["b"](features.mean(1))}

    result = pruned(Uneven(multiply_and_sum).eval(), tmp_path)

    told = {one.task: one for one in result.pruning}
    assert set(HARDLY_USED["a"]) <= set(told["a"].removed)
    assert told["b"].reason == "no gate of it was found, so that nothing tells which experts it uses"
    assert told["b"].reason in (result.bundle / "report.md").read_text()
    with te_runtime.load(result.bundle, mode="pruned") as model:
        assert model.verify().ok


def test_a_module_without_gates_is_refused(tmp_path: Path) -> None:
    class Plain(Mixture):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            h = self.stacked(torch.relu(self.body(x))).mean(1)
            return {task: head(h) for task, head in self.heads.items()}

    with pytest.raises(UsageError, match=r"--prune-experts: no gate of any task was found.*leave it out"):
        pruned(Plain(multiply_and_sum).eval(), tmp_path)


@pytest.mark.parametrize("changes", [{"optimize": "none"}, {"provider": "cuda"}, {"standalone": True}])
def test_other_shapes_of_graphs(changes: dict[str, object], tmp_path: Path) -> None:
    result = pruned(Mixture(by_einsum).eval(), tmp_path, **changes)

    for one in result.pruning:
        assert set(HARDLY_USED[one.task]) <= set(one.removed), one.reason
    with te_runtime.load(result.bundle, mode="pruned") as model:
        assert model.verify().ok
