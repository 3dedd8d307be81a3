"""What benchmarks compare: the reference model R, one task of it as torch.onnx.export gives it, and a single layer
of as many weight bytes, which is as fast as reading them allows.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import torch
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from te_export.models.task_expert import TaskExpertConfig, TaskExpertModel

INPUT_DIM = 784
OUTPUTS = (10, 5, 3, 7, 4)


class OneTask(torch.nn.Module):
    """What a person without te-export exports: one task, the first unless told otherwise."""

    def __init__(self, model: TaskExpertModel, task: int = 0) -> None:
        super().__init__()
        self.model = model
        self.task = task

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        prediction: torch.Tensor = self.model(x, self.task)[0]
        return prediction


def make_model(tasks: int) -> TaskExpertModel:
    """R with as many tasks, its weights seeded."""
    torch.manual_seed(0)
    outputs = tuple((OUTPUTS * -(-tasks // len(OUTPUTS)))[:tasks])
    return TaskExpertModel(TaskExpertConfig(num_tasks=tasks, task_output_dims=outputs)).eval()


def export_naive(model: TaskExpertModel, path: Path, *, task: int = 0) -> None:
    """torch.onnx.export of one task, with a dynamic batch axis."""
    batch = torch.export.Dim("batch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            OneTask(model, task).eval(),
            (torch.zeros(2, INPUT_DIM),),
            path,
            dynamo=True,
            verbose=False,
            dynamic_shapes=({0: batch},),
        )


def write_roof(path: Path, weight_bytes: int) -> None:
    """One Gemm whose float32 weight has as many bytes."""
    rows = weight_bytes // 4 // INPUT_DIM
    weight = np.random.default_rng(0).standard_normal((rows, INPUT_DIM)).astype(np.float32) / 28
    tensors = [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(np.zeros(rows, np.float32), "b")]
    nodes = [helper.make_node("Gemm", ["x", "w", "b"], ["y"], transB=1)]
    path.write_bytes(_model(nodes, tensors, TensorProto.FLOAT, ["batch", rows]).SerializeToString())


def write_int8_roof(path: Path, weight_bytes: int) -> None:
    """One convolution of uint8 values whose int8 weight has as many bytes, on rows that are quantized first."""
    rows = weight_bytes // INPUT_DIM
    weight = np.random.default_rng(0).integers(-127, 128, (rows, INPUT_DIM, 1)).astype(np.int8)
    tensors = [
        numpy_helper.from_array(weight, "w"),
        numpy_helper.from_array(np.zeros(rows, np.int32), "b"),
        numpy_helper.from_array(np.array([0]), "axis"),
        numpy_helper.from_array(np.array(0.03, np.float32), "step"),
        numpy_helper.from_array(np.array(128, np.uint8), "zero"),
        numpy_helper.from_array(np.full(rows, 0.001, np.float32), "w.step"),
        numpy_helper.from_array(np.zeros(rows, np.int8), "w.zero"),
    ]
    steps = ["q", "step", "zero", "w", "w.step", "w.zero", "step", "zero", "b"]
    nodes = [
        helper.make_node("Transpose", ["x"], ["turned"], perm=[1, 0]),
        helper.make_node("Unsqueeze", ["turned", "axis"], ["cube"]),
        helper.make_node("QuantizeLinear", ["cube", "step", "zero"], ["q"]),
        helper.make_node("QLinearConv", steps, ["y"], kernel_shape=[1]),
    ]
    path.write_bytes(_model(nodes, tensors, TensorProto.UINT8, [1, rows, "batch"]).SerializeToString())


def _model(
    nodes: list[NodeProto], tensors: list[TensorProto], dtype: int, shape: list[int | str]
) -> ModelProto:
    graph = helper.make_graph(
        nodes,
        "roof",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", INPUT_DIM])],
        [helper.make_tensor_value_info("y", dtype, shape)],
        tensors,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
