"""The oracle is the module in float64, without a float64 copy of the module."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from te_export.models.exportable import ExportableModel
from te_export.models.input_rows import InputRows
from te_export.verify.batches import BATCH_SIZES, plan_batches
from te_export.verify.oracle import (
    UNIT_ROUNDOFF,
    evaluate_float32,
    evaluate_float64,
    evaluate_with_rounding_noise,
)
from te_export.verify.references import References


def rows(count: int, width: int, scale: float = 1.0) -> InputRows:
    x = torch.randn(count, width, generator=torch.Generator().manual_seed(3)) * scale
    return InputRows({"x": x.numpy()})


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e3])
def test_it_is_the_double_module_to_the_last_bit(scale: float, exportable: ExportableModel) -> None:
    x = rows(37, 20, scale)
    with torch.no_grad():
        expected = copy.deepcopy(exportable.module).double()(*(tensor.double() for tensor in x.tensors()))

    found = evaluate_float64(exportable.module, x)

    assert len(found) == 7
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == np.float64
        assert np.array_equal(one, other.numpy())


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

    before = evaluate_float32(exportable.module, x, plan_batches(3))
    evaluate_float64(exportable.module, x)
    evaluate_with_rounding_noise(exportable.module, x, seed=1)

    for one, other in zip(evaluate_float32(exportable.module, x, plan_batches(3)), before, strict=True):
        assert one.dtype == np.float32
        assert np.array_equal(one, other)


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
        (expected,) = copy.deepcopy(module).double()(*(tensor.double() for tensor in x.tensors()))

    (found,) = evaluate_float64(module, x)

    np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=1e-15)


class KeepsFloat32(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x * 2, x.float()


def test_a_part_that_does_not_run_in_float64_is_an_error() -> None:
    with pytest.raises(RuntimeError, match=r"output 1 of the oracle is torch\.float32, expected float64"):
        evaluate_float64(KeepsFloat32(), rows(2, 3))


@pytest.mark.parametrize("count", [1, 63, 64, 65, 130])
def test_float32_keeps_every_row_in_its_place(count: int, exportable: ExportableModel) -> None:
    x = rows(count, 20)
    planned = plan_batches(count)

    found = evaluate_float32(exportable.module, x, planned)

    indices = np.concatenate(planned)
    for one, other in zip(found, evaluate_float64(exportable.module, x), strict=True):
        assert one.dtype == np.float32
        assert one.shape == (len(indices), *other.shape[1:])
        # A few units in the last place of sums of up to 48 products of order 1; a row out of place is off by 1.
        np.testing.assert_allclose(one, other[indices], rtol=0, atol=1e-4)


@pytest.mark.parametrize("count", [1, 2, 6, 64, 65, 520])
def test_batches_hold_every_row_once_and_then_all_small_sizes(count: int) -> None:
    planned = plan_batches(count)

    whole = -(-count // 64)
    assert np.concatenate(planned[:whole]).tolist() == list(range(count))
    assert [len(batch) for batch in planned[whole:]] == [1] * 8 + [2] * 8 + [7] * 8
    assert set(BATCH_SIZES) == {64, 1, 2, 7}
    for batch in planned[whole:]:
        assert batch.min() >= 0
        assert batch.max() < count


@pytest.mark.parametrize("size", [1, 2, 7])
def test_batches_of_small_sizes_reach_every_group(size: int, references: References) -> None:
    batches = [batch for batch in plan_batches(len(references.rows)) if len(batch) == size]
    reached = np.concatenate(batches)

    for group, start, stop in references.rows.groups:
        assert ((reached >= start) & (reached < stop)).any(), group


def test_rounding_noise_is_of_the_size_of_torchs_own_rounding(
    exportable: ExportableModel, references: References
) -> None:
    x = references.rows.x[:320]
    oracle = evaluate_float64(exportable.module, x)
    noisy = evaluate_with_rounding_noise(exportable.module, x, seed=1)
    single = evaluate_float32(exportable.module, x, [np.arange(320)])

    for exact, noise, torchs in zip(oracle, noisy, single, strict=True):
        simulated = np.sqrt(np.mean((noise - exact) ** 2))
        real = np.sqrt(np.mean((torchs - exact) ** 2))
        assert real / 4 < simulated < real * 4


def test_rounding_noise_is_repeatable_and_differs_between_seeds(exportable: ExportableModel) -> None:
    x = rows(5, 20)

    first, again, other = (evaluate_with_rounding_noise(exportable.module, x, seed) for seed in (1, 1, 2))

    assert all(np.array_equal(one, two) for one, two in zip(first, again, strict=True))
    assert not any(np.array_equal(one, two) for one, two in zip(first, other, strict=True))


def test_rounding_noise_never_comes_near_a_real_difference(exportable: ExportableModel) -> None:
    x = rows(64, 20)

    for exact, noisy in zip(
        evaluate_float64(exportable.module, x),
        evaluate_with_rounding_noise(exportable.module, x, 3),
        strict=True,
    ):
        assert 0 < np.abs(noisy - exact).max() < 1000 * UNIT_ROUNDOFF * np.abs(exact).max()


class AsksForFloat32(nn.Module):
    """As traces do where a module's author wrote dtype=torch.float32 or .float()."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        aten = torch.ops.aten
        weights = aten.softmax.int(x, 1, torch.float32)
        copied = aten._to_copy.default(x, dtype=torch.float32)
        return weights, copied, aten.sum.dim_IntList(x, [1], True, dtype=torch.float32)


def test_a_module_that_asks_for_float32_is_widened_all_the_same() -> None:
    x = rows(5, 4)
    with torch.no_grad():
        expected = x.tensors()[0].double().softmax(1).numpy()

    found = evaluate_float64(AsksForFloat32(), x)

    assert [output.dtype for output in found] == [np.float64] * 3
    assert np.array_equal(found[0], expected)
