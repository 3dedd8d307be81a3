"""Graphs in float16: types, casts, numbers within what rounding allows, shared bytes, and each refusal.

Worst-case bounds say nothing here: over ten layers and a softmax they come to 10^6 times the outputs. So the
graph is run in float64 with every value off by one unit roundoff of float16, up or down at random (stochastic
arithmetic, as in Higham and Mary, A new approach to probabilistic rounding error analysis, 2019): the spread
of its outputs follows from 2^-11 and from the widths of the layers, and six spreads are the bound.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cache

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

from te_export.bundle.weights_file import plan_weights
from te_export.capture.joint_graph import EXPERT_FEATURES, JointGraph, prediction_name, routing_weights_name
from te_export.capture.opset import OLDEST_OPSET, newest_opset
from te_export.capture.torch_capture import capture
from te_export.errors import GateError
from te_export.models.exportable import ExportableModel
from te_export.partition import GraphSet, partition
from te_export.precision.float16.half_precision import HalfPrecision
from te_export.precision.float16.half_weights import parts_of
from te_export.rewrite.log import RewriteLog
from te_export.rewrite.rewrite import rewrite, rewrite_cut
from te_export.rewrite.stack import stack_of
from te_export.verify.structure import check_structure

NONE: frozenset[str] = frozenset()
ROUNDOFF = 2.0**-11
"""Unit roundoff of float16."""
SAMPLES = 32
SPREADS = 6
"""True rounding errors lie anywhere within one unit, so this is at least 10 of their own spreads."""
BATCHES = (1, 2, 7, 64)

SHAPES = {
    f"{level}-{provider}-{opset}": (level, provider, opset)
    for level, provider in (("none", "cpu"), ("exact", "cpu"), ("exact", "cuda"))
    for opset in (OLDEST_OPSET, newest_opset())
}

Bounded = dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]]
"""By output: its value in exact arithmetic, and how far float16 may be from it."""

Run = Callable[[Mapping[str, NDArray[np.float32]]], dict[str, NDArray[np.float32]]]


@pytest.fixture(scope="module")
def capture_at(exportable: ExportableModel) -> Callable[[int], JointGraph]:
    """`capture_at(opset)`: SMALL as captured, once for each opset."""
    return cache(lambda opset: capture(exportable, opset))


@pytest.fixture(scope="module", params=SHAPES)
def fp32(request: pytest.FixtureRequest, capture_at: Callable[[int], JointGraph]) -> GraphSet:
    level, provider, opset = SHAPES[request.param]
    return graph_set(capture_at(opset), level, provider)


@pytest.fixture(scope="module")
def fp16(fp32: GraphSet) -> GraphSet:
    return halved(fp32)


def graph_set(captured: JointGraph, level: str, provider: str) -> GraphSet:
    rewritten = rewrite(captured, provider=provider, level=level)
    cut = partition(rewritten.graph)
    return rewrite_cut(cut, captured, RewriteLog(), provider=provider, level=level)[0]


def halved(graphs: GraphSet, kept: frozenset[str] = NONE) -> GraphSet:
    form = HalfPrecision()

    def converted(model: ir.Model) -> ir.Model:
        copy = model.clone()
        form.convert(copy, kept)
        return copy

    return graphs.changed(converted)


def parsed(text: str) -> ir.Model:
    """A graph in onnx's text form, with the types of all its values."""
    header = f'<ir_version: 10, opset_import: ["" : {newest_opset()}, "far" : 1]>'
    proto = onnx.shape_inference.infer_shapes(onnx.parser.parse_model(header + text))
    return ir.from_proto(proto)


def rows(model: ir.Model, batch: int, seed: int = 0) -> dict[str, NDArray[np.float32]]:
    rng = np.random.default_rng(seed)
    return {
        str(value.name): rng.standard_normal([batch, *list(value.shape or ())[1:]]).astype(np.float32)
        for value in model.graph.inputs
    }


