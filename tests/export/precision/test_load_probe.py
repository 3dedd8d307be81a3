"""A graph that ends the process which loads it, as onnxruntime's float16 fusions can."""

from __future__ import annotations

import signal
from pathlib import Path

import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

import te_export
from te_export.precision import load_probe
from te_export.precision.load_probe import check_load_is_survived, holds_float16
from te_runtime.errors import BundleError


class Encoder(nn.Module):
    """onnxruntime 1.31 ended the process that loaded its float16 form."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, activation="gelu")
        self.click = nn.Linear(16, 2)
        self.buy = nn.Linear(16, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = self.layer(x).mean(1)
        return {"click": self.click(features), "buy": self.buy(features)}


def test_an_export_survives_what_onnxruntime_does_not(tmp_path: Path) -> None:
    torch.manual_seed(0)
    result = te_export.export(
        Encoder().eval(),
        tmp_path / "out",
        te_export.ExportOptions(precisions=("fp32", "fp16")),
        example_inputs=torch.randn(4, 6, 16),
    )
    built = [variant.precision for variant in result.manifest.variants]
    assert built[0] == "fp32"
    told = " ".join(map(str, result.failed_variants))
    assert "fp16" in built or "onnxruntime ends the process that loads" in told, told
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_signal_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_probe, "_LOAD", f"import os; os.kill(os.getpid(), {int(signal.SIGSEGV)})")
    with pytest.raises(BundleError, match=r"ends the process that loads graph\.onnx, with SIGSEGV"):
        check_load_is_survived(tmp_path / "graph.onnx")


def test_what_is_merely_refused_is_left_to_who_loads_it(tmp_path: Path) -> None:
    (tmp_path / "graph.onnx").write_bytes(b"no graph")
    check_load_is_survived(tmp_path / "graph.onnx")


@pytest.mark.parametrize("dtype", [ir.DataType.FLOAT16, ir.DataType.FLOAT])
def test_float16_is_seen_between_nodes(dtype: ir.DataType) -> None:
    x = ir.Value(name="x", shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.FLOAT))
    cast = ir.node("Cast", [x], attributes={"to": int(dtype)})
    cast.outputs[0].dtype = dtype
    graph = ir.Graph([x], cast.outputs, nodes=[cast], opset_imports={"": 21})
    assert holds_float16(ir.Model(graph, ir_version=10)) == (dtype == ir.DataType.FLOAT16)
