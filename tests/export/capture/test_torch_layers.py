"""What is left of torch's layers once captured: one node each, and no initializer that is no parameter."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from te_export.capture.opset import newest_opset
from te_export.capture.torch_capture import capture
from te_export.models.exportable import ExportableModel, ModelInput, TaskOutput


class Tupled(nn.Module):
    """A module that gives its output in a tuple."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.model(x),)


class Einsum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 6, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bd,kde->bke", x, self.weight)


class Lookup(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.table(x)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(self.conv(x))


def with_zeros() -> nn.Module:
    """A Conv2d whose bias is a parameter, and zero as torch's initializers like to leave it."""
    conv = nn.Conv2d(3, 4, 3)
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
    return conv


IMAGE = (3, 8, 8)
STATISTICS = {"1.weight", "1.bias", "1.running_mean", "1.running_var"}


@pytest.mark.parametrize(
    ("module", "shape", "operators", "parameters"),
    [
        (nn.Conv2d(3, 4, 3), IMAGE, ["Conv"], {"weight", "bias"}),
        (with_zeros(), IMAGE, ["Conv"], {"weight", "bias"}),
        (nn.Conv2d(3, 4, 3, bias=False), IMAGE, ["Conv"], {"weight"}),
        (nn.Conv1d(3, 4, 3, bias=False), (3, 8), ["Conv"], {"weight"}),
        (nn.Conv3d(3, 4, 2, bias=False), (3, 4, 4, 4), ["Conv"], {"weight"}),
        (nn.Conv2d(3, 6, 3, groups=3, padding="same", bias=False), IMAGE, ["Conv"], {"weight"}),
        (nn.ConvTranspose2d(3, 4, 3, bias=False), IMAGE, ["ConvTranspose"], {"weight"}),
        (Twice(), IMAGE, ["Conv", "Conv"], {"conv.weight"}),
        (
            nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True)),
            IMAGE,
            ["Conv", "BatchNormalization", "Relu"],
            {"0.weight", *STATISTICS},
        ),
        (
            nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)),
            (6,),
            ["Gemm", "BatchNormalization"],
            {"0.weight", "0.bias", *STATISTICS},
        ),
        (nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), IMAGE, ["ReduceMean", "Reshape"], set()),
        (nn.Sequential(nn.MaxPool2d(2), nn.Flatten()), IMAGE, ["MaxPool", "Reshape"], set()),
        (Lookup(), (6,), ["Gather"], {"table.weight"}),
        (Einsum(), (6,), ["Einsum"], {"weight"}),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_a_layer_is_captured_as_itself(
    module: nn.Module, shape: tuple[int, ...], operators: list[str], parameters: set[str]
) -> None:
    """A Conv without a bias comes from torch with zeros that five nodes compute of its weight: they are gone."""
    model = ExportableModel(
        family="any",
        config={},
        module=Tupled(module).eval(),
        inputs=(ModelInput("x", "int64" if isinstance(module, Lookup) else "float32", shape),),
        tasks=(TaskOutput("y", output_shape=(), num_experts=None, tail_parameters=frozenset()),),
        expert_features=None,
        trunk_parameters=frozenset(),
        unused_parameters=(),
        notes=(),
    )
    graph = capture(model, newest_opset()).model.graph

    assert [node.op_type for node in graph] == operators
    floats = {
        name
        for name, value in graph.initializers.items()
        if value.const_value is not None and not value.const_value.dtype.is_integer()
    }
    assert floats == parameters
