"""Writes a tiny, real, seeded bundle: a multi-task mixture of experts, and its golden rows.

x (B, 6) → Gemm, Relu → h (B, 5) → stacked experts → experts (B, K, 4) → per task: gate, fusion, head. Gates read
the experts, or the model's inputs. Without a trunk each task graph holds it all.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from te_runtime.manifest import (
    FORMAT_NAME,
    FORMAT_VERSION,
    FileEntry,
    Golden,
    GraphSpec,
    GroupParity,
    Manifest,
    ModelInfo,
    OutputParity,
    Producer,
    RowGroup,
    TaskGraphs,
    TaskParity,
    TaskSpec,
    TaskUtilization,
    TensorSpec,
    Variant,
    seal_manifest,
    serialize_manifest,
)

FEATURES, HIDDEN, WIDTH = 6, 5, 4
GROUPS = (RowGroup("ordinary", 5), RowGroup("large", 3))
WEIGHTS = "fp32/weights.bin"


@dataclass(frozen=True)
class TinyOptions:
    seed: int = 0
    experts: int = 3
    outputs: dict[str, int] = field(default_factory=lambda: {"task_0": 2, "task_1": 2})
    gated: bool = True
    gates_read_inputs: bool = False
    trunk: bool = True
    two_inputs: bool = False
    standalone: bool = True
    joint_tails: bool = True
    hidden: int = HIDDEN


class TinyBundle:
    """Builds the parts; write() puts them in a folder."""

    def __init__(self, options: TinyOptions) -> None:
        self.options = options
        self.rng = np.random.default_rng(options.seed)
        self.weights = self._make_weights()
        self.blob, self.offsets = _pack(self.weights)
        self.inputs = [TensorSpec("x", "float32", ("batch", FEATURES))]
        if options.two_inputs:
            self.inputs.append(TensorSpec("z", "float32", ("batch", 2)))
        self.tasks = tuple(self._task_spec(name, out) for name, out in options.outputs.items())

    def _make_weights(self) -> dict[str, np.ndarray]:
        wide = FEATURES + (2 if self.options.two_inputs else 0)
        k = self.options.experts
        hidden = self.options.hidden
        shapes = {"backbone.w": (wide, hidden), "backbone.b": (hidden,), "experts.w": (hidden, k * WIDTH)}
        shapes["experts.b"] = (k * WIDTH,)
        for task, out in self.options.outputs.items():
            gate_wide = wide if self.options.gates_read_inputs else k * WIDTH
            shapes |= {f"{task}.gate.w": (gate_wide, k), f"{task}.gate.b": (k,)}
            shapes |= {f"{task}.head.w": (WIDTH, out), f"{task}.head.b": (out,)}
        return {name: self.rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}

    def _task_spec(self, name: str, out: int) -> TaskSpec:
        weights = TensorSpec("routing_weights", "float32", ("batch", self.options.experts))
        return TaskSpec(
            name,
            TensorSpec("prediction", "float32", ("batch", out)),
            weights if self.options.gated else None,
        )

    def oracle(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """float64 outputs by their name in golden.npz."""
        w = {name: value.astype(np.float64) for name, value in self.weights.items()}
        x = np.concatenate([feeds[spec.name] for spec in self.inputs], axis=1).astype(np.float64)
        h = np.maximum(x @ w["backbone.w"] + w["backbone.b"], 0)
        flat = np.maximum(h @ w["experts.w"] + w["experts.b"], 0)
        experts = flat.reshape(len(x), self.options.experts, WIDTH)
        answers = {}
        for task in self.options.outputs:
            fused = experts.mean(axis=1)
            if self.options.gated:
                logits = (x if self.options.gates_read_inputs else flat) @ w[f"{task}.gate.w"] + w[
                    f"{task}.gate.b"
                ]
                weights = np.exp(logits - logits.max(axis=1, keepdims=True))
                weights /= weights.sum(axis=1, keepdims=True)
                fused = np.einsum("bk,bkd->bd", weights, experts)
                answers[f"{task}.routing_weights"] = weights
            answers[f"{task}.prediction"] = fused @ w[f"{task}.head.w"] + w[f"{task}.head.b"]
        return answers

    def golden_inputs(self) -> dict[str, np.ndarray]:
        scale = np.repeat([1.0, 8.0], [group.rows for group in GROUPS])[:, None]
        rows = len(scale)
        return {
            spec.name: (self.rng.normal(size=(rows, spec.shape[1])) * scale).astype(np.float32)
            for spec in self.inputs
        }

    def write(self, root: Path) -> Manifest:
        """Write the whole bundle and return its manifest."""
        (root / "fp32").mkdir(parents=True)
        (root / WEIGHTS).write_bytes(self.blob)
        variant_graphs = self._write_graphs(root)
        feeds = self.golden_inputs()
        answers = self.oracle(feeds)
        inputs = {f"input.{name}": value for name, value in feeds.items()}
        np.savez(root / "golden.npz", allow_pickle=False, **inputs, **answers)
        manifest = self._manifest(root, variant_graphs, answers)
        (root / "manifest.json").write_bytes(serialize_manifest(manifest))
        return manifest

    def _write_graphs(self, root: Path) -> dict[str, GraphSpec]:
        experts = TensorSpec("experts", "float32", ("batch", self.options.experts, WIDTH))
        graphs = {}
        if self.options.trunk:
            graphs["trunk"] = self._graph(root, "trunk", self.inputs, [experts], self._trunk_nodes())
        reading = [*self.inputs, experts] if self.options.gates_read_inputs else [experts]
        all_tails: list[onnx.NodeProto] = []
        joint_outputs: list[TensorSpec] = []
        for task in self.tasks:
            own = self._promises(task, "")
            tail = self._tail_nodes(task.name, "")
            if self.options.trunk:
                graphs[f"tail-{task.name}"] = self._graph(root, f"tail-{task.name}", reading, own, tail)
            whole = self._trunk_nodes() + tail
            graphs[f"task-{task.name}"] = self._graph(root, f"task-{task.name}", self.inputs, own, whole)
            if self.options.standalone:
                name = f"standalone-{task.name}"
                graphs[name] = self._graph(root, name, self.inputs, own, whole, inline=True)
            joint_outputs += self._promises(task, f"{task.name}.")
            all_tails += self._tail_nodes(task.name, f"{task.name}.")
        joint_nodes = self._trunk_nodes() + all_tails
        graphs["joint"] = self._graph(root, "joint", self.inputs, joint_outputs, joint_nodes)
        if self.options.trunk and self.options.joint_tails and len(self.tasks) > 1:
            graphs["joint-tails"] = self._graph(root, "joint-tails", reading, joint_outputs, all_tails)
        return graphs

    def _promises(self, task: TaskSpec, prefix: str) -> list[TensorSpec]:
        specs = [task.prediction] + ([task.routing_weights] if task.routing_weights else [])
        return [TensorSpec(prefix + spec.name, spec.dtype, spec.shape) for spec in specs]

    def _trunk_nodes(self) -> list[onnx.NodeProto]:
        names = [spec.name for spec in self.inputs]
        return [
            helper.make_node("Concat", names, ["joined"], axis=1),
            helper.make_node("Gemm", ["joined", "backbone.w", "backbone.b"], ["h0"]),
            helper.make_node("Relu", ["h0"], ["h"]),
            helper.make_node("Gemm", ["h", "experts.w", "experts.b"], ["e0"]),
            helper.make_node("Relu", ["e0"], ["e"]),
            helper.make_node("Reshape", ["e", "to_experts"], ["experts"]),
        ]

    def _tail_nodes(self, task: str, prefix: str) -> list[onnx.NodeProto]:
        def own(name: str) -> str:
            return f"{task}/{name}"

        weights = f"{prefix}routing_weights"
        nodes = [helper.make_node("ReduceMean", ["experts"], [own("fused")], axes=[1], keepdims=0)]
        if self.options.gated:
            read = helper.make_node("Flatten", ["experts"], [own("flat")], axis=1)
            if self.options.gates_read_inputs:
                names = [spec.name for spec in self.inputs]
                read = helper.make_node("Concat", names, [own("flat")], axis=1)
            nodes = [
                read,
                helper.make_node("Gemm", [own("flat"), f"{task}.gate.w", f"{task}.gate.b"], [own("logits")]),
                helper.make_node("Softmax", [own("logits")], [weights], axis=-1),
                helper.make_node("Unsqueeze", [weights, "axis_1"], [own("row")]),
                helper.make_node("MatMul", [own("row"), "experts"], [own("fused3")]),
                helper.make_node("Squeeze", [own("fused3"), "axis_1"], [own("fused")]),
            ]
        head = [own("fused"), f"{task}.head.w", f"{task}.head.b"]
        return [*nodes, helper.make_node("Gemm", head, [f"{prefix}prediction"])]

    def _graph(
        self,
        root: Path,
        name: str,
        inputs: list[TensorSpec],
        outputs: list[TensorSpec],
        nodes: list[onnx.NodeProto],
        *,
        inline: bool = False,
    ) -> GraphSpec:
        read = {value for node in nodes for value in node.input}
        initializers = [self._initializer(key, inline) for key in self.weights if key in read]
        constants = {"to_experts": [-1, self.options.experts, WIDTH], "axis_1": [1]}
        for key, value in constants.items():
            if key in read:
                initializers.append(numpy_helper.from_array(np.array(value, dtype=np.int64), key))
        graph = helper.make_graph(nodes, name, _values(inputs), _values(outputs), initializers)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
        path = f"fp32/{name}.onnx"
        (root / path).write_bytes(model.SerializeToString(deterministic=True))
        return GraphSpec(path, tuple(inputs), tuple(outputs))

    def _initializer(self, name: str, inline: bool) -> TensorProto:
        tensor = numpy_helper.from_array(self.weights[name], name)
        if not inline:
            offset, length = self.offsets[name]
            set_external(tensor, "weights.bin", offset, length)
        return tensor

    def _manifest(self, root: Path, graphs: dict[str, GraphSpec], answers: dict[str, np.ndarray]) -> Manifest:
        tasks = tuple(
            TaskGraphs(
                task.name,
                graphs[f"task-{task.name}"],
                graphs[f"tail-{task.name}" if self.options.trunk else f"task-{task.name}"],
                graphs.get(f"standalone-{task.name}"),
            )
            for task in self.tasks
        )
        parity = tuple(
            TaskParity(
                task.name,
                _parity(answers[f"{task.name}.prediction"]),
                _parity(answers[f"{task.name}.routing_weights"]) if task.routing_weights else None,
            )
            for task in self.tasks
        )
        k = self.options.experts
        zeros = (0.0,) * k
        return Manifest(
            format=FORMAT_NAME,
            version=FORMAT_VERSION,
            checksum="",
            model=ModelInfo(
                "tiny", {"experts": k, "gated": self.options.gated}, "0" * 64, len(self.blob), ()
            ),
            producer=Producer("0.1.0", "2.13.0", "1.23.2", "0.7.2", "1.31.1", 17),
            inputs=tuple(self.inputs),
            tasks=self.tasks,
            variants=(
                Variant(
                    precision="fp32",
                    form="float32",
                    optimized="none",
                    target_provider="cpu",
                    weights=WEIGHTS,
                    joint=graphs["joint"],
                    trunk=graphs.get("trunk"),
                    joint_tails=graphs.get("joint-tails"),
                    tasks=tasks,
                    kept_weights=(),
                    accuracy=(),
                    parity=parity,
                ),
            ),
            golden=Golden("golden.npz", GROUPS),
            utilization=tuple(TaskUtilization(t.name, zeros, zeros, zeros, (0,) * k) for t in self.tasks),
            files=list_files(root),
        )


def write_tiny_bundle(root: Path, **options: Any) -> Manifest:
    """Write a bundle with TinyOptions(**options) into the new folder `root`."""
    return TinyBundle(TinyOptions(**options)).write(root)


def set_external(tensor: TensorProto, location: str, offset: int, length: int) -> None:
    """Make a tensor external data."""
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    del tensor.external_data[:]
    for key, value in (("location", location), ("offset", str(offset)), ("length", str(length))):
        tensor.external_data.add(key=key, value=value)


def list_files(root: Path) -> tuple[FileEntry, ...]:
    """Every file but the manifest, with size and sha256."""
    entries = []
    for path in sorted(root.rglob("*")):
        if path.is_file() and path.name != "manifest.json":
            data = path.read_bytes()
            digest = hashlib.sha256(data).hexdigest()
            entries.append(FileEntry(path.relative_to(root).as_posix(), len(data), digest))
    return tuple(entries)


def edit_manifest(root: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Change manifest.json as data."""
    path = root / "manifest.json"
    data = json.loads(path.read_text())
    edit(data)
    path.write_bytes(seal_manifest(json.dumps(data).encode()))


