"""A batch normalization after a layer becomes part of its weights, where nothing else reads either."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import nn

from te_export.capture.joint_graph import JointGraph, prediction_name
from te_export.capture.opset import newest_opset
from te_export.capture.torch_capture import capture
from te_export.models.exportable import ExportableModel, ModelInput, TaskOutput
from te_export.rewrite.fold_batch_norms import fold_batch_norms
from te_export.rewrite.rewrite import rewrite

Build = Callable[[Any], ir.Graph]

WIDTH = 4 * 3 * 3
"""Of the input of graphs with a Conv: as many values as (4, 9), (4, 3, 3) or (2, 18)."""


def gemm(*, bias: bool = True, turned: bool = False, **kept: float) -> Build:
    def build(net: Any) -> ir.Graph:
        h = net.linear(net.x, 5, "layer", bias=bias, turned=turned)
        return net.ends(y=net.relu(net.norm(h, "norm", **kept)))  # type: ignore[no-any-return]

    return build


def conv(*sizes: int, group: int = 1, bias: bool = True, **kept: float) -> Build:
    def build(net: Any) -> ir.Graph:
        h = net.conv(net.image(4, *sizes), 6, "layer", group=group, bias=bias)
        return net.ends(y=net.relu(net.norm(h, "norm", **kept)))  # type: ignore[no-any-return]

    return build


CASES = {
    "gemm": gemm(),
    "gemm without bias": gemm(bias=False),
    "gemm turned": gemm(turned=True),
    "gemm turned without bias": gemm(turned=True, bias=False),
    "gemm with an epsilon": gemm(epsilon=0.25),
    "conv 1d": conv(9),
    "conv 1d without bias": conv(9, bias=False),
    "conv 1d of 2 groups": conv(9, group=2),
    "conv 2d": conv(3, 3),
    "conv 2d without bias": conv(3, 3, bias=False, epsilon=1e-3),
    "conv 2d of 2 groups": conv(3, 3, group=2),
    "conv 2d of 2 groups without bias": conv(3, 3, group=2, bias=False),
}


@pytest.mark.parametrize("build", CASES.values(), ids=CASES.keys())
def test_the_layer_gives_the_same_without_the_normalization(nets: ModuleType, build: Build) -> None:
    before, graph = build(nets.Net(WIDTH)), build(nets.Net(WIDTH))

    found = fold_batch_norms(graph)

    expected = nets.operators(before)
    del expected["BatchNormalization"]
    assert nets.operators(graph) == expected
    assert [(entry.where, entry.what) for entry in found.applied] == [
        ("layer", "norm after it folded into its weights")
    ]
    assert found.declined == ()
    assert len(_floats(graph)) == 2
    nets.assert_same(before, graph, tolerance=nets.FOLDED)
    nets.assert_settled(fold_batch_norms, graph)


@pytest.mark.parametrize("build", CASES.values(), ids=CASES.keys())
def test_the_new_weights_are_rounded_once(nets: ModuleType, build: Build) -> None:
    before, graph = build(nets.Net(WIDTH)), build(nets.Net(WIDTH))
    fold_batch_norms(graph)

    old, new = _floats(before), _floats(graph)
    (norm,) = (node for node in before if node.op_type == "BatchNormalization")
    (layer,) = (node for node in before if node.name == "layer")
    attribute = norm.attributes.get("epsilon")
    epsilon = 1e-5 if attribute is None else attribute.as_float()
    scale = old["norm.scale"] / np.sqrt(old["norm.var"] + epsilon)
    turned = layer.op_type == "Gemm" and not layer.attributes["transB"].as_int()
    last = np.moveaxis(old["layer.weight"], 1 if turned else 0, -1) * scale
    weight = np.moveaxis(last, -1, 1 if turned else 0)
    bias = (old.get("layer.bias", 0.0) - old["norm.mean"]) * scale + old["norm.shift"]
    np.testing.assert_array_equal(new["layer.weight.folded"], weight.astype(np.float32))
    np.testing.assert_array_equal(new["layer.bias.folded"], bias.astype(np.float32))


@pytest.mark.parametrize("build", [gemm(), gemm(turned=True), conv(3, 3, group=2)])
def test_it_says_whose_place_the_new_weights_took(nets: ModuleType, build: Build) -> None:
    found = fold_batch_norms(build(nets.Net(WIDTH)))

    assert found.sources == {
        "layer.weight.folded": ("layer.weight", "norm.scale", "norm.var"),
        "layer.bias.folded": ("layer.bias", "norm.mean", "norm.shift", "norm.scale", "norm.var"),
    }


def test_a_bias_that_was_not_there_has_no_source(nets: ModuleType) -> None:
    found = fold_batch_norms(gemm(bias=False)(nets.Net(WIDTH)))

    assert found.sources["layer.bias.folded"] == ("norm.mean", "norm.shift", "norm.scale", "norm.var")


def test_what_the_layer_does_otherwise_stays(nets: ModuleType) -> None:
    graph = conv(3, 3, group=2)(nets.Net(WIDTH))
    layer = next(node for node in graph if node.op_type == "Conv")
    layer.attributes["auto_pad"] = ir.AttrString("auto_pad", "VALID")
    layer.attributes["strides"] = ir.AttrInt64s("strides", [2, 1])
    kept = {name: attribute.value for name, attribute in layer.attributes.items()}

    fold_batch_norms(graph)

    assert {name: attribute.value for name, attribute in layer.attributes.items()} == kept


def test_a_normalization_that_is_an_output_leaves_its_name(nets: ModuleType) -> None:
    def build() -> ir.Graph:
        net = nets.Net()
        return net.ends(y=net.norm(net.linear(net.x, 5, "layer"), "norm"))  # type: ignore[no-any-return]

    graph = build()
    fold_batch_norms(graph)

    assert nets.operators(graph) == {"Gemm": 1}
    nets.assert_same(build(), graph, tolerance=nets.FOLDED)


def test_one_normalization_after_another_is_folded_too(nets: ModuleType) -> None:
    def build() -> ir.Graph:
        net = nets.Net(WIDTH)
        once = net.norm(net.conv(net.image(4, 9), 6, "layer"), "norm")
        return net.ends(y=net.norm(once, "again"))  # type: ignore[no-any-return]

    graph = build()
    found = fold_batch_norms(graph)

    assert nets.operators(graph) == {"Reshape": 1, "Conv": 1}
    assert len(found.applied) == 2
    nets.assert_same(build(), graph, tolerance=nets.FOLDED)


def test_layers_with_one_bias_each_get_their_own(nets: ModuleType) -> None:
    def build() -> ir.Graph:
        net = nets.Net()
        shared = net.constant("bias", np.ones(5))
        ends = {}
        for name in ("a", "b"):
            weight = net.constant(f"{name}.weight", net.rng.standard_normal((5, 6)))
            h = net.add("Gemm", [net.x, weight, shared], ["batch", 5], name, transB=1)
            ends[name] = net.relu(net.norm(h, f"{name}.norm"))
        return net.ends(**ends)  # type: ignore[no-any-return]

    graph = build()
    fold_batch_norms(graph)

    assert set(graph.initializers) == {
        f"{name}.{kind}.folded" for name in "ab" for kind in ("weight", "bias")
    }
    nets.assert_same(build(), graph, tolerance=nets.FOLDED)


def leaves_the_graph(net: Any) -> ir.Graph:
    h = net.linear(net.x, 5, "layer")
    return net.ends(h=h, y=net.norm(h, "norm"))


def is_read_elsewhere(net: Any) -> ir.Graph:
    h = net.conv(net.image(4, 9), 5, "layer")
    return net.ends(y=net.norm(h, "norm"), z=net.relu(h))


def is_normalized_twice(net: Any) -> ir.Graph:
    h = net.linear(net.x, 5, "layer")
    return net.ends(y=net.norm(h, "norm"), z=net.norm(h, "other"))


def weight_is_read_elsewhere(net: Any) -> ir.Graph:
    h = net.linear(net.x, 5, "layer")
    other = net.add("Gemm", [net.x, net.constant("layer.weight", ())], ["batch", 5], "other", transB=1)
    return net.ends(y=net.norm(h, "norm"), z=other)


def weight_leaves_the_graph(net: Any) -> ir.Graph:
    graph = net.ends(y=net.norm(net.linear(net.x, 5, "layer"), "norm"))
    graph.outputs.append(graph.initializers["layer.weight"])
    return graph  # type: ignore[no-any-return]


def takes_the_batch(net: Any) -> ir.Graph:
    return net.ends(y=net.norm(net.linear(net.x, 5, "layer"), "norm", training_mode=1))


def gives_its_mean(net: Any) -> ir.Graph:
    graph = takes_the_batch(net)
    norm = list(graph)[-1]
    norm.attributes["training_mode"] = ir.AttrInt64("training_mode", 0)
    norm.resize_outputs(2)
    norm.outputs[1].name = "running"
    net.ends(z=net.relu(norm.outputs[1]))
    return graph


def with_constant(which: str, values: object, dtype: type = np.float32) -> Build:
    """A Gemm and its normalization, one constant of which is replaced."""

    def build(net: Any) -> ir.Graph:
        net.constant(f"norm.{which}", values, dtype)
        return net.ends(y=net.norm(net.linear(net.x, 5, "layer"), "norm"))  # type: ignore[no-any-return]

    return build


def scale_is_computed(net: Any) -> ir.Graph:
    graph = net.ends(y=net.norm(net.linear(net.x, 5, "layer"), "norm"))
    norm = list(graph)[-1]
    norm.replace_input_with(1, net.add("Neg", [norm.inputs[1]], [5], "computed"))
    return graph  # type: ignore[no-any-return]


def scale_may_be_replaced(net: Any) -> ir.Graph:
    graph = net.ends(y=net.norm(net.linear(net.x, 5, "layer"), "norm"))
    graph.inputs.append(graph.initializers["norm.scale"])
    return graph  # type: ignore[no-any-return]


def has_alpha(net: Any) -> ir.Graph:
    return net.ends(y=net.norm(net.linear(net.x, 5, "layer", alpha=0.5), "norm"))


def weight_is_computed(net: Any) -> ir.Graph:
    weight = net.add("Neg", [net.constant("w", np.ones((5, 4, 2)))], [5, 4, 2], "computed")
    return net.ends(y=net.norm(net.add("Conv", [net.image(4, 9), weight], ["batch", 5, 8], "layer"), "norm"))


def weight_is_float16(net: Any) -> ir.Graph:
    weight = net.constant("w", np.ones((5, 4, 2)), np.float16)
    return net.ends(y=net.norm(net.add("Conv", [net.image(4, 9), weight], ["batch", 5, 8], "layer"), "norm"))


def gemm_bias_is_a_matrix(net: Any) -> ir.Graph:
    weight, bias = net.constant("w", np.ones((5, WIDTH))), net.constant("b", np.ones((1, 5)))
    return net.ends(
        y=net.norm(net.add("Gemm", [net.x, weight, bias], ["batch", 5], "layer", transB=1), "norm")
    )


def conv_bias_is_one_value(net: Any) -> ir.Graph:
    weight, bias = net.constant("w", np.ones((5, 4, 2))), net.constant("b", np.ones(1))
    h = net.add("Conv", [net.image(4, 9), weight, bias], ["batch", 5, 8], "layer")
    return net.ends(y=net.norm(h, "norm"))


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (leaves_the_graph, "its output h leaves the graph"),
        (is_read_elsewhere, "its output is also read by relu_3"),
        (is_normalized_twice, "its output is also read by other"),
        (
            weight_is_read_elsewhere,
            "its weight layer.weight is also read by other, so the folded one would be a",
        ),
        (weight_leaves_the_graph, "its weight layer.weight leaves the graph"),
        (takes_the_batch, "norm after it cannot be folded: it takes mean and variance from the batch"),
        (gives_its_mean, "norm after it cannot be folded: its running mean or variance is read"),
        (scale_is_computed, "its scale is not a float32 constant of 5 values"),
        (scale_may_be_replaced, "its scale is not a float32 constant of 5 values"),
        (with_constant("shift", [1.0]), "its bias is not a float32 constant of 5 values"),
        (with_constant("mean", np.zeros((5, 1))), "its mean is not a float32 constant of 5 values"),
        (with_constant("var", np.ones(5), np.float64), "its variance is not a float32 constant of 5 values"),
        (with_constant("var", [-1.0, 1, 1, 1, 1]), "its weights are not finite in float32"),
        (with_constant("scale", [3e38] * 5), "its weights are not finite in float32"),
        (with_constant("mean", [np.inf] * 5), "its weights are not finite in float32"),
        (has_alpha, "its alpha or beta is not 1"),
        (weight_is_computed, "its weight is not a float32 constant"),
        (weight_is_float16, "its weight is not a float32 constant"),
        (gemm_bias_is_a_matrix, "its bias is not a float32 constant of one value per output"),
        (conv_bias_is_one_value, "its bias is not a float32 constant of one value per output"),
    ],
)
def test_it_declines_by_name_and_changes_nothing(nets: ModuleType, build: Build, reason: str) -> None:
    graph = build(nets.Net(WIDTH))
    before = _bytes(graph)

    found = fold_batch_norms(graph)

    assert found.applied == ()
    assert found.sources == {}
    assert {entry.where for entry in found.declined} == {"layer"}
    assert reason in found.declined[0].reason
    assert _bytes(graph) == before


def after_an_activation(net: Any) -> ir.Graph:
    return net.ends(y=net.norm(net.relu(net.linear(net.x, 5, "layer")), "norm"))


def after_a_concat(net: Any) -> ir.Graph:
    pieces = [net.linear(net.x, 5, f"layer_{index}") for index in range(2)]
    return net.ends(y=net.norm(net.add("Concat", pieces, ["batch", 10], "join", axis=1), "norm"))


def after_the_input(net: Any) -> ir.Graph:
    return net.ends(y=net.norm(net.x, "norm"))


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (
            after_an_activation,
            "it normalizes what relu_1 gives, a Relu, expected what a Gemm or a Conv gives",
        ),
        (after_a_concat, "it normalizes what join gives, a Concat"),
        (after_the_input, "it normalizes no node's output"),
    ],
)
def test_a_normalization_that_follows_no_layer_stays(nets: ModuleType, build: Build, reason: str) -> None:
    graph = build(nets.Net())
    before = _bytes(graph)

    found = fold_batch_norms(graph)

    assert found.applied == ()
    assert [entry.where for entry in found.declined] == ["norm"]
    assert reason in found.declined[0].reason
    assert _bytes(graph) == before


def test_a_layer_without_a_normalization_is_no_match(nets: ModuleType) -> None:
    net = nets.Net()

    assert fold_batch_norms(net.ends(y=net.linear(net.x, 5, "layer"))) == fold_batch_norms(nets.Net().ends())


def test_it_comes_before_linear_layers_are_folded_and_stacked(nets: ModuleType) -> None:
    def build() -> ir.Graph:
        net = nets.Net()
        h = net.norm(net.linear(net.x, 8, "first"), "norm")
        ends = [net.norm(net.linear(h, width, f"last_{width}"), f"norm_{width}") for width in (2, 3)]
        return net.ends(y=net.add("Concat", ends, ["batch", 5], "join", axis=1))  # type: ignore[no-any-return]

    captured = JointGraph(ir.Model(build(), ir_version=10), tasks=(), opset=21)
    once = rewrite(captured, provider="cpu", level="exact")
    twice = rewrite(once.graph, provider="cpu", level="exact")

    rules = [entry.rule for entry in once.log.applied]
    assert rules == ["fold_batch_norms"] * 3 + ["fold_linears", "stack_linears"]
    assert twice.log.applied == ()
    graph = once.graph.model.graph
    assert nets.operators(graph)["Gemm"] == 1
    made = {parameter for name in _floats(graph) for parameter in once.graph.sources[name]}
    assert made == set(_floats(build()))
    nets.assert_same(build(), graph, tolerance=nets.FOLDED)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    group=st.integers(1, 3),
    outputs=st.integers(1, 4),
    sizes=st.sampled_from([(36,), (6, 6), (4, 9), (2, 3, 6)]),
    bias=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_convolutions_of_any_shape_give_the_same(
    nets: ModuleType, group: int, outputs: int, sizes: tuple[int, ...], bias: bool, seed: int
) -> None:
    def build() -> ir.Graph:
        net = nets.Net(2 * group * 36, seed)
        h = net.conv(net.image(2 * group, *sizes), outputs * group, "layer", group=group, bias=bias)
        return net.ends(y=net.norm(h, "norm"))  # type: ignore[no-any-return]

    graph = build()
    fold_batch_norms(graph)

    assert nets.operators(graph) == {"Reshape": 1, "Conv": 1}
    nets.assert_same(build(), graph, tolerance=nets.FOLDED)


class Blocks(nn.Module):
    """Convolutions and a linear layer with their normalizations, as torch writes them."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(
            nn.Unflatten(1, (3, 6, 6)),
            nn.Conv2d(3, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
            nn.Conv2d(8, 8, 3, groups=4, stride=2),
            nn.BatchNorm2d(8, eps=1e-3),
            nn.ReLU(inplace=True),
            nn.Flatten(),
            nn.Linear(32, 10),
            nn.BatchNorm1d(10),
        )

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.model(x),)


