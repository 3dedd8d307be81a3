"""What is computed from constants alone becomes a constant, where that costs no more than it saves."""

from __future__ import annotations

import importlib.util
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn
from torch.nn import functional as F

from te_export.capture.opset import newest_opset
from te_export.capture.torch_capture import capture
from te_export.load_model import load_model
from te_export.options import ExportOptions
from te_export.partition import GraphSet, partition
from te_export.rewrite.fold_constants import fold_constants
from te_export.rewrite.log import RewriteLog
from te_export.rewrite.rewrite import rewrite, rewrite_cut
from te_export.verify.reachability import check_reachability

Build = Callable[[Any], ir.Graph]

LARGE = 1024
"""Floats that take the 4 kB which are allowed; one more is too many."""


def scaled(net: Any, factor: ir.Value) -> ir.Graph:
    """x · factor, which is read as (1,) or (6,)."""
    return net.ends(y=net.add("Mul", [net.x, factor], ["batch", 6], "scaled"))  # type: ignore[no-any-return]


def softmax_of_a_row(net: Any) -> ir.Graph:
    table = net.constant("table", net.rng.standard_normal((3, 6)))
    row = net.add("Gather", [table, net.integers("one", 1)], [6], "row", axis=0)
    return scaled(net, net.add("Softmax", [row], [6], "share", axis=-1))


def exp_of_a_scale(net: Any) -> ir.Graph:
    return scaled(net, net.add("Exp", [net.constant("log_scale", [0.5])], [1], "scale"))


def scalar_of_a_table(net: Any) -> ir.Graph:
    table = net.constant("table", net.rng.standard_normal((2, 2)))
    row = net.add("Gather", [table, net.integers("one", 1)], [2], "row")
    return scaled(net, net.add("Gather", [row, net.integers("zero", 0)], [], "entry", axis=0))


def both_halves(net: Any) -> ir.Graph:
    table = net.constant("table", net.rng.standard_normal((2, 6)))
    sizes = net.integers("sizes", [1, 1])
    first, last = net.add_many("Split", [table, sizes], [[1, 6], [1, 6]], "halves", axis=0)
    return net.ends(
        y=net.add("Mul", [net.x, first], ["batch", 6], "y"),
        z=net.add("Add", [net.x, last], ["batch", 6], "z"),
    )


def weight_norm(net: Any) -> ir.Graph:
    """A weight far larger than 4 kB in the place of one of its size."""
    v, g = net.constant("v", net.rng.standard_normal((500, 6))), net.constant("g", np.ones((500, 1)))
    axes = net.integers("last", [1])
    squares = net.add("ReduceSum", [net.add("Mul", [v, v], [500, 6], "squares"), axes], [500, 1], "sum")
    norm = net.add("Sqrt", [squares], [500, 1], "norm")
    weight = net.add("Mul", [net.add("Div", [v, norm], [500, 6], "unit"), g], [500, 6], "weight")
    return net.ends(y=net.add("Gemm", [net.x, weight], ["batch", 500], "layer", transB=1))  # type: ignore[no-any-return]


def codes(net: Any) -> ir.Graph:
    """A choice by bits that are no floats, as DSelect-k makes it."""
    bits = net.constant("bits", [[0, 1], [1, 1]], np.int64)
    chosen = net.add("Equal", [bits, net.integers("set", 1)], [2, 2], "chosen")
    chosen.dtype = ir.DataType.BOOL
    z = net.constant("z", [[0.25, 0.5]])
    rest = net.add("Sub", [net.constant("whole", 1.0), z], [1, 2], "rest")
    terms = net.add("Where", [chosen, z, rest], [2, 2], "terms")
    product = net.add("ReduceProd", [terms, net.integers("last", [1])], [2], "product", keepdims=0)
    return scaled(net, net.add("Einsum", [product, product], [], "dot", equation="i,i->"))


def transposed_alone(net: Any) -> ir.Graph:
    weight = net.constant("weight", net.rng.standard_normal((500, 6)))
    turned = net.add("Transpose", [weight], [6, 500], "turned", perm=[1, 0])
    return net.ends(y=net.add("MatMul", [net.x, turned], ["batch", 500], "product"))  # type: ignore[no-any-return]


