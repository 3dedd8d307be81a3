"""The oracle is the module in float64, without a float64 copy of the module."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from te_export.models.exportable import ExportableModel
from te_export.verify.oracle import evaluate_float32, evaluate_float64


def rows(count: int, width: int, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(3)) * scale


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e3])
def test_it_is_the_double_module_to_the_last_bit(scale: float, exportable: ExportableModel) -> None:
    x = rows(37, 20, scale)
    with torch.no_grad():
        expected = copy.deepcopy(exportable.module).double()(x.double())

    found = evaluate_float64(exportable.module, x)

    assert len(found) == 7
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float64
        assert torch.equal(one, other)


def test_the_module_stays_in_float32_bit_for_bit(exportable: ExportableModel) -> None:
    before = {name: value.clone() for name, value in exportable.module.state_dict().items()}
    address = {name: value.data_ptr() for name, value in exportable.module.state_dict().items()}

    evaluate_float64(exportable.module, rows(3, 20))

    for name, value in exportable.module.state_dict().items():
        assert value.dtype == torch.float32
        assert value.data_ptr() == address[name]
        assert torch.equal(value, before[name])


def test_float32_afterwards_is_not_touched_by_the_mode(exportable: ExportableModel) -> None:
    x = rows(3, 20)

    before = evaluate_float32(exportable.module, x)
    evaluate_float64(exportable.module, x)

    for one, other in zip(evaluate_float32(exportable.module, x), before, strict=True):
        assert one.dtype == torch.float32
        assert torch.equal(one, other)


def test_the_mode_ends_with_an_error_inside(exportable: ExportableModel) -> None:
    with pytest.raises(RuntimeError, match="shape"):
        evaluate_float64(exportable.module, rows(3, 19))

    assert (torch.ones(1) + torch.ones(1, dtype=torch.float64)).dtype == torch.float64
    assert F.linear(torch.ones(1, 1), torch.ones(1, 1)).dtype == torch.float32


class WithOtherOperators(nn.Module):
    """Operators that other families use; each mixes float64 rows with float32 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 2, 3)
        self.norm = nn.LayerNorm(18)
        self.embedding = nn.Embedding(5, 18)
        self.scale = nn.Parameter(torch.full((18,), 0.1))
        self.register_buffer("ids", torch.tensor([1, 4]))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        h = self.norm(self.conv(x.unsqueeze(1)))
        mixed = torch.einsum("bcd,d->bcd", h, self.scale) + self.embedding(self.ids)
        return (torch.cat([mixed, self.scale.expand(len(x), 1, 18)], dim=1),)


def test_it_widens_every_operator_and_leaves_integers_alone() -> None:
    torch.manual_seed(0)
    module = WithOtherOperators().eval()
    x = rows(5, 20)
    with torch.no_grad():
        (expected,) = copy.deepcopy(module).double()(x.double())

    (found,) = evaluate_float64(module, x)

    torch.testing.assert_close(found, expected, rtol=0, atol=1e-15)


class KeepsFloat32(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x * 2, x.float()


def test_a_part_that_does_not_run_in_float64_is_an_error() -> None:
    with pytest.raises(RuntimeError, match=r"output 1 of the oracle is torch\.float32, expected float64"):
        evaluate_float64(KeepsFloat32(), rows(2, 3))


@pytest.mark.parametrize("count", [1, 63, 64, 65, 130])
def test_float32_keeps_every_row_in_order(count: int, exportable: ExportableModel) -> None:
    x = rows(count, 20)

    found = evaluate_float32(exportable.module, x)

    expected = evaluate_float64(exportable.module, x)
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        assert one.dtype == torch.float32
        # A few units in the last place of sums of up to 48 products of order 1; a row out of place is off by 1.
        torch.testing.assert_close(one.double(), other, rtol=0, atol=1e-4)