def by_reference(model: ir.Model, feeds: Mapping[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
    evaluator = ReferenceEvaluator(ir.to_proto(model))
    return dict(zip(evaluator.output_names, evaluator.run(None, dict(feeds)), strict=True))


def by_onnxruntime(
    model: ir.Model, feeds: Mapping[str, NDArray[np.float32]]
) -> dict[str, NDArray[np.float32]]:
    return opened(model)(feeds)


def opened(model: ir.Model) -> Run:
    """The model in a session of onnxruntime on the CPU, which casts to float32 where it has no kernel."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    data = ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda feeds: dict(zip(names, session.run(names, dict(feeds)), strict=True))


def bounded(model: ir.Model, feeds: Mapping[str, NDArray[np.float32]]) -> Bounded:
    """What a float32 graph computes in exact arithmetic, and how far its float16 form may be from that."""
    exact = perturbed(model, feeds, lambda values: values)
    rng = np.random.default_rng(0)

    def off(values: NDArray[np.float64]) -> NDArray[np.float64]:
        return values * (1 + ROUNDOFF * rng.choice([-1.0, 1.0], values.shape))

    samples = [perturbed(model, feeds, off) for _ in range(SAMPLES)]
    return {
        name: (
            values,
            SPREADS * np.sqrt(np.mean([(sample[name] - values) ** 2 for sample in samples], axis=0)),
        )
        for name, values in exact.items()
    }


def perturbed(
    model: ir.Model,
    feeds: Mapping[str, NDArray[np.float32]],
    off: Callable[[NDArray[np.float64]], NDArray[np.float64]],
) -> dict[str, NDArray[np.float64]]:
    """The outputs in float64, with every input, weight and result of a node put through `off`."""
    known = {name: off(array.astype(np.float64)) for name, array in feeds.items()}
    for name, value in model.graph.initializers.items():
        array = value.const_value.numpy()
        known[name] = off(array.astype(np.float64)) if value.dtype == ir.DataType.FLOAT else array
    for node in model.graph:
        made = through(node, [known[value.name] for value in node.inputs])
        known |= {output.name: off(values) for output, values in zip(node.outputs, made, strict=True)}
    return {str(value.name): known[value.name] for value in model.graph.outputs}


def through(node: ir.Node, inputs: list[NDArray[np.float64]]) -> list[NDArray[np.float64]]:
    """The outputs of one node in float64."""
    x, *rest = inputs
    attribute = {name: value.value for name, value in node.attributes.items()}
    match node.op_type:
        case "Gemm":
            return [x @ (rest[0].T if attribute.get("transB") else rest[0]) + rest[1]]
        case "MatMul":
            return [x @ rest[0]]
        case "Add":
            return [x + rest[0]]
        case "Mul":
            return [x * rest[0]]
        case "Relu":
            return [np.maximum(x, 0)]
        case "Softmax":
            weights = np.exp(x - x.max(axis=-1, keepdims=True))
            return [weights / weights.sum(axis=-1, keepdims=True)]
        case "ReduceSum":
            return [x.sum(axis=tuple(rest[0].tolist()), keepdims=bool(attribute.get("keepdims", 1)))]
        case "Reshape":
            return [x.reshape(rest[0].tolist())]
        case "Transpose":
            return [x.transpose(attribute["perm"])]
        case "Unsqueeze":
            return [np.expand_dims(x, tuple(rest[0].tolist()))]
        case "Concat":
            return [np.concatenate(inputs, axis=attribute["axis"])]
        case "Split":
            return np.split(x, np.cumsum(rest[0])[:-1], axis=attribute.get("axis", 0))
    raise AssertionError(f"no rule for {node.op_type}")


def assert_near(found: Mapping[str, NDArray[np.float32]], expected: Bounded) -> None:
    """The first rows of what is expected, as many as were found."""
    assert list(found) == list(expected)
    for name, (values, allowed) in expected.items():
        count = len(found[name])
        assert found[name].dtype == np.float32
        assert found[name].shape[1:] == values.shape[1:]
        assert (np.abs(found[name] - values[:count]) <= allowed[:count]).all(), name


def nodes(model: ir.Model, *op_types: str) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type in op_types]


def dtypes(values: list[ir.Value | None] | tuple[ir.Value | None, ...]) -> set[ir.DataType | None]:
    return {value.dtype for value in values if value is not None}


def converted_pairs(fp32: GraphSet, fp16: GraphSet) -> Iterator[tuple[ir.Model, ir.Model]]:
    return zip(fp32.models, fp16.models, strict=True)


def test_graphs_are_valid_and_their_interfaces_are_as_before(fp32: GraphSet, fp16: GraphSet) -> None:
    for before, after in converted_pairs(fp32, fp16):
        onnx.checker.check_model(ir.to_proto(after), full_check=True)
        for old, new in (
            (before.graph.inputs, after.graph.inputs),
            (before.graph.outputs, after.graph.outputs),
        ):
            assert [(v.name, v.dtype, v.shape) for v in new] == [(v.name, v.dtype, v.shape) for v in old]


def test_products_are_float16_and_gates_float32(fp16: GraphSet) -> None:
    for model in fp16.models:
        for node in nodes(model, "Gemm", "MatMul", "Mul", "Add", "Relu", "Concat"):
            assert dtypes([*node.inputs, *node.outputs]) == {ir.DataType.FLOAT16}, node.name
        softmaxes = nodes(model, "Softmax")
        assert bool(softmaxes) == (model is not fp16.trunk)
        for node in softmaxes:
            assert dtypes([*node.inputs, *node.outputs]) == {ir.DataType.FLOAT}
        for value in model.graph.initializers.values():
            assert value.dtype in (ir.DataType.FLOAT16, ir.DataType.INT64)
            assert value.dtype == value.const_value.dtype


def test_routing_weights_reach_their_output_in_float32(fp16: GraphSet) -> None:
    for model in (*fp16.joined, *fp16.tasks.values(), *fp16.tails.values()):
        for output in model.graph.outputs:
            node = output.producer()
            while str(output.name).endswith("routing_weights") and node.op_type != "Softmax":
                assert node.op_type in ("Split", "Reshape", "Identity")
                node = node.inputs[0].producer()


def test_casts_stand_only_where_types_meet(fp16: GraphSet) -> None:
    for model in fp16.models:
        casts = nodes(model, "Cast")
        read = [(node.inputs[0], node.outputs[0].dtype) for node in casts]
        assert len(set(read)) == len(read)
        for value, dtype in read:
            assert value.dtype != dtype
            assert not value.is_initializer()
            assert value.producer() is None or value.producer().op_type != "Cast"


def test_the_rewritten_joint_graph_casts_inputs_gates_and_predictions_only(
    exportable: ExportableModel, capture_at: Callable[[int], JointGraph]
) -> None:
    joint = halved(graph_set(capture_at(newest_opset()), "exact", "cuda")).joint
    gate_in_and_out = 2
    assert len(nodes(joint, "Cast")) == 1 + gate_in_and_out + len(exportable.tasks)


def test_numbers_are_within_what_rounding_allows(fp32: GraphSet, fp16: GraphSet) -> None:
    for before, after in converted_pairs(fp32, fp16):
        feeds = rows(before, max(BATCHES))
        expected = bounded(before, feeds)
        run = opened(after)
        for batch in BATCHES:
            few = first_rows(feeds, batch)
            assert_near(by_reference(after, few), expected)
            assert_near(run(few), expected)


def test_the_bound_tells_something(fp32: GraphSet, fp16: GraphSet) -> None:
    """Something was rounded to 11 bits, and the bound is well below the size of the outputs."""
    feeds = rows(fp32.joint, 64)
    found, expected = by_reference(fp16.joint, feeds), bounded(fp32.joint, feeds)
    for name, (values, allowed) in expected.items():
        assert np.abs(found[name] - values).max() > 2.0**-16 * np.abs(values).max()
        assert allowed.max() < 2.0**-5 * np.abs(values).max()


def test_joint_task_and_tail_graphs_agree(fp32: GraphSet, fp16: GraphSet) -> None:
    """Each is within the joint graph's bound of the exact answer; features between them are float32 that
    float16 holds, so that the cut rounds nothing."""
    feeds = rows(fp32.joint, max(BATCHES))
    expected = bounded(fp32.joint, feeds)
    joint, trunk = opened(fp16.joint), opened(fp16.trunk)
    for task in fp16.tasks:
        names = (prediction_name(task), routing_weights_name(task))
        whole, tail = opened(fp16.tasks[task]), opened(fp16.tails[task])
        for batch in BATCHES:
            few = first_rows(feeds, batch)
            features = trunk(few)[EXPERT_FEATURES]
            np.testing.assert_array_equal(features.astype(np.float16).astype(np.float32), features)
            together = joint(few)
            for found in (whole(few), tail({EXPERT_FEATURES: features})):
                for name, values in zip(names, found.values(), strict=True):
                    assert (np.abs(values - together[name]) <= 2 * expected[name][1][:batch]).all()


def first_rows(feeds: Mapping[str, NDArray[np.float32]], batch: int) -> dict[str, NDArray[np.float32]]:
    return {name: array[:batch] for name, array in feeds.items()}


def test_gate_and_fusion_are_intact(
    exportable: ExportableModel, capture_at: Callable[[int], JointGraph]
) -> None:
    captured = capture_at(newest_opset())
    for provider in ("cpu", "cuda"):
        fp32 = graph_set(captured, "exact", provider)
        check_structure(with_half_sources(halved(fp32)), exportable, captured)


def with_half_sources(graphs: GraphSet) -> GraphSet:
    """What the converted weights were made from."""
    names = {
        part.name
        for model in graphs.models
        for value in model.graph.initializers.values()
        for part in parts_of(value)
    }
    halves = {name: name.removesuffix(".half") for name in names}
    return replace(graphs, sources={n: graphs.sources.get(old, (old,)) for n, old in halves.items()})


def test_weights_take_half_the_bytes_and_are_stored_once(
    make_model: Callable[..., object], load: Callable[..., ExportableModel]
) -> None:
    model = make_model(
        input_dim=200, backbone_dim=256, expert_dim=64, num_experts=4, task_output_dims=(9, 9, 3)
    )
    captured = capture(load(model.state_dict()), newest_opset())
    for level, provider in (("none", "cpu"), ("exact", "cpu"), ("exact", "cuda")):
        fp32 = graph_set(captured, level, provider)
        fp16 = halved(fp32)
        before, after = (stored_bytes(graphs) for graphs in (fp32, fp16))
        assert after <= 0.52 * before
        assert shared_part(fp16) == pytest.approx(shared_part(fp32), rel=0.01)


def shared_part(graphs: GraphSet) -> float:
    """How much of weights.bin the joint graph reads."""
    return plan_weights([graphs.joint.graph]).size_bytes / stored_weights(graphs)


def stored_weights(graphs: GraphSet) -> int:
    return plan_weights([model.graph for model in graphs.models]).size_bytes


def stored_bytes(graphs: GraphSet) -> int:
    """weights.bin and the weights that are too small for it and stay in the graphs."""
    layout = plan_weights([model.graph for model in graphs.models])
    small = (
        value.const_value.nbytes
        for model in graphs.models
        for name, value in model.graph.initializers.items()
        if name not in layout.places
    )
    return layout.size_bytes + sum(small)


def test_stacks_are_stacks_of_converted_parts_and_each_is_converted_once(fp32: GraphSet) -> None:
    form = HalfPrecision()
    joint, task = fp32.joint.clone(), fp32.tasks["task_1"].clone()
    form.convert(joint, NONE)
    form.convert(task, NONE)
    alone = {name: value.const_value for name, value in task.graph.initializers.items()}
    stacks = 0
    for name, value in joint.graph.initializers.items():
        stack = stack_of(value.const_value)
        stacks += stack is not None
        for part in parts_of(value):
            assert part.name.endswith(".half") == (value.dtype == ir.DataType.FLOAT16)
            if part.name in alone and stack_of(alone[part.name]) is None and part.name.endswith(".half"):
                assert part.tensor is alone[part.name]
        if value.dtype == ir.DataType.FLOAT16:
            original = fp32.joint.graph.initializers[name.removesuffix(".half")].const_value
            np.testing.assert_array_equal(value.const_value.numpy(), original.numpy().astype(np.float16))
    expected = sum(stack_of(v.const_value) is not None for v in fp32.joint.graph.initializers.values())
    assert stacks == expected


def test_the_names_of_all_matrices_are_given(fp32: GraphSet) -> None:
    names = HalfPrecision().convert(fp32.joint.clone(), NONE)
    assert names == tuple(
        dict.fromkeys(
            part.name
            for node in fp32.joint.graph
            for value in node.inputs
            if value is not None and value.is_initializer() and value.dtype == ir.DataType.FLOAT
            for part in parts_of(value)
            if len(part.tensor.shape) > 1
        )
    )


def test_kept_layers_stay_in_float32(fp32: GraphSet) -> None:
    """Whatever became of a layer: a Gemm, or a batched MatMul with its bias."""
    kept = frozenset(last_gate_layers(fp32.joint))
    fp16 = halved(fp32, kept)
    for model in fp16.models:
        onnx.checker.check_model(ir.to_proto(model), full_check=True)
        for node in nodes(model, "Gemm", "MatMul"):
            names = {p.name for v in node.inputs if v.is_initializer() for p in parts_of(v)}
            dtype = ir.DataType.FLOAT if kept & names else ir.DataType.FLOAT16
            assert dtypes([*node.inputs, *node.outputs]) == {dtype}
            reader = node.outputs[0].uses()[0].node if node.outputs[0].uses() else None
            if node.op_type == "MatMul" and kept & names and reader is not None:
                assert reader.op_type == "Add"
                assert dtypes([*reader.inputs, *reader.outputs]) == {ir.DataType.FLOAT}
    assert kept <= {p.name for v in fp16.joint.graph.initializers.values() for p in parts_of(v)}
    assert kept.isdisjoint(HalfPrecision().convert(fp32.joint.clone(), kept))
    feeds = rows(fp32.joint, 7)
    assert_near(by_reference(fp16.joint, feeds), bounded(fp32.joint, feeds))


def last_gate_layers(model: ir.Model) -> tuple[str, ...]:
    """The weights of the gates' last layers, which some graphs stack."""
    parts = (part for value in model.graph.initializers.values() for part in parts_of(value))
    return tuple(part.name for part in parts if part.name.endswith("gate.2.weight"))


def test_an_activation_between_kept_layers_is_not_rounded() -> None:
    model = chain(1.0, 1.0)
    HalfPrecision().convert(model, frozenset({"w", "v"}))
    assert [node.op_type for node in model.graph] == ["Gemm", "Relu", "Gemm"]


CHAIN = """
net (float[batch, 2] x) => (float[batch, 2] y)
<float[2, 2] w = {{{w}, 0, 0, {w}}}, float[2] b = {{{b}, 0}}, float[2, 2] v = {{1, 0, 0, 1}}>
{{ h = Gemm(x, w, b)  r = Relu(h)  y = Gemm(r, v) }}
"""


def chain(w: float, b: float) -> ir.Model:
    return parsed(CHAIN.format(w=np.format_float_positional(w), b=np.format_float_positional(b)))


@pytest.mark.parametrize(
    ("w", "b", "named"),
    [
        (7e4, 1.0, r"1 of 3 weights: w: its largest magnitude is 7e\+04, and float16 ends at 65504"),
        (1.0, -1e9, r"1 of 3 weights: b: its largest magnitude is 1e\+09"),
        (3e-5, 1.0, r"w: its largest magnitude is 3e-05, and float16 loses digits below 6.1e-05"),
        (1e-9, 1e6, r"2 of 3 weights: w: .*; b: "),
    ],
)
def test_a_weight_that_float16_cannot_hold_is_told_of(w: float, b: float, named: str) -> None:
    model = chain(w, b)
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    with pytest.raises(GateError, match=named):
        HalfPrecision().convert(model, NONE)
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before
    assert HalfPrecision().convert(model, frozenset({"w"})) == ("v",)


@pytest.mark.parametrize("w", [0.0, 65504.0, 65519.0, 2.0**-14])
def test_a_weight_that_float16_can_hold_is_not(w: float) -> None:
    assert HalfPrecision().convert(chain(w, 0.0), NONE) == ("w", "v")


def test_small_values_beside_large_ones_may_vanish() -> None:
    assert HalfPrecision().convert(chain(1.0, 1e-9), NONE) == ("w", "v"), "a bias beside the weights"
    model = parsed(
        "net (float[batch, 2] x) => (float[batch, 2] y) <float[2, 2] w = {1, 1e-9, 0, 1}> {y = MatMul(x, w)}"
    )
    assert HalfPrecision().convert(model, NONE) == ("w",)


OPERATORS = """
net (float[batch, 2] x) => (float[batch, 2] y)
<float[2, 2] w = {{1, 2, 3, 4}}, float[2] s = {{1, 2}}>
{{ h = MatMul(x, w)  e = {node}  y = MatMul(e, w) }}
"""


@pytest.mark.parametrize(
    ("node", "stays"),
    [
        ("Exp(h)", True),
        ("Softplus(h)", True),
        ("LogSoftmax(h)", True),
        ("CumSum(h, zero)", True),
        ("LayerNormalization<axis = -1>(h, s)", False),
        ("Tanh(h)", False),
        ("Sub(h, s)", False),
    ],
)
def test_operators_that_should_not_take_float16_do_not(node: str, stays: bool) -> None:
    text = OPERATORS.format(node=node)
    model = parsed(text.replace("s = {1, 2}", "s = {1, 2}, int64 zero = {1}") if "zero" in node else text)
    HalfPrecision().convert(model, NONE)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    middle = next(found for found in model.graph if found.op_type == node.partition("(")[0].partition("<")[0])
    dtype = ir.DataType.FLOAT if stays else ir.DataType.FLOAT16
    assert middle.outputs[0].dtype == dtype
    assert len(nodes(model, "Cast")) == (4 if stays else 2)


MASKED = """
net (float[batch, 2] x, float[batch, 2] keep) => (float[batch, 2] y)
<float[2, 2] w = {{1, 2, 3, 4}}, float[2] far = {{0, 0}}, float[1] one = {{1}}>
{{ h = MatMul(x, w)  {mask}  s = Softmax(m)  y = MatMul(s, w) }}
"""
ADDED = "m = Add(h, far)"
CHOSEN = "c = Less(keep, one) m = Where(c, far, h)"
SCALED = "b = Sub(one, keep) f = Mul(b, far) m = Add(h, f)"


@pytest.mark.parametrize(
    ("mask", "in_float32", "far"),
    [
        (ADDED, ["Add"], (-np.inf, 0.0)),
        (ADDED, ["Add"], (-1e9, -1e9)),
        (CHOSEN, ["Where"], (-np.inf, -np.inf)),
        (CHOSEN, ["Where"], (-3e38, -3e38)),
        (SCALED, ["Mul", "Add"], (-3e38, -3e38)),
        (SCALED, ["Mul", "Add"], (-1e9, -1e9)),
    ],
)
def test_a_mask_beyond_float16_is_added_in_float32(
    mask: str, in_float32: list[str], far: tuple[float, float]
) -> None:
    """Where nothing is kept of a row its finite mask leaves every place alike, and a cast to float16 would not."""
    model = parsed(MASKED.format(mask=mask))
    model.graph.initializers["far"].const_value = ir.tensor(np.array(far, np.float32), name="far")
    nothing = [0, 0] if np.isfinite(far[0]) else [1, 0]
    x = {"x": np.array([[1, 2], [3, 4]], np.float32), "keep": np.array([[0, 1], nothing], np.float32)}
    (before,) = ReferenceEvaluator(ir.to_proto(model)).run(None, x)
    assert np.isfinite(before).all()

    assert HalfPrecision().convert(model, NONE) == ("w",)

    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    for operator in in_float32:
        assert all(node.outputs[0].dtype == ir.DataType.FLOAT for node in nodes(model, operator))
    assert nodes(model, "MatMul")[0].outputs[0].dtype == ir.DataType.FLOAT16
    (found,) = ReferenceEvaluator(ir.to_proto(model)).run(None, x)
    np.testing.assert_allclose(found, before, rtol=2e-3)


def test_what_is_beyond_float16_and_no_mask_is_refused_as_before() -> None:
    model = parsed(
        MASKED.format(mask="f = Add(h, far) r = LayerNormalization<axis = -1>(f, w) m = Identity(r)")
    )
    model.graph.initializers["far"].const_value = ir.tensor(np.array([-1e9], np.float32), name="far")
    with pytest.raises(GateError, match=r"far: its largest magnitude is 1e\+09"):
        HalfPrecision().convert(model, NONE)


def test_a_node_of_another_domain_stays_in_float32() -> None:
    model = parsed(OPERATORS.format(node="far.Strange(h)"))
    strange = next(node for node in model.graph if node.op_type == "Strange")
    strange.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    HalfPrecision().convert(model, NONE)
    assert dtypes([*strange.inputs, *strange.outputs]) == {ir.DataType.FLOAT}


def test_constants_and_integers_keep_their_types() -> None:
    model = parsed(
        """net (float[batch, 2] x, int64[batch, 2] i) => (float[batch, 2] y, int64[batch, 2] k)
        { c = Constant<value = float[2] {1, 2}>()  f = Cast<to = 1>(i)  s = Add(x, c)  y = Mul(s, f)
          k = Add(i, i) }"""
    )
    HalfPrecision().convert(model, NONE)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    assert [str(v.dtype) for v in model.graph.outputs] == ["FLOAT", "INT64"]
    assert nodes(model, "Constant")[0].outputs[0].dtype == ir.DataType.FLOAT


def test_a_value_read_in_both_types_is_cast_once() -> None:
    model = parsed(
        """net (float[batch, 2] x) => (float[batch, 2] y, float[batch, 2] z)
        <float[2, 2] w = {1, 2, 3, 4}>
        { y = MatMul(x, w)  a = Exp(y)  b = Softmax(y)  c = MatMul(y, w)  d = Add(a, b)  z = Add(c, d) }"""
    )
    feeds = rows(model, 5)
    expected = by_reference(model, feeds)
    HalfPrecision().convert(model, NONE)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    assert [str(value.name) for value in model.graph.outputs] == ["y", "z"]
    found = by_reference(model, feeds)
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=0, atol=16 * ROUNDOFF * np.abs(values).max())
    assert len(nodes(model, "Cast")) == 5


def test_a_graph_inside_a_node_is_refused() -> None:
    model = parsed(
        """net (float[batch, 2] x, bool on) => (float[batch, 2] y)
        { y = If (on) <then_branch = yes () => (float[batch, 2] a) { a = Relu(x) },
                       else_branch = no () => (float[batch, 2] b) { b = Tanh(x) }> }"""
    )
    with pytest.raises(GateError, match=r"\(If\) holds a graph of its own"):
        HalfPrecision().convert(model, NONE)


def test_a_value_of_unknown_type_is_refused() -> None:
    model = chain(1.0, 1.0)
    next(iter(model.graph)).outputs[0].type = None
    with pytest.raises(GateError, match=r"value 'h' of node .* has no type"):
        HalfPrecision().convert(model, NONE)


def test_the_name_tells_the_form() -> None:
    assert HalfPrecision().name == "half"