def shape_of_parts(net: Any) -> ir.Graph:
    parts = [net.integers("rows", [-1]), net.integers("columns", [2, 3])]
    shape = net.add("Concat", parts, [3], "shape", axis=0)
    shape.dtype = ir.DataType.INT64
    return net.ends(y=net.add("Reshape", [net.x, shape], ["batch", 2, 3], "cube"))  # type: ignore[no-any-return]


FOLDS: dict[str, tuple[Build, str, dict[str, tuple[str, ...]], set[str]]] = {
    "softmax": (softmax_of_a_row, "row", {"table.share:0": ("table",)}, {"Mul"}),
    "exp": (exp_of_a_scale, "scale", {"log_scale.scale:0": ("log_scale",)}, {"Mul"}),
    "scalar": (scalar_of_a_table, "row", {"table.entry:0": ("table",)}, {"Mul"}),
    "split": (
        both_halves,
        "halves",
        {"table.halves:0": ("table",), "table.halves:1": ("table",)},
        {"Mul", "Add"},
    ),
    "weight norm": (weight_norm, "squares", {"v.weight:0": ("g", "v")}, {"Gemm"}),
    "codes": (codes, "chosen", {"z.dot:0": ("whole", "z")}, {"Mul"}),
    "transpose": (transposed_alone, "turned", {"weight.turned:0": ("weight",)}, {"MatMul"}),
    "shape": (shape_of_parts, "shape", {"shape:0.folded": ()}, {"Reshape"}),
}


@pytest.mark.parametrize("name", FOLDS)
def test_a_whole_chain_becomes_its_values(nets: ModuleType, name: str) -> None:
    build, first, sources, left = FOLDS[name]
    before, graph = build(nets.Net()), build(nets.Net())

    found = fold_constants(graph)

    assert [entry.where for entry in found.applied] == [first]
    assert found.declined == ()
    assert found.sources == sources
    assert set(nets.operators(graph)) == left
    assert set(graph.initializers) == set(sources)
    nets.assert_same(before, graph, tolerance=nets.FOLDED)
    nets.assert_settled(fold_constants, graph)


def test_a_chain_is_rounded_once(nets: ModuleType) -> None:
    graph = weight_norm(nets.Net())
    v = graph.initializers["v"].const_value.numpy().astype(np.float64)

    fold_constants(graph)

    expected = v / np.sqrt((v * v).sum(axis=1, keepdims=True))
    folded = graph.initializers["v.weight:0"].const_value.numpy()
    np.testing.assert_array_equal(folded, expected.astype(np.float32))


def test_equal_values_of_one_constant_are_one(nets: ModuleType) -> None:
    net = nets.Net()
    table = net.constant("table", [0.5, 0.5])
    ends = {}
    for name, index in (("y", 0), ("z", 1)):
        entry = net.add("Gather", [table, net.integers(f"i{index}", index)], [], f"entry_{index}", axis=0)
        ends[name] = net.add("Mul", [net.x, entry], ["batch", 6], name)
    graph = net.ends(**ends)

    found = fold_constants(graph)

    assert found.sources == {"table.entry_0:0": ("table",)}
    assert set(graph.initializers) == {"table.entry_0:0"}


def test_a_mask_of_infinities_is_a_constant_like_any_other(nets: ModuleType) -> None:
    def build() -> ir.Graph:
        net = nets.Net()
        mask = net.constant("mask", [0.0, -np.inf] * 3)
        added = net.add("Add", [net.constant("scores", np.ones(6)), mask], [6], "masked")
        other = net.add("Unsqueeze", [mask, net.integers("front", [0])], [1, 6], "row")
        return net.ends(  # type: ignore[no-any-return]
            y=net.add("Max", [net.x, added], ["batch", 6], "y"),
            z=net.add("Max", [net.x, other], ["batch", 6], "z"),
        )

    graph = build()
    found = fold_constants(graph)

    assert nets.operators(graph) == {"Add": 1, "Max": 2}  # moved as it is, but not computed with
    assert found.sources == {"mask.row:0": ("mask",)}
    assert found.declined[0].reason.endswith("what it gives is not finite")
    nets.assert_same(build(), graph)