def test_normalizations_of_torch_are_folded(nets: ModuleType) -> None:
    module = Blocks().eval()
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if tensor.dtype == torch.float32:
                drawn = rng.uniform(0.5, 2.0, tensor.shape) if name.endswith("_var") else None
                values = rng.standard_normal(tensor.shape) / 4 if drawn is None else drawn
                tensor.copy_(torch.from_numpy(values))
    model = ExportableModel(
        family="any",
        config={},
        module=module,
        inputs=(ModelInput("x", "float32", (108,)),),
        tasks=(TaskOutput("digits", output_shape=(10,), num_experts=None, tail_parameters=frozenset()),),
        expert_features=None,
        trunk_parameters=frozenset(),
        unused_parameters=(),
        notes=(),
    )
    graph = capture(model, newest_opset()).model.graph

    found = fold_batch_norms(graph)

    assert [entry.where for entry in found.applied] == ["1", "4", "8"]
    assert nets.operators(graph)["BatchNormalization"] == 0
    x = np.random.default_rng(1).standard_normal((5, 108))  # as nets.evaluate draws it
    with torch.no_grad():
        (expected,) = module.double()(torch.from_numpy(x))
    given = nets.evaluate(graph)[prediction_name("digits")]
    # Three layers of at most 32 terms near 1, each weight and bias of which was rounded once to float32.
    np.testing.assert_allclose(given, expected.numpy(), rtol=0, atol=3 * 32 * 2.0**-24)


def _floats(graph: ir.Graph) -> dict[str, NDArray[np.float64]]:
    """The graph's float initializers, in float64."""
    return {
        name: value.const_value.numpy().astype(np.float64)
        for name, value in graph.initializers.items()
        if value.const_value is not None and value.const_value.dtype == ir.DataType.FLOAT
    }


def _bytes(graph: ir.Graph) -> bytes:
    return ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString(deterministic=True)  # type: ignore[no-any-return]
