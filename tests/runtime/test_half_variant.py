"""A bundle with a float16 variant beside fp32: weights and products in float16, inputs and outputs in float32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import te_runtime
from te_runtime.bundle import open_bundle
from te_runtime.manifest import (
    GraphSpec,
    Manifest,
    OutputParity,
    TaskParity,
    Variant,
    parse_manifest,
    serialize_manifest,
)
from te_runtime.open_device import open_device_executor
from te_runtime.predictor import choose_variant
from te_runtime.providers import CudaOptions

ROUNDOFF = 2.0**-11
MODES = ("joint", "split", "task")
KINDS = {"plain": CudaOptions(), "recorded": CudaOptions(graph_batch_sizes=(1, 4))}


@pytest.fixture(scope="module")
def root(tiny: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny bundle with both variants."""
    path = tmp_path_factory.mktemp("half") / "tiny-onnx"
    tiny.write_tiny_bundle(path, standalone=False)
    add_half_variant(path, tiny)
    return path


def add_half_variant(root: Path, tiny: ModuleType) -> None:
    manifest = parse_manifest((root / "manifest.json").read_bytes(), "manifest.json")
    (whole,) = manifest.variants
    (root / "fp16").mkdir()
    weights = HalfWeights(tiny)

    def half(spec: GraphSpec) -> GraphSpec:
        path = spec.path.replace("fp32/", "fp16/")
        model = half_graph(onnx.load(root / spec.path), weights)
        (root / path).write_bytes(model.SerializeToString(deterministic=True))
        return spec._replace(path=path)

    variant = whole._replace(
        precision="fp16",
        weights="fp16/weights.bin",
        joint=half(whole.joint),
        trunk=half(whole.trunk),
        joint_tails=half(whole.joint_tails),
        tasks=tuple(task._replace(graph=half(task.graph), tail=half(task.tail)) for task in whole.tasks),
        parity=tuple(wider(parity) for parity in whole.parity),
    )
    (root / variant.weights).write_bytes(weights.blob)
    changed: Manifest = manifest._replace(variants=(whole, variant), files=tiny.list_files(root))
    (root / "manifest.json").write_bytes(serialize_manifest(changed))


class HalfWeights:
    """weights.bin in float16, each weight once."""

    def __init__(self, tiny: ModuleType) -> None:
        self.blob = bytearray()
        self._set_external: Callable[..., None] = tiny.set_external
        self._offsets: dict[str, int] = {}

    def convert(self, tensor: TensorProto) -> TensorProto:
        values = numpy_helper.to_array(tensor)
        if values.dtype != np.float32:
            return tensor
        half = numpy_helper.from_array(values.astype(np.float16), tensor.name)
        if tensor.name not in self._offsets:
            self.blob += b"\0" * (-len(self.blob) % 64)
            self._offsets[tensor.name] = len(self.blob)
            self.blob += half.raw_data
        self._set_external(half, "weights.bin", self._offsets[tensor.name], values.size * 2)
        return half


def half_graph(model: onnx.ModelProto, weights: HalfWeights) -> onnx.ModelProto:
    """The graph with casts behind its inputs, around each Softmax and before its outputs."""
    graph = model.graph
    outputs = {value.name for value in graph.output}
    softmax = {node.output[0] for node in graph.node if node.op_type == "Softmax"}
    nodes = [cast(value.name, f"{value.name}/half", TensorProto.FLOAT16) for value in graph.input]
    halves = {value.name: f"{value.name}/half" for value in graph.input}
    halves |= {name: f"{name}/half" for name in outputs | softmax}
    for node in graph.node:
        names = [halves.get(name, name) for name in node.input]
        if node.op_type == "Softmax":
            nodes.append(cast(names[0], f"{names[0]}/whole", TensorProto.FLOAT))
            names = [f"{names[0]}/whole"]
        changed = helper.make_node(node.op_type, names, list(node.output))
        changed.attribute.extend(node.attribute)
        nodes.append(changed)
        (name,) = node.output
        if name in softmax:
            nodes.append(cast(name, halves[name], TensorProto.FLOAT16))
        elif name in outputs:
            changed.output[0] = halves[name]
            nodes.append(cast(halves[name], name, TensorProto.FLOAT))
    initializers = [weights.convert(tensor) for tensor in graph.initializer]
    half = helper.make_graph(nodes, graph.name, graph.input, graph.output, initializers)
    return helper.make_model(half, opset_imports=model.opset_import, ir_version=model.ir_version)