def expanded(size: int) -> Build:
    def build(net: Any) -> ir.Graph:
        shape = net.integers("shape", [size, 1])
        wide = net.add("Expand", [net.constant("one", [[2.0]]), shape], [size, 1], "wide")
        return net.ends(y=net.add("Gemm", [net.x, net.constant("w", np.ones((6, 1)))], ["batch", 1], "l"), z=net.add(
            "Mul", [wide, net.add("Slice", [net.x, *(net.integers(f"i{i}", [i]) for i in (0, 1, 1))],
                                  ["batch", 1], "column")], [size, 1], "product"))  # fmt: skip

    return build


def leaves_the_graph(net: Any) -> ir.Graph:
    """The constant is an output; what it is made of may still be computed."""
    double = net.add("Add", [net.constant("p", np.ones(6)), net.constant("q", np.ones(6))], [6], "double")
    return net.ends(c=net.add("Exp", [double], [6], "given"), y=net.relu(net.x))


def turned_weight_stays(net: Any) -> ir.Graph:
    weight = net.constant("weight", net.rng.standard_normal((20, 6)))
    turned = net.add("Transpose", [weight], [6, 20], "turned", perm=[1, 0])
    return net.ends(
        y=net.add("MatMul", [net.x, turned], ["batch", 20], "product"),
        z=net.add("Gemm", [net.x, weight], ["batch", 20], "layer", transB=1),
    )


def weight_leaves_the_graph(net: Any) -> ir.Graph:
    graph = transposed_alone(net)
    graph.outputs.append(graph.initializers["weight"])
    return graph


def too_large_a_product(net: Any) -> ir.Graph:
    """A weight that something else reads, scaled."""
    weight = net.constant("weight", net.rng.standard_normal((500, 6)))
    double = net.add("Mul", [weight, net.constant("two", 2.0)], [500, 6], "double")
    return net.ends(
        y=net.add("Gemm", [net.x, double], ["batch", 500], "layer", transB=1),
        z=net.add("Gemm", [net.x, weight], ["batch", 500], "other", transB=1),
    )


def parts_read_apart(net: Any) -> ir.Graph:
    weights = [net.constant(name, net.rng.standard_normal((2, 6))) for name in ("a", "b")]
    both = net.add("Concat", weights, [4, 6], "both", axis=0)
    h = net.add("Gemm", [net.x, both], ["batch", 4], "layer", transB=1)
    pieces = net.add_many("Split", [h, net.integers("sizes", [2, 2])], [["batch", 2]] * 2, "pieces", axis=1)
    return net.ends(y=net.relu(pieces[0]), z=net.relu(pieces[1]))


def integers_of_a_parameter(net: Any) -> ir.Graph:
    index = net.add("Cast", [net.constant("p", [2.0])], [1], "index", to=int(ir.DataType.INT64))
    index.dtype = ir.DataType.INT64
    return net.ends(y=net.add("Gather", [net.x, index], ["batch", 1], "column", axis=1))


def random_numbers(net: Any) -> ir.Graph:
    return scaled(net, net.add("RandomNormalLike", [net.constant("p", np.ones(6))], [6], "noise"))


def of_another_domain(net: Any) -> ir.Graph:
    graph = exp_of_a_scale(net)
    next(node for node in graph if node.name == "scale").domain = "com.microsoft"
    return graph


def of_unknown_shape(net: Any) -> ir.Graph:
    graph = exp_of_a_scale(net)
    next(node for node in graph if node.name == "scale").outputs[0].shape = None
    return graph


def of_float16(net: Any) -> ir.Graph:
    half = net.add("Cast", [net.constant("p", np.ones(6))], [6], "half", to=int(ir.DataType.FLOAT16))
    half.dtype = ir.DataType.FLOAT16
    back = net.add("Cast", [half], [6], "back", to=int(ir.DataType.FLOAT))
    return scaled(net, back)


def not_a_number(net: Any) -> ir.Graph:
    return scaled(net, net.add("Log", [net.constant("p", [-1.0])], [1], "log"))


def beyond_float32(net: Any) -> ir.Graph:
    return scaled(net, net.add("Exp", [net.constant("p", [100.0])], [1], "exp"))


