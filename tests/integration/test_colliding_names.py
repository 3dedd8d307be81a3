"""Parameters called what a graph calls something else: an operator's value, an input, an output."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from te_export import export

NAMES = ("mul", "relu", "mean", "x", "scale", "prediction", "routing_weights")
SMALL_ERROR = 1e-5
"""Of outputs of size one from two layers of float32 numbers."""


class Head(nn.Module):
    """A parameter whose full name is `click.prediction`, the joint graph's name for a task's output."""

    def __init__(self) -> None:
        super().__init__()
        self.prediction = nn.Parameter(torch.randn(4, 1))

    def forward(self, h: Tensor) -> Tensor:
        return h @ self.prediction


class Colliding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name in NAMES:
            self.register_buffer(name, torch.rand(4) + 0.5)
        self.click, self.rating = Head(), nn.Linear(4, 3)

    def forward(self, x: Tensor, scale: Tensor) -> dict[str, Tensor]:
        h = x * scale
        for name in NAMES:
            h = torch.relu(h * self.get_buffer(name)) + 0.1 * h.mean(dim=1, keepdim=True)
        return {"click": self.click(h), "rating": self.rating(h)}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("colliding") / "bundle"
    return export(Colliding().eval(), target, example_inputs=rows(5, 0)).bundle


def rows(count: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(count, 4, generator=generator) for name in ("x", "scale")}


@pytest.mark.parametrize("mode", ["joint", "split", "task"])
def test_each_keeps_its_own_value(
    bundle: Path,
    mode: Literal["joint", "split", "task"],
    load_for_all_tasks: Callable[..., AbstractContextManager[Any]],
) -> None:
    inputs = rows(3, 1)
    with load_for_all_tasks(bundle, mode=mode, threads=1) as model:
        found = model.predict({name: tensor.numpy() for name, tensor in inputs.items()})

    with torch.no_grad():
        expected = Colliding().eval()(**inputs)
    for task, tensor in expected.items():
        np.testing.assert_allclose(found[task].output, tensor.numpy(), rtol=0, atol=SMALL_ERROR)