def rehash(root: Path) -> None:
    """Make the manifest's list of files true again after a file was changed."""
    entries = [{"path": e.path, "size_bytes": e.size_bytes, "sha256": e.sha256} for e in list_files(root)]
    edit_manifest(root, lambda data: data.update(files=entries))


def edit_graph(root: Path, name: str, edit: Callable[[onnx.ModelProto], object]) -> None:
    """Change a graph, and keep the manifest's checksums true."""
    path = root / "fp32" / f"{name}.onnx"
    model = onnx.load(path, load_external_data=False)
    edit(model)
    path.write_bytes(model.SerializeToString())
    rehash(root)


def edit_golden(
    root: Path, edit: Callable[[dict[str, np.ndarray]], object], *, pickled: bool = False
) -> None:
    """Change golden.npz, and keep the manifest's checksums true."""
    path = root / "golden.npz"
    with np.load(path, allow_pickle=False) as archive:
        arrays = dict(archive)
    edit(arrays)
    np.savez(path, allow_pickle=pickled, **arrays)
    rehash(root)


def _pack(weights: dict[str, np.ndarray]) -> tuple[bytes, dict[str, tuple[int, int]]]:
    blob, offsets = bytearray(), {}
    for name, value in weights.items():
        blob += b"\0" * (-len(blob) % 4096)
        offsets[name] = (len(blob), value.nbytes)
        blob += value.tobytes()
    return bytes(blob), offsets


def _values(specs: list[TensorSpec]) -> list[onnx.ValueInfoProto]:
    return [helper.make_tensor_value_info(s.name, TensorProto.FLOAT, s.shape) for s in specs]


def _parity(oracle: np.ndarray) -> OutputParity:
    """float32 through four short products keeps 1e-6 of the largest value; ten times that is the bound."""
    groups, start = [], 0
    for group in GROUPS:
        largest = float(np.abs(oracle[start : start + group.rows]).max())
        groups.append(GroupParity(group.name, group.rows, largest * 1e-7, largest * 1e-7, largest * 1e-5))
        start += group.rows
    worst = max(group.max_abs_error for group in groups)
    return OutputParity(worst, 1e-7, worst, 1e-7, 1.0, worst, worst, 1.0, 1.0, tuple(groups))