REFUSALS: dict[str, tuple[Build, str, str]] = {
    "too large to make": (
        expanded(LARGE + 1),
        "wide",
        "its output wide:0 takes 4,100 bytes, more than the 4,096",
    ),
    "too large to keep": (
        too_large_a_product,
        "double",
        "would take 12,000 bytes, more than the 4,096 that are allowed and the 4 that would be saved",
    ),
    "a second copy": (turned_weight_stays, "turned", "would be a second copy of weight, which something"),
    "a second copy of an output": (weight_leaves_the_graph, "turned", "more than the 4,096"),
    "parts read apart": (
        parts_read_apart,
        "both",
        "both:0 is read in parts that come from different ones of a, b",
    ),
    "integers": (
        integers_of_a_parameter,
        "index",
        "its integers would no longer be seen to depend on p",
    ),
    "random": (random_numbers, "noise", "a RandomNormalLike is no operator that is computed ahead"),
    "domain": (of_another_domain, "scale", "is no operator that is computed ahead"),
    "shape": (of_unknown_shape, "scale", "shape and type of its output scale:0 are not known ahead"),
    "float16": (of_float16, "half", "shape and type of its output half:0 are not known ahead"),
    "not a number": (not_a_number, "log", "what it gives is not finite"),
    "beyond float32": (beyond_float32, "exp", "its output exp:0 passes the largest float32"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_it_declines_by_name_and_changes_nothing(nets: ModuleType, name: str) -> None:
    build, where, reason = REFUSALS[name]
    graph = build(nets.Net())
    before = _bytes(graph)

    found = fold_constants(graph)

    assert found.applied == ()
    assert found.sources == {}
    assert [entry.where for entry in found.declined] == [where]
    assert reason in found.declined[0].reason
    assert _bytes(graph) == before


def test_an_output_stays_what_a_node_gives(nets: ModuleType) -> None:
    graph = leaves_the_graph(nets.Net())

    found = fold_constants(graph)

    assert [(entry.where, entry.reason) for entry in found.declined] == [
        ("given", "its output c is a constant, and leaves the graph")
    ]
    assert nets.operators(graph) == {"Exp": 1, "Relu": 1}
    assert found.sources == {"p.double:0": ("p", "q")}
    nets.assert_same(leaves_the_graph(nets.Net()), graph)
    nets.assert_settled(fold_constants, graph)


def test_four_kilobytes_are_allowed(nets: ModuleType) -> None:
    graph = expanded(LARGE)(nets.Net())

    assert [entry.where for entry in fold_constants(graph).applied] == ["wide"]
    assert size_of(graph, "one.wide:0") == 4 * LARGE


def test_the_rest_of_a_chain_whose_end_is_too_large_is_folded(nets: ModuleType) -> None:
    def build() -> ir.Graph:
        net = nets.Net()
        weight = net.constant("weight", net.rng.standard_normal((500, 6)))
        scale = net.add("Exp", [net.constant("log_scale", 0.5)], [], "scale")
        double = net.add("Mul", [weight, scale], [500, 6], "double")
        return net.ends(  # type: ignore[no-any-return]
            y=net.add("Gemm", [net.x, double], ["batch", 500], "layer", transB=1),
            z=net.add("Gemm", [net.x, weight], ["batch", 500], "other", transB=1),
        )

    graph = build()
    found = fold_constants(graph)

    assert [entry.where for entry in found.applied] == ["scale"]
    assert [entry.where for entry in found.declined] == ["double"]
    assert set(graph.initializers) == {"weight", "log_scale.scale:0"}
    nets.assert_same(build(), graph, tolerance=nets.FOLDED)
    nets.assert_settled(fold_constants, graph)


def test_what_a_caller_may_replace_is_no_constant(nets: ModuleType) -> None:
    graph = exp_of_a_scale(nets.Net())
    graph.inputs.append(graph.initializers["log_scale"])

    assert fold_constants(graph) == fold_constants(nets.Net().ends())
    assert nets.operators(graph) == {"Exp": 1, "Mul": 1}


def test_parts_that_no_output_tells_apart_are_one_constant(nets: ModuleType) -> None:
    def build() -> ir.Graph:
        net = nets.Net()
        rows = [net.constant(name, net.rng.standard_normal(3)) for name in ("a", "b")]
        return scaled(net, net.add("Concat", rows, [6], "both", axis=0))

    graph = build()

    assert fold_constants(graph).sources == {"a.both:0": ("a", "b")}
    nets.assert_same(build(), graph)


class ScalarStitch(nn.Module):
    """Cross-stitch units as libraries write them: each factor selected from the parameter by itself."""

    def __init__(self, tasks: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleList(nn.Linear(width, 10) for _ in range(tasks)) for width in (6, 10)
        )
        self.units = nn.Parameter(torch.rand(2, tasks, tasks))
        self.heads = nn.ModuleList(nn.Linear(10, 2) for _ in range(tasks))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        states = [x] * len(self.heads)
        for unit, layers in enumerate(self.layers):
            own = [F.relu(layer(state)) for layer, state in zip(layers, states, strict=True)]
            states = [
                torch.stack([self.units[unit][task][other] * h for other, h in enumerate(own)]).sum(dim=0)
                for task in range(len(own))
            ]
        return {
            f"task_{index}": head(h) for index, (head, h) in enumerate(zip(self.heads, states, strict=True))
        }


def rewritten_stitches() -> tuple[nn.Module, tuple[str, ...]]:
    """The cross-stitch model of tests/export/modules."""
    path = Path(__file__).parents[1] / "modules" / "rewritten_models.py"
    spec = importlib.util.spec_from_file_location("rewritten_models_of_constants", path)
    assert spec is not None
    assert spec.loader is not None
    models = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = models  # dataclasses look their module up
    spec.loader.exec_module(models)
    model = models.REWRITTEN_MODELS["cross-stitch"]()
    return model.module, model.task_names


def scalar_stitches() -> tuple[nn.Module, tuple[str, ...]]:
    torch.manual_seed(0)
    return ScalarStitch().eval(), ("task_0", "task_1", "task_2")


@pytest.mark.parametrize("build", [rewritten_stitches, scalar_stitches])
def test_cross_stitch_is_no_larger_than_torch_exports_it(
    build: Callable[[], tuple[nn.Module, tuple[str, ...]]],
) -> None:
    module, tasks = build()
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
    graphs = exported(module, x, tasks)
    proto = export_of_torch(module, x)
    (given,) = proto.graph.input

    for task, output in zip(tasks, proto.graph.output, strict=True):
        torchs = onnx.utils.Extractor(proto).extract_model([given.name], [output.name]).graph
        graph = graphs.tasks[task].graph

        assert not any(
            node.op_type == "Gather" and node.inputs[0] is not None and node.inputs[0].is_initializer()
            for node in graph
        )
        assert len(graph) <= len(torchs.node)
        assert floats_of(graph) <= sum(
            numpy_helper.to_array(tensor).size
            for tensor in torchs.initializer
            if tensor.data_type == onnx.TensorProto.FLOAT
        )


def export_of_torch(module: nn.Module, x: Tensor) -> onnx.ModelProto:
    """torch.onnx.export as it comes, for any batch size."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own parts warn of one another
        program = torch.onnx.export(
            module, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},), verbose=False
        )
    assert program is not None
    return program.model_proto


def exported(module: nn.Module, x: Tensor, tasks: tuple[str, ...]) -> GraphSet:
    model = load_model(module, ExportOptions(task_names=tasks), x).model
    captured = capture(model, newest_opset())
    before = rewrite(captured, provider="cpu", level="exact")
    assert before.log.applied[0].rule == "fold_constants"
    graphs, _ = rewrite_cut(partition(before.graph), captured, RewriteLog(), provider="cpu", level="exact")
    check_reachability(graphs, model, captured)
    return graphs


def floats_of(graph: ir.Graph) -> int:
    tensors = [value.const_value for value in graph.initializers.values()]
    return sum(tensor.size for tensor in tensors if tensor is not None and tensor.dtype.is_floating_point())


def size_of(graph: ir.Graph, name: str) -> int:
    tensor = graph.initializers[name].const_value
    assert tensor is not None
    return tensor.nbytes


def _bytes(graph: ir.Graph) -> bytes:
    return ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString(deterministic=True)  # type: ignore[no-any-return]
