"""What benchmarks compare: the reference model R, one or all of its tasks as torch.onnx.export gives them, and a single
layer of as many weight bytes, which is as fast as reading them allows.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
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


class AllTasks(torch.nn.Module):
    """Every task of a model, what they share computed once."""

    def __init__(self, model: TaskExpertModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        tails = self.model.tails(self.model.trunk(x), range(self.model.config.num_tasks))
        return [prediction for prediction, _ in tails]


def make_model(tasks: int, experts: int = 8) -> TaskExpertModel:
    """R with as many tasks and experts, its weights seeded."""
    torch.manual_seed(0)
    outputs = tuple((OUTPUTS * -(-tasks // len(OUTPUTS)))[:tasks])
    config = TaskExpertConfig(num_tasks=tasks, num_experts=experts, task_output_dims=outputs)
    return TaskExpertModel(config).eval()


def export_naive(model: TaskExpertModel, path: Path, *, task: int = 0) -> None:
    """torch.onnx.export of one task, with a dynamic batch axis."""
    _export(OneTask(model, task), model.config.input_dim, path)


def export_all_tasks(model: TaskExpertModel, path: Path) -> None:
    """torch.onnx.export of all tasks as one graph, with a dynamic batch axis."""
    _export(AllTasks(model), model.config.input_dim, path)


def _export(module: torch.nn.Module, input_dim: int, path: Path) -> None:
    batch = torch.export.Dim("batch")
    with quiet_torch():
        torch.onnx.export(
            module.eval(),
            (torch.zeros(2, input_dim),),
            path,
            dynamo=True,
            verbose=False,
            dynamic_shapes=({0: batch},),
        )


@contextmanager
def quiet_torch() -> Iterator[None]:
    """Keeps torch's remarks on its own internals off the screen."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def write_roof(path: Path, weight_bytes: int, *, input_dim: int = INPUT_DIM) -> None:
    """One Gemm whose float32 weight has as many bytes."""
    rows = weight_bytes // 4 // input_dim
    weight = np.random.default_rng(0).standard_normal((rows, input_dim)).astype(np.float32) / 28
    tensors = [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(np.zeros(rows, np.float32), "b")]
    nodes = [helper.make_node("Gemm", ["x", "w", "b"], ["y"], transB=1)]
    model = _model(nodes, tensors, TensorProto.FLOAT, ["batch", rows], input_dim=input_dim)
    path.write_bytes(model.SerializeToString())


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
    nodes: list[NodeProto],
    tensors: list[TensorProto],
    dtype: int,
    shape: list[int | str],
    *,
    input_dim: int = INPUT_DIM,
) -> ModelProto:
    graph = helper.make_graph(
        nodes,
        "roof",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", input_dim])],
        [helper.make_tensor_value_info("y", dtype, shape)],
        tensors,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
