"""Modules that compute or answer in other floats than float32: what a graph cannot do is refused, the rest is cast."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import te_runtime
from te_export import export
from te_export.errors import CaptureError
from te_export.modules.trace import Traced

TraceModule = Callable[..., Traced]
HALF_STEP = 2.0**-10
"""Of float16 numbers below two."""


class TwoHeads(nn.Module):
    """Its layers may stand under autocast, and `casts` is what is done to one of its answers."""

    def __init__(
        self,
        *,
        autocast: torch.dtype | None = None,
        normalizes: bool = False,
        casts: Callable[[Tensor], Tensor] = torch.Tensor.float,
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.bottom = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6) if normalizes else nn.ReLU())
        self.click, self.buy = nn.Linear(6, 1), nn.Linear(6, 2)
        self.autocast, self.casts = autocast, casts

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", self.autocast or torch.bfloat16, enabled=self.autocast is not None):
            h = self.bottom(x)
            click, buy = self.click(h), self.buy(h)
        return self.casts(click), buy.float()


@pytest.mark.parametrize("normalizes", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_layers_under_autocast_are_refused(
    dtype: torch.dtype, normalizes: bool, trace_module: TraceModule
) -> None:
    with pytest.raises(CaptureError, match=rf"computes in {dtype}.*take torch\.autocast"):
        trace_module(TwoHeads(autocast=dtype, normalizes=normalizes).eval(), torch.randn(4, 4))


def test_autocast_that_is_off_is_none(trace_module: TraceModule) -> None:
    trace_module(TwoHeads().eval(), torch.randn(4, 4))


@pytest.mark.parametrize("casts", [torch.Tensor.double, torch.Tensor.half])
def test_answers_in_other_floats_become_float32(casts: Callable[[Tensor], Tensor], tmp_path: Path) -> None:
    module, x = TwoHeads(casts=casts).eval(), torch.rand(5, 4)

    result = export(module, tmp_path / "out", example_inputs=x, task_names=("click", "buy"))

    with te_runtime.load(result.bundle, threads=1) as model, torch.no_grad():
        found = model.predict(x.numpy())
        expected = [answer.float().numpy() for answer in module(x)]
    for task, answer in zip(("click", "buy"), expected, strict=True):
        assert found[task].output.dtype == np.float32
        np.testing.assert_allclose(found[task].output, answer, rtol=0, atol=HALF_STEP)
