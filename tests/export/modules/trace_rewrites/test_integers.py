"""Integers are divided and taken as indices as torch does, beyond what float32 counts and in two widths."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import te_export
import te_runtime

ROWS = 101


class Hashed(nn.Module):
    """A task for each way of dividing: what comes out chooses a row of a table."""

    constant: Tensor

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(ROWS, 3)
        self.register_buffer("constant", torch.tensor(1000))

    def forward(self, ids: Tensor, divisor: Tensor) -> dict[str, Tensor]:
        quotients = {
            "floor": torch.div(ids, 1000, rounding_mode="floor"),
            "trunc": torch.div(ids, 1000, rounding_mode="trunc"),
            "floor_by_tensor": torch.div(ids, divisor, rounding_mode="floor"),
            "trunc_by_tensor": torch.div(ids, divisor, rounding_mode="trunc"),
            "slashes": ids // 1000,
            "floor_by_int32": torch.div(ids, divisor.int(), rounding_mode="floor"),
            "trunc_by_constant": torch.div(ids.int(), self.constant, rounding_mode="trunc"),
            "of_a_number": (2**40 + 1) // (torch.remainder(ids, 1000) + 1),
            "maximum": torch.maximum(ids, -7 * ids.int()),
            "minimum": torch.minimum(ids * 3, self.constant),
        }
        return {name: self.table(torch.remainder(found, ROWS)) for name, found in quotients.items()}


@pytest.mark.parametrize("sign", [1, -1])
def test_quotients_are_exact(sign: int, tmp_path: Path) -> None:
    module = Hashed()
    rng = np.random.default_rng(0)
    ids = rng.integers(-(2**41), 2**41, 64)
    ids[32:] = rng.integers(-(2**33), 2**33, 32)
    ids[:6] = [0, -1, 999, -999, 1000, -1000]
    inputs = {"ids": torch.from_numpy(ids), "divisor": torch.full((64,), sign * 1000)}

    result = te_export.export(module, tmp_path / "bundle", example_inputs=inputs)

    with te_runtime.load(result.bundle, threads=1) as model, torch.no_grad():
        answers = model.predict({name: tensor.numpy() for name, tensor in inputs.items()})
        for name, wanted in module(**inputs).items():
            np.testing.assert_array_equal(answers[name].output, wanted, err_msg=name)


class TwoWidths(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.head = nn.Linear(5, 12), nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        chosen = (x[:, :2] > 0).int()
        rows = torch.arange(x.shape[0]).unsqueeze(1)
        found: Tensor = self.head(self.layer(x).view(-1, 4, 3)[rows, chosen].sum(1))
        return found


def test_indices_may_be_of_two_widths(tmp_path: Path) -> None:
    module, x = TwoWidths(), torch.randn(6, 5)

    result = te_export.export(module, tmp_path / "bundle", example_inputs=x)

    with te_runtime.load(result.bundle, threads=1) as model, torch.no_grad():
        (answer,) = model.predict(x.numpy()).values()
        np.testing.assert_allclose(answer.output, module(x), rtol=0, atol=1e-6)
