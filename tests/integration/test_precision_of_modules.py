"""int8 and int4 of modules that other people wrote: what is large is converted, whatever the rewrites made of it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import te_runtime
from te_export import ExportOptions, ExportResult, export
from te_runtime.manifest import Precision
from te_runtime.plan import Mode

MODES: tuple[Mode, ...] = ("joint", "split", "task")
Check = Callable[..., None]


class InputGates(nn.Module):
    """An MMoE whose gates, with a hidden layer each, read what the experts read."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(128, 192), nn.ReLU(), nn.Linear(192, 128), nn.ReLU()) for _ in range(4)
        )
        self.gates = nn.ModuleList(
            nn.Sequential(nn.Linear(128, 16), nn.ReLU(), nn.Linear(16, 4)) for _ in range(3)
        )
        self.towers = nn.ModuleList(nn.Linear(128, 3) for _ in range(3))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(B, 128) → (B, 3) for each task."""
        experts = torch.stack([expert(x) for expert in self.experts], 1)
        weights = [torch.softmax(gate(x), -1).unsqueeze(-1) for gate in self.gates]
        return {f"task_{t}": tower((weights[t] * experts).sum(1)) for t, tower in enumerate(self.towers)}


class Attention(nn.Module):
    """A transformer layer over a sequence, and a tower for each task that reads every place of it."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(128, 4, 256, dropout=0.0, batch_first=True)
        self.towers = nn.ModuleList(
            nn.Sequential(nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 3)) for _ in range(2)
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(B, 6, 128) → (B, 3) for each task."""
        places = self.encoder(x)
        return {f"task_{t}": tower(places).mean(1) for t, tower in enumerate(self.towers)}


class Lookups(nn.Module):
    """An MMoE over two embedded ids and numbers, with a table that one task alone reads."""

    def __init__(self) -> None:
        super().__init__()
        self.users, self.items = nn.Embedding(5000, 16), nn.Embedding(9000, 16)
        self.own = nn.Embedding(3000, 32)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(36, 64), nn.ReLU()) for _ in range(3))
        self.gates = nn.ModuleList(nn.Linear(36, 3) for _ in range(2))
        self.click, self.buy = nn.Linear(64 + 32, 1), nn.Linear(64, 1)

    def forward(self, ids: Tensor, dense: Tensor) -> dict[str, Tensor]:
        """(B, 2) integers and (B, 4) → (B, 1) for each task."""
        x = torch.cat([self.users(ids[:, 0]), self.items(ids[:, 1]), dense], 1)
        experts = torch.stack([expert(x) for expert in self.experts], 1)
        click, buy = ((torch.softmax(gate(x), -1).unsqueeze(-1) * experts).sum(1) for gate in self.gates)
        return {"click": self.click(torch.cat([click, self.own(ids[:, 0] % 3000)], 1)), "buy": self.buy(buy)}


class BothWays(nn.Module):
    """One square parameter, read as it is stored and transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(128, 128) / 11)
        self.a, self.b = nn.Linear(128, 2), nn.Linear(128, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(B, 6, 128) → (B, 2) for each task."""
        h = torch.tanh(x @ self.w) + torch.tanh(x @ self.w.t())
        return {"a": self.a(h.mean(1)), "b": self.b(h[:, 0])}


class LowRank(nn.Module):
    """Linear layers right after one another, which fold only where that multiplies less."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(512, 64), nn.Linear(64, 512)
        self.a, self.b = nn.Linear(512, 64), nn.Linear(512, 64)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(B, 512) → (B, 64) for each task."""
        h = torch.relu(self.up(self.down(x)))
        return {"a": self.a(h), "b": self.b(h)}


class UsedThrice(nn.Module):
    """One layer at two depths, over places and over rows, for one task and for both."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.a, self.b = nn.Linear(128, 128), nn.Linear(128, 2), nn.Linear(128, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(B, 6, 128) → (B, 2) for each task."""
        h = torch.relu(self.layer(torch.relu(self.layer(x))))
        return {"a": self.a(h.mean(1)), "b": self.b(torch.relu(self.layer(x.mean(1))))}


class Images(nn.Module):
    """A residual block, batch normalizations, pooling, and a task of which one convolution is its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16))
        self.block = nn.Sequential(
            nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1)
        )
        self.own = nn.Conv2d(16, 32, 3, padding=1)
        self.kind, self.box = nn.Linear(16, 5), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(B, 3, 16, 16) → (B, 5) and (B, 4)."""
        h = torch.max_pool2d(torch.relu(self.stem(x)), 2)
        h = torch.relu(h + self.block(h))
        return {"kind": self.kind(h.mean((2, 3))), "box": self.box(torch.relu(self.own(h)).mean((2, 3)))}


LARGE = {f"experts.{expert}.{layer}.weight" for expert in range(4) for layer in (0, 2)}


LAYERS_OVER_PLACES = {
    "encoder.self_attn.in_proj_weight",
    "encoder.self_attn.out_proj.weight",
    "encoder.linear1.weight",
    "encoder.linear2.weight",
    "towers.0.0.weight",
    "towers.1.0.weight",
}


def exported(
    module: nn.Module, x: Tensor, folder: Path, *precisions: Precision, calibrate: bool = False
) -> ExportResult:
    options = ExportOptions(precisions=("fp32", *precisions))
    if calibrate:
        np.savez(folder / "rows.npz", x=x.numpy())
        options = replace(options, calibration_data=folder / "rows.npz", max_accuracy_drop=5.0)
    return export(module, folder / "bundle", options, example_inputs=x[:4])


def check_sizes(result: ExportResult, **most: float) -> None:
    """Each variant takes so much of the fp32 variant's weights at most."""
    sizes = {name: (result.bundle / name / "weights.bin").stat().st_size for name in ("fp32", *most)}
    for precision, share in most.items():
        assert sizes[precision] <= share * sizes["fp32"], precision


@pytest.fixture
def check_answers(load_for_all_tasks: Callable[..., AbstractContextManager[Any]]) -> Check:
    """In every mode each precision gives what the module gives, but for so much of its spread."""

    def check(bundle: Path, module: nn.Module, *inputs: Tensor, **errors: float) -> None:
        expected = module(*inputs)
        for precision, error in errors.items():
            for mode in MODES:
                with load_for_all_tasks(bundle, precision=precision, threads=1, mode=mode) as model:
                    feeds = {spec.name: x.numpy() for spec, x in zip(model.inputs, inputs, strict=True)}
                    answers = model.predict(feeds)
                for task, exact in expected.items():
                    difference = answers[task].output - exact.detach().numpy()
                    allowed = error * exact.std().item()
                    assert np.sqrt((difference**2).mean()) <= allowed, (precision, mode, task)

    return check


def test_experts_beside_gates_that_read_the_same_input_are_converted(
    tmp_path: Path, check_answers: Check
) -> None:
    torch.manual_seed(3)
    module, x = InputGates().eval(), torch.randn(64, 128)

    result = exported(module, x, tmp_path, "int8", "int4")

    assert [set(summary.converted) for summary in result.variants] == [LARGE] * 2
    check_sizes(result, int8=0.35, int4=0.2)
    check_answers(result.bundle, module, x, int8=0.02, int4=0.2)


def test_layers_over_sequences_are_converted(tmp_path: Path, check_answers: Check) -> None:
    torch.manual_seed(4)
    module, x = Attention().eval(), torch.randn(128, 6, 128)

    result = exported(module, x, tmp_path, "int8", "int4")

    assert [set(summary.converted) for summary in result.variants] == [LAYERS_OVER_PLACES] * 2
    assert (result.bundle / "fp32" / "trunk.onnx").is_file()  # it ends in places (B, 6, 128), not in rows
    check_sizes(result, int8=0.4, int4=0.25)
    check_answers(result.bundle, module, x, fp32=1e-5, int8=0.05, int4=0.3)


def test_static_int8_converts_layers_over_sequences(tmp_path: Path, check_answers: Check) -> None:
    torch.manual_seed(4)
    module, x = Attention().eval(), torch.randn(128, 6, 128)

    result = exported(module, x, tmp_path, "int8", calibrate=True)

    (summary,) = result.variants
    assert set(summary.converted) == LAYERS_OVER_PLACES
    check_sizes(result, int8=0.4)
    check_answers(result.bundle, module, x, int8=0.05)


def test_embedding_tables_are_converted(tmp_path: Path, check_answers: Check) -> None:
    torch.manual_seed(5)
    module, ids, dense = Lookups().eval(), torch.randint(0, 5000, (64, 2)), torch.randn(64, 4)
    options = ExportOptions(precisions=("fp32", "int8", "int4"))

    result = export(module, tmp_path / "bundle", options, example_inputs={"ids": ids, "dense": dense})

    tables = {"users.weight", "items.weight", "own.weight"}
    assert [set(summary.converted) for summary in result.variants] == [tables] * 2
    check_sizes(result, int8=0.36, int4=0.25)
    check_answers(result.bundle, module, ids, dense, int8=0.03, int4=0.3)


@pytest.mark.parametrize(
    ("make", "weight", "copies"),
    [(BothWays, "w", 2), (UsedThrice, "layer.weight", 1)],
    ids=str,
)
def test_a_weight_of_several_layers_is_stored_once_each_way_round(
    make: type[nn.Module], weight: str, copies: int, tmp_path: Path, check_answers: Check
) -> None:
    torch.manual_seed(6)
    module, x = make().eval(), torch.randn(64, 6, 128)

    result = exported(module, x, tmp_path, "int8", "int4")

    assert [summary.converted for summary in result.variants] == [(weight,)] * 2
    for precision, size in (("int8", 128 * 128), ("int4", 128 * 128 // 2)):
        stored = (result.bundle / precision / "weights.bin").stat().st_size
        assert stored <= copies * size * 1.25 + 8192
    check_answers(result.bundle, module, x, int8=0.05, int4=0.3)


def test_layers_right_after_one_another_are_both_converted(tmp_path: Path, check_answers: Check) -> None:
    torch.manual_seed(8)
    module, x = LowRank().eval(), torch.randn(64, 512)

    result = exported(module, x, tmp_path, "int8", "int4")

    check_sizes(result, int8=0.35, int4=0.2)
    check_answers(result.bundle, module, x, int8=0.05, int4=0.4)


def test_static_int8_converts_convolutions(tmp_path: Path, check_answers: Check) -> None:
    torch.manual_seed(7)
    module, x = Images(), torch.randn(128, 3, 16, 16)
    with torch.no_grad():
        module(x)  # batch statistics that are not 0 and 1
    module.eval()

    result = exported(module, x, tmp_path, "int8", calibrate=True)

    assert result.manifest.variants[1].form == "static"
    (summary,) = result.variants
    assert set(summary.converted) == {
        "stem.0.weight.folded", "block.0.weight", "block.2.weight", "own.weight",
    }  # fmt: skip
    check_answers(result.bundle, module, x, int8=0.05)
    with te_runtime.load(result.bundle, precision="int8", threads=1) as model:
        together, alone = model.predict(x.numpy()), model.predict(x[5:6].numpy())
    for task, answer in together.items():
        np.testing.assert_allclose(alone[task].output[0], answer.output[5], rtol=1e-5, atol=1e-6)
