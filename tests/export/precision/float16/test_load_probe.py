"""A graph that ends the process which loads it, as onnxruntime's float16 fusions can."""

from __future__ import annotations

import signal
from pathlib import Path

import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

import te_export
from te_export.precision.float16 import load_probe
from te_export.precision.float16.load_probe import check_loads_are_survived, holds_float16
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


def ends_at(number: int) -> str:
    """What loads so many graphs and is ended by the next."""
    return f"""
import os, sys
for index, path in enumerate(sys.argv[1:]):
    print(index, flush=True)
    if index == {number}:
        os.kill(os.getpid(), {int(signal.SIGSEGV)})
"""


@pytest.mark.parametrize(("number", "named"), [(0, "joint"), (2, "task-click")])
def test_the_graph_and_the_signal_are_told(
    number: int, named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load_probe, "_LOAD", ends_at(number))
    paths = [tmp_path / f"{name}.onnx" for name in ("joint", "trunk", "task-click", "tail-click")]
    with pytest.raises(BundleError, match=rf"ends the process that loads {named}\.onnx, with SIGSEGV"):
        check_loads_are_survived(paths)


def test_a_graph_that_only_the_written_variant_has_is_loaded_elsewhere_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The joint graph alone, as it is tried out, loads; the second graph of the variant does not."""
    monkeypatch.setattr(load_probe, "_LOAD", ends_at(1))
    torch.manual_seed(0)

    result = te_export.export(
        nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2)),
        tmp_path / "out",
        te_export.ExportOptions(precisions=("fp32", "fp16"), task_names=("left", "right")),
        example_inputs=torch.randn(4, 16),
    )

    (failed,) = result.failed_variants
    assert failed.reason.startswith("fp16 is left out: onnxruntime ends the process that loads ")
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if path.is_dir()) == ["fp32"]


def test_what_is_merely_refused_is_left_to_who_loads_it(tmp_path: Path) -> None:
    (tmp_path / "graph.onnx").write_bytes(b"no graph")
    check_loads_are_survived([tmp_path / "graph.onnx", tmp_path / "missing.onnx"])


@pytest.mark.parametrize("dtype", [ir.DataType.FLOAT16, ir.DataType.FLOAT])
def test_float16_is_seen_between_nodes(dtype: ir.DataType) -> None:
    x = ir.Value(name="x", shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.FLOAT))
    cast = ir.node("Cast", [x], attributes={"to": int(dtype)})
    cast.outputs[0].dtype = dtype
    graph = ir.Graph([x], cast.outputs, nodes=[cast], opset_imports={"": 21})
    assert holds_float16(ir.Model(graph, ir_version=10)) == (dtype == ir.DataType.FLOAT16)
