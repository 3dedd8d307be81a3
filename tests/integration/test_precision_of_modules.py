"""int8 and int4 of modules that other people wrote: what is large is converted, whatever the rewrites made of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import te_runtime
from te_export import ExportOptions, ExportResult, export
from te_runtime.manifest import Precision


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


LARGE = {f"experts.{expert}.{layer}.weight" for expert in range(4) for layer in (0, 2)}


def exported(module: nn.Module, x: Tensor, precision: Precision, folder: Path) -> ExportResult:
    options = ExportOptions(precisions=("fp32", precision))
    return export(module, folder / "bundle", options, example_inputs=x)


@pytest.mark.parametrize(("precision", "most", "error"), [("int8", 0.35, 0.02), ("int4", 0.2, 0.2)])
def test_experts_beside_gates_that_read_the_same_input_are_converted(
    precision: Precision, most: float, error: float, tmp_path: Path
) -> None:
    torch.manual_seed(3)
    module, x = InputGates().eval(), torch.randn(64, 128)

    result = exported(module, x, precision, tmp_path)

    (summary,) = result.variants
    assert set(summary.converted) == LARGE
    sizes = {name: (result.bundle / name / "weights.bin").stat().st_size for name in ("fp32", precision)}
    assert sizes[precision] <= most * sizes["fp32"]
    expected = module(x)
    for mode in ("joint", "split", "task"):
        with te_runtime.load(result.bundle, precision=precision, threads=1, mode=mode) as model:
            answers = model.predict(x.numpy())
        for task, exact in expected.items():
            difference = answers[task].output - exact.detach().numpy()
            assert np.sqrt((difference**2).mean()) <= error * exact.std().item()
