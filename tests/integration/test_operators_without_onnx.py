"""An operator that torch cannot write as ONNX is told by name and line, and what the message says to do works."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal
from torch.nn.utils.parametrize import remove_parametrizations

import te_runtime
from te_export import export
from te_export.errors import CaptureError

SMALL_ERROR = 1e-5
"""Of outputs of size one from two layers of float32 numbers."""


class Rotated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.turn = orthogonal(nn.Linear(4, 4))
        self.click, self.buy = nn.Linear(4, 1), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = torch.tanh(self.turn(x))
        return {"click": self.click(h), "buy": self.buy(h)}


def test_a_parametrization_without_onnx_form_is_told_and_can_be_removed(tmp_path: Path) -> None:
    module, x = Rotated().eval(), torch.randn(5, 4)

    with pytest.raises(CaptureError) as refusal:
        export(module, tmp_path / "out", example_inputs=x)

    message = str(refusal.value)
    assert "torch has no ONNX form of aten.linalg_matrix_exp (test_operators_without_onnx.py:" in message
    assert 'remove_parametrizations(layer, "weight")' in message
    assert not (tmp_path / "out").exists()

    with torch.no_grad():
        expected = module(x)
    remove_parametrizations(module.turn, "weight")
    with te_runtime.load(export(module, tmp_path / "out", example_inputs=x).bundle, threads=1) as model:
        found = model.predict(x.numpy())
    for task, answer in expected.items():
        np.testing.assert_allclose(found[task].output, answer.numpy(), rtol=0, atol=SMALL_ERROR)
