"""Small graphs to rewrite, and graphs evaluated in float64 with onnx's reference evaluator."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

Axes = list[int | str]


class Net:
    """A graph that is being built: x (batch, width) and whatever is added. Weights are seeded."""

    def __init__(self, width: int = 6, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.x = self._typed(ir.Value(name="x"), ["batch", width])
        self.graph = ir.Graph([self.x], [], nodes=[], opset_imports={"": 21}, name="net")

    def linear(
        self,
        x: ir.Value,
        out: int,
        name: str,
        *,
        bias: bool = True,
        turned: bool = False,
        scale: float = 1.0,
        **kept: float,
    ) -> ir.Value:
        """A Gemm from x to `out` values, with weights `<name>.weight` and `<name>.bias`."""
        assert x.shape is not None
        width = int(x.shape[1])  # type: ignore[arg-type]
        weight = self.rng.standard_normal((width, out) if turned else (out, width)) * scale
        inputs = [x, self.constant(f"{name}.weight", weight)]
        if bias:
            inputs.append(self.constant(f"{name}.bias", self.rng.standard_normal(out) * scale))
        return self.add("Gemm", inputs, ["batch", out], name, transB=int(not turned), **kept)

    def image(self, channels: int, *sizes: int) -> ir.Value:
        """x as (batch, channels, *sizes), which must be as many as it is wide."""
        shape = self.integers(f"image_{len(self.graph)}.shape", [-1, channels, *sizes])
        return self.add("Reshape", [self.x, shape], ["batch", channels, *sizes], f"image_{len(self.graph)}")

    def conv(
        self, x: ir.Value, out: int, name: str, *, kernel: int = 2, group: int = 1, bias: bool = True
    ) -> ir.Value:
        """A Conv of x (batch, channels, …) to `out` channels, with weights `<name>.weight` and `<name>.bias`."""
        _, channels, *sizes = (int(axis) if isinstance(axis, int) else 0 for axis in x.shape or ())
        weight = self.rng.standard_normal((out, channels // group, *(kernel for _ in sizes)))
        inputs = [x, self.constant(f"{name}.weight", weight)]
        if bias:
            inputs.append(self.constant(f"{name}.bias", self.rng.standard_normal(out)))
        return self.add(
            "Conv", inputs, ["batch", out, *(size - kernel + 1 for size in sizes)], name, group=group
        )

    def norm(self, x: ir.Value, name: str, **kept: float) -> ir.Value:
        """A BatchNormalization of x (batch, channels, …) with constants `<name>.scale`, `.shift`, `.mean`, `.var`."""
        axes = list(x.shape or ())
        size = int(axes[1])  # type: ignore[arg-type]
        constants = [
            self.constant(f"{name}.{which}", values)
            for which, values in (
                ("scale", self.rng.standard_normal(size)),
                ("shift", self.rng.standard_normal(size)),
                ("mean", self.rng.standard_normal(size)),
                ("var", self.rng.uniform(0.2, 3.0, size)),
            )
        ]
        return self.add("BatchNormalization", [x, *constants], axes, name, **kept)

    def relu(self, x: ir.Value) -> ir.Value:
        return self.add("Relu", [x], list(x.shape or ()), f"relu_{len(self.graph)}")

    def add(self, op_type: str, inputs: Sequence[ir.Value], axes: Axes, name: str, **kept: float) -> ir.Value:
        (value,) = self.add_many(op_type, inputs, [axes], name, **kept)
        return value

    def add_many(
        self, op_type: str, inputs: Sequence[ir.Value], shapes: Sequence[Axes], name: str, **kept: float
    ) -> list[ir.Value]:
        attributes = ir.convenience.convert_attributes(kept)
        node = ir.Node("", op_type, inputs, attributes=attributes, name=name, num_outputs=len(shapes))
        for index, (value, axes) in enumerate(zip(node.outputs, shapes, strict=True)):
            value.name = f"{name}:{index}"
            self._typed(value, axes)
        self.graph.append(node)
        return list(node.outputs)

    def constant(self, name: str, values: object, dtype: type = np.float32) -> ir.Value:
        array = np.asarray(values, dtype)
        if name in self.graph.initializers:
            return self.graph.initializers[name]
        value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
        value.shape = ir.Shape(array.shape)
        value.type = ir.TensorType(ir.DataType.FLOAT if dtype is np.float32 else ir.DataType.INT64)
        self.graph.register_initializer(value)
        return value

    def integers(self, name: str, values: Sequence[int]) -> ir.Value:
        return self.constant(name, values, np.int64)

    def ends(self, **outputs: ir.Value) -> ir.Graph:
        """The graph, with these values as its outputs, under these names."""
        for name, value in outputs.items():
            value.name = name
            self.graph.outputs.append(value)
        return self.graph

    @staticmethod
    def _typed(value: ir.Value, axes: Axes) -> ir.Value:
        value.shape = ir.Shape(axes)
        value.type = ir.TensorType(ir.DataType.FLOAT)
        return value


def experts(net: Net, h: ir.Value, *, count: int = 3, width: int = 4) -> tuple[ir.Value, ir.Value]:
    """Experts of two layers each as torch captures them: features (batch, count, width), and the same flat."""
    rows = []
    for expert in range(count):
        hidden = net.relu(net.linear(h, 5, f"expert.{expert}.0"))
        features = net.linear(hidden, width, f"expert.{expert}.1")
        axis = net.integers("axis_1", [1])
        rows.append(net.add("Unsqueeze", [features, axis], ["batch", 1, width], f"raise_{expert}"))
    cube = net.add("Concat", rows, ["batch", count, width], "stack", axis=1)
    size = net.integers("flat_size", [-1, count * width])
    return cube, net.add("Reshape", [cube, size], ["batch", count * width], "flatten")


def fusion(net: Net, weights: ir.Value, cube: ir.Value, name: str, **kept: int) -> ir.Value:
    """The weighted sum of experts as torch captures it."""
    _, count, width = cube.shape or ()
    column = net.add(
        "Unsqueeze", [weights, net.integers("axis_last", [-1])], ["batch", count, 1], f"{name}.column"
    )  # type: ignore[list-item]
    product = net.add("Mul", [column, cube], ["batch", count, width], f"{name}.mul")  # type: ignore[list-item]
    axis = net.integers("axis_1", [1])
    return net.add("ReduceSum", [product, axis], ["batch", width], f"{name}.sum", **{"keepdims": 0, **kept})  # type: ignore[list-item]


def mixture(*, tasks: int = 3, count: int = 3, outputs: Sequence[int] = (2, 2, 2), seed: int = 0) -> ir.Graph:
    """A whole multi-task mixture of experts under names that mean nothing."""
    net = Net(seed=seed)
    cube, flat = experts(net, net.linear(net.relu(net.linear(net.x, 7, "a")), 8, "b"), count=count)
    ends = {"expert_features": cube}
    for task in range(tasks):
        gate = net.linear(net.relu(net.linear(flat, 5, f"g{task}.0")), count, f"g{task}.1")
        weights = net.add("Softmax", [gate], ["batch", count], f"softmax_{task}", axis=-1)
        fused = fusion(net, weights, cube, f"fusion_{task}")
        ends[f"w{task}"] = weights
        ends[f"y{task}"] = net.linear(
            net.relu(net.linear(fused, 3, f"h{task}.0")), outputs[task], f"h{task}.1"
        )
    return net.ends(**ends)


def evaluate(graph: ir.Graph, batch: int = 5, seed: int = 1) -> dict[str, NDArray[np.float64]]:
    """The outputs for seeded rows, every operator computed in float64 on the float32 weights."""
    proto: onnx.ModelProto = ir.to_proto(ir.Model(graph, ir_version=10))
    for tensor in proto.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT:
            tensor.CopyFrom(
                numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float64), tensor.name)
            )
    (read,) = proto.graph.input
    widths = [axis.dim_value for axis in read.type.tensor_type.shape.dim][1:]
    x = np.random.default_rng(seed).standard_normal((batch, *widths))
    names = [output.name for output in proto.graph.output]
    return dict(zip(names, ReferenceEvaluator(proto).run(None, {read.name: x}), strict=True))


def operators(graph: ir.Graph) -> Counter[str]:
    return Counter(node.op_type for node in graph)


def assert_same(before: ir.Graph, after: ir.Graph, *, tolerance: float = 1e-12) -> None:
    """Same outputs under the same names; 1e-12 is float64's own rounding of a few hundred terms near 1.

    Args:
        tolerance: relative to the largest output. A fold rounds weights once to float32 (2^-24 of each), so its
            outputs are off by a few 2^-24 of the sum of the magnitudes of their terms.
    """
    for batch in (1, 5):
        expected, found = evaluate(before, batch), evaluate(after, batch)
        assert list(found) == list(expected)
        for name, values in expected.items():
            assert found[name].shape == values.shape
            np.testing.assert_allclose(
                found[name], values, rtol=0, atol=tolerance * max(1.0, np.abs(values).max())
            )


def assert_settled(rule: Callable[[ir.Graph], object], graph: ir.Graph) -> None:
    """Applying the rule again finds nothing and changes nothing."""
    before = ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString(deterministic=True)
    found = rule(graph)
    assert found.applied == ()  # type: ignore[attr-defined]
    assert ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString(deterministic=True) == before


FOLDED = 64 * 2.0**-24
"""A tolerance for assert_same after a fold: 64 terms, each weight rounded once."""