def cast(name: str, output: str, to: int) -> onnx.NodeProto:
    return helper.make_node("Cast", [name], [output], to=to)


def wider(parity: TaskParity) -> TaskParity:
    """Bounds for float16: the unit roundoff is 2^13 times that of float32, for which the tiny bundle's are."""

    def wide(output: OutputParity) -> OutputParity:
        groups = tuple(group._replace(bound=group.bound * 2**13) for group in output.groups)
        return output._replace(groups=groups)

    weights = None if parity.routing_weights is None else wide(parity.routing_weights)
    return parity._replace(prediction=wide(parity.prediction), routing_weights=weights)


def rows(count: int) -> np.ndarray:
    return np.random.default_rng(count).normal(size=(count, 6)).astype(np.float32)


def assert_close(found: te_runtime.Prediction, expected: te_runtime.Prediction) -> None:
    """Within 64 roundings of the largest value: four products, none wider than 16."""
    for ours, theirs in (
        (found.output, expected.output),
        (found.routing_weights, expected.routing_weights),
    ):
        assert ours.dtype == np.float32
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=64 * ROUNDOFF * max(1, np.abs(theirs).max()))


def test_cuda_takes_the_float16_variant_and_the_cpu_the_first(root: Path) -> None:
    manifest = open_bundle(root).manifest
    assert choose_variant(manifest, None, "cpu").precision == "fp32"
    assert choose_variant(manifest, None, "cuda").precision == "fp16"
    assert choose_variant(manifest, "fp32", "cuda").precision == "fp32"


@pytest.mark.parametrize("mode", MODES)
def test_the_cpu_runs_it_where_it_is_asked_for(root: Path, mode: str) -> None:
    with (
        te_runtime.load(root, precision="fp16", mode=mode) as half,
        te_runtime.load(root, precision="fp32", mode=mode) as whole,
    ):
        assert half.precision == "fp16"
        for count in (0, 1, 2, 7, 64):
            expected = whole.predict(rows(count)) if count else {}
            found = half.predict(rows(count))
            assert {task: len(found[task].output) for task in half.tasks} == dict.fromkeys(half.tasks, count)
            for task, prediction in expected.items():
                assert_close(found[task], prediction)


def test_its_golden_rows_are_compared_with_its_own_bounds(root: Path) -> None:
    for precision in ("fp32", "fp16"):
        with te_runtime.load(root, precision=precision) as model:
            assert model.verify().ok


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_values_between_its_graphs_are_float32_on_a_device(root: Path, mode: str, kind: str) -> None:
    """Bindings of outputs are made in the manifest's dtypes, which are those of fp32."""
    bundle = open_bundle(root)
    variants: dict[str, Variant] = {variant.precision: variant for variant in bundle.manifest.variants}
    half, whole = (
        open_device_executor(bundle, variants[name], mode, provider="cpu", threads=1, cuda=KINDS[kind])
        for name in ("fp16", "fp32")
    )
    for count in (1, 4, 3):
        feeds = {"x": rows(count)}
        expected = whole.run(feeds, count, ["task_0", "task_1"])
        for task, found in half.run(feeds, count, ["task_0", "task_1"]).items():
            assert_close(found, expected[task])
    assert {spec.dtype for spec in variants["fp16"].trunk.outputs} == {"float32"}


@pytest.mark.cuda
@pytest.mark.parametrize("options", [None, CudaOptions(graph_batch_sizes=(4,))], ids=["plain", "recorded"])
def test_cuda_runs_it_by_default(root: Path, gpu: str, options: CudaOptions | None) -> None:
    with te_runtime.load(root) as whole:
        expected = whole.predict(rows(4))
    with te_runtime.load(root, provider="cuda", cuda=options) as half:
        assert half.precision == "fp16"
        assert half.verify().ok
        for task, found in half.predict(rows(4)).items():
            assert_close(found, expected[task])
