"""Parity is what an independent check finds, and whatever makes a staged graph wrong is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import te_export
from te_export.bundle.staged_graphs import StagedGraphs
from te_export.errors import GateError, ParityError
from te_export.verify.batches import plan_batches
from te_export.verify.parity import verify_graphs
from te_export.verify.references import OutputReference, References
from te_export.verify.tolerance import Tolerance

Staged = Callable[[Path], StagedGraphs]
TASKS = ("task_0", "task_1", "task_2")


@pytest.fixture
def bundle(exported: te_export.ExportResult, tmp_path: Path) -> Path:
    """A copy of the exported bundle that the test may damage."""
    return Path(shutil.copytree(exported.bundle, tmp_path / "bundle"))


def run_in_batches(path: Path, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Every output over the concatenated batches, by onnxruntime alone."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    rows = len(next(iter(feeds.values())))
    parts = [session.run(names, {k: v[batch] for k, v in feeds.items()}) for batch in plan_batches(rows)]
    return dict(zip(names, (np.concatenate(columns) for columns in zip(*parts, strict=True)), strict=True))


def test_the_graphs_as_exported_pass(
    bundle: Path, references: References, staged_graphs: Staged, exported: te_export.ExportResult
) -> None:
    found = verify_graphs(staged_graphs(bundle), references, Tolerance())

    assert found == exported.manifest.variants[0].parity


@pytest.mark.parametrize("task", TASKS)
def test_the_figures_are_what_an_independent_check_finds(
    task: str, bundle: Path, references: References, exported: te_export.ExportResult
) -> None:
    x = references.rows.x.arrays["x"]
    joint = run_in_batches(bundle / "fp32/joint.onnx", {"x": x})
    alone = run_in_batches(bundle / f"fp32/task-{task}.onnx", {"x": x})
    single = run_in_batches(bundle / f"fp32/standalone-{task}.onnx", {"x": x})
    index = np.concatenate(plan_batches(len(x)))
    (parity,) = [entry for entry in exported.manifest.variants[0].parity if entry.task == task]

    for output in ("prediction", "routing_weights"):
        figures = getattr(parity, output)
        exact = getattr(references.tasks[task], output).oracle[index]
        runs = [joint[f"{task}.{output}"], alone[output], single[output]]
        errors = np.max([np.abs(found - exact) for found in runs], axis=0)
        for group, (name, start, stop) in zip(figures.groups, references.rows.groups, strict=True):
            inside = (index >= start) & (index < stop)
            assert group.group == name
            assert group.rows == stop - start
            # The tail is one graph more, run on the trunk's output: it can only be worse.
            assert group.max_abs_error >= errors[inside].max() * (1 - 1e-9)
            assert group.max_abs_error <= group.bound
        assert figures.max_abs_error == max(group.max_abs_error for group in figures.groups)
        ordinary = errors[index < 320]
        assert figures.rms_error >= max(np.sqrt(np.mean((r - exact)[index < 320] ** 2)) for r in runs) * (
            1 - 1e-9
        )
        assert figures.rms_error <= ordinary.max() * 1.5
        agreement = [np.mean(r.argmax(axis=1) == exact.argmax(axis=1)) for r in runs]
        if exact.shape[1] == 1:
            assert figures.argmax_agreement is None
        else:
            assert figures.argmax_agreement <= min(agreement)
            assert figures.argmax_agreement > 0.99


def test_the_tails_count_too(bundle: Path, references: References, exported: te_export.ExportResult) -> None:
    x = references.rows.x.arrays["x"]
    index = np.concatenate(plan_batches(len(x)))
    trunk = onnxruntime.InferenceSession(str(bundle / "fp32/trunk.onnx"), providers=["CPUExecutionProvider"])
    tail = onnxruntime.InferenceSession(
        str(bundle / "fp32/tail-task_0.onnx"), providers=["CPUExecutionProvider"]
    )
    found = np.concatenate(
        [
            tail.run(["prediction"], {"expert_features": trunk.run(None, {"x": x[batch]})[0]})[0]
            for batch in plan_batches(len(x))
        ]
    )

    error = np.abs(found - references.tasks["task_0"].prediction.oracle[index]).max()

    assert exported.manifest.variants[0].parity[0].prediction.max_abs_error >= error * (1 - 1e-9)


def largest_parameters() -> list[str]:
    """Every layer of the written graphs, by how its weight's name begins; the backbone's last is folded away."""
    names = ["backbone.network.0.weight", "backbone.network.3.weight"]
    names += [f"experts.0.network.{layer}.weight" for layer in (0, 3, 6)]
    names += ["gating_networks.0.gate.0.weight", "gating_networks.0.gate.2.weight"]
    return [*names, "task_heads.0.head.0.weight", "task_heads.0.head.3.weight"]


def negate_largest(bundle: Path, name: str) -> None:
    """Flip the sign bit of a tensor's largest value, where the joint graph keeps it: in weights.bin, or inside each
    graph."""
    weights = bundle / "fp32/weights.bin"
    for path in sorted((bundle / "fp32").glob("*.onnx")):
        model = onnx.load(path, load_external_data=False)
        for tensor in model.graph.initializer:
            if not tensor.name.startswith(name):
                continue
            where = {entry.key: entry.value for entry in tensor.external_data}
            if where:
                data = bytearray(weights.read_bytes())
                values = np.frombuffer(data, "<f4", int(where["length"]) // 4, int(where["offset"]))
                values[np.abs(values).argmax()] *= -1
                weights.write_bytes(bytes(data))
                return
            values = numpy_helper.to_array(tensor).copy()
            values.reshape(-1)[np.abs(values).argmax()] *= -1
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
            onnx.save(model, path)


@pytest.mark.parametrize("name", largest_parameters())
def test_one_wrong_sign_anywhere_in_the_weights_is_refused(
    name: str, bundle: Path, references: References, staged_graphs: Staged
) -> None:
    before = {path: path.read_bytes() for path in (bundle / "fp32").iterdir()}
    negate_largest(bundle, name)
    assert {path: path.read_bytes() for path in (bundle / "fp32").iterdir()} != before

    with pytest.raises(ParityError, match=r"checks against the float64 oracle failed; nothing was written"):
        verify_graphs(staged_graphs(bundle), references, Tolerance())


def test_the_message_names_graph_output_rows_and_both_figures(
    bundle: Path, references: References, staged_graphs: Staged
) -> None:
    shutil.copy(bundle / "fp32/task-task_2.onnx", bundle / "fp32/task-task_0.onnx")

    with pytest.raises(ParityError) as caught:
        verify_graphs(staged_graphs(bundle), references, Tolerance())

    message = str(caught.value)
    assert "task task_0: fp32/task-task_0.onnx, prediction, ordinary rows: max error" in message
    assert "allowed" in message
    assert "4 times torch float32's own error" in message
    assert "joint" not in message
    assert "task_2," not in message
    assert len(message.splitlines()) < 20


def test_the_joint_tails_are_judged(bundle: Path, references: References, staged_graphs: Staged) -> None:
    """The routing weights of two tasks change places there, which only the numbers tell."""
    path = bundle / "fp32/joint-tails.onnx"
    model = onnx.load(path, load_external_data=False)
    (split,) = [node for node in model.graph.node if "task_0.routing_weights" in node.output]
    names = list(split.output)
    first, second = names.index("task_0.routing_weights"), names.index("task_2.routing_weights")
    split.output[first], split.output[second] = names[second], names[first]
    onnx.save(model, path)

    with pytest.raises(ParityError) as caught:
        verify_graphs(staged_graphs(bundle), references, Tolerance())
    message = str(caught.value)
    assert "task task_0: fp32/joint-tails.onnx, task_0.routing_weights, ordinary rows" in message
    assert "joint.onnx" not in message
    assert ".prediction" not in message


@pytest.mark.parametrize("kind", ["task", "tail", "standalone"])
def test_graphs_of_two_tasks_in_each_others_place_are_refused(
    kind: str, bundle: Path, references: References, staged_graphs: Staged
) -> None:
    """Their interfaces are the same, so only the numbers can tell."""
    first, second = bundle / f"fp32/{kind}-task_0.onnx", bundle / f"fp32/{kind}-task_2.onnx"
    data = first.read_bytes(), second.read_bytes()
    first.write_bytes(data[1])
    second.write_bytes(data[0])

    with pytest.raises(ParityError, match=f"{kind}-task_0.onnx"):
        verify_graphs(staged_graphs(bundle), references, Tolerance())


def test_outputs_in_each_others_place_are_refused(
    bundle: Path, references: References, staged_graphs: Staged
) -> None:
    path = bundle / "fp32/task-task_0.onnx"
    model = onnx.load(path, load_external_data=False)
    model.graph.output[0].name, model.graph.output[1].name = "routing_weights", "prediction"
    onnx.save(model, path)

    with pytest.raises(ParityError, match=r"task-task_0\.onnx.*routing_weights"):
        verify_graphs(staged_graphs(bundle), references, Tolerance())


def scaled_at(model: onnx.ModelProto, rows: int, factor: float) -> None:
    """Multiply the prediction by `factor` in batches of exactly `rows` rows."""
    graph = model.graph
    inner = "prediction_before"
    for node in graph.node:
        node.output[:] = [inner if name == "prediction" else name for name in node.output]
    constants = {"rows": np.array([rows]), "factor": np.float32([[factor]]), "one": np.float32([[1.0]])}
    graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in constants.items())
    graph.node.extend(
        [
            helper.make_node("Shape", [inner], ["batch_rows"], start=0, end=1),
            helper.make_node("Equal", ["batch_rows", "rows"], ["is_that_size"]),
            helper.make_node("Where", ["is_that_size", "factor", "one"], ["scale"]),
            helper.make_node("Mul", [inner, "scale"], ["prediction"]),
        ]
    )


@pytest.mark.parametrize("rows", [1, 2, 7, 64])
@pytest.mark.parametrize("kind", ["task", "tail", "standalone"])
def test_a_graph_that_is_wrong_at_one_batch_size_is_refused(
    kind: str, rows: int, bundle: Path, references: References, staged_graphs: Staged
) -> None:
    path = bundle / f"fp32/{kind}-task_0.onnx"
    model = onnx.load(path, load_external_data=False)
    scaled_at(model, rows, 1.001)
    onnx.save(model, path)

    with pytest.raises(ParityError, match=f"{kind}-task_0.onnx, prediction"):
        verify_graphs(staged_graphs(bundle), references, Tolerance())


def test_a_graph_whose_batch_axis_is_baked_in_is_refused(
    bundle: Path, references: References, staged_graphs: Staged
) -> None:
    """The interface says `batch`, a Reshape inside says 64."""
    path = bundle / "fp32/tail-task_1.onnx"
    model = onnx.load(path, load_external_data=False)
    (reshape,) = [
        node for node in model.graph.node if "expert_features" in node.input and node.op_type == "Reshape"
    ]
    for tensor in model.graph.initializer:
        if tensor.name == reshape.input[1]:
            tensor.CopyFrom(numpy_helper.from_array(np.array([64, 24]), tensor.name))
    onnx.save(model, path)

    with pytest.raises(ParityError, match=r"tail-task_1\.onnx"):
        verify_graphs(staged_graphs(bundle), references, Tolerance())


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_outputs_that_are_no_numbers_are_refused(
    bad: float, bundle: Path, references: References, staged_graphs: Staged
) -> None:
    path = bundle / "fp32/task-task_1.onnx"
    model = onnx.load(path, load_external_data=False)
    scaled_at(model, 1, bad)
    onnx.save(model, path)

    with pytest.raises(ParityError, match="max error inf, allowed"):
        verify_graphs(staged_graphs(bundle), references, Tolerance())
    with pytest.raises(ParityError, match="max error inf, allowed"):
        verify_graphs(staged_graphs(bundle), references, Tolerance(atol=1e30, rtol=1e30))


def test_routing_weights_that_do_not_sum_to_one_are_refused_even_where_the_tolerance_is_wide(
    bundle: Path, references: References, staged_graphs: Staged
) -> None:
    path = bundle / "fp32/task-task_0.onnx"
    model = onnx.load(path, load_external_data=False)
    (softmax,) = [node for node in model.graph.node if node.op_type == "Softmax"]
    softmax.output[0] = "before"
    model.graph.initializer.append(numpy_helper.from_array(np.float32([[1.001]]), "factor"))
    position = list(model.graph.node).index(softmax)
    model.graph.node.insert(position + 1, helper.make_node("Mul", ["before", "factor"], ["routing_weights"]))
    onnx.save(model, path)

    with pytest.raises(ParityError, match=r"a row sums to 1 ± 0\.001"):
        verify_graphs(staged_graphs(bundle), references, Tolerance(atol=1.0))


def test_a_file_that_onnxruntime_refuses_is_a_failed_gate(
    bundle: Path, references: References, staged_graphs: Staged
) -> None:
    (bundle / "fp32/joint.onnx").write_bytes(b"no graph")

    with pytest.raises(ParityError, match=r"joint\.onnx"):
        verify_graphs(staged_graphs(bundle), references, Tolerance())


def test_another_interface_than_the_manifests_is_a_failed_gate(
    bundle: Path, references: References, staged_graphs: Staged
) -> None:
    path = bundle / "fp32/trunk.onnx"
    model = onnx.load(path, load_external_data=False)
    model.graph.input[0].type.CopyFrom(helper.make_tensor_type_proto(TensorProto.FLOAT, [64, 20]))
    onnx.save(model, path)

    with pytest.raises(ParityError, match=r"trunk\.onnx"):
        verify_graphs(staged_graphs(bundle), references, Tolerance())


def test_the_callers_tolerance_replaces_the_bound(
    bundle: Path, references: References, staged_graphs: Staged
) -> None:
    staged = staged_graphs(bundle)

    (parity, *_) = verify_graphs(staged, references, Tolerance(atol=1.0))
    assert {group.bound for group in parity.prediction.groups} == {1.0}

    with pytest.raises(ParityError, match=r"Allowed: --atol 0 --rtol 0\.(?s:.)*Loosen --atol or --rtol"):
        verify_graphs(staged, references, Tolerance(atol=0.0))


def test_there_is_no_bound_where_torch_itself_is_not_finite(
    bundle: Path, references: References, staged_graphs: Staged
) -> None:
    reference = references.tasks["task_1"].prediction
    torchs = reference.torch.copy()
    torchs[3] = np.inf
    broken = References(
        **{
            **vars(references),
            "tasks": {
                **references.tasks,
                "task_1": type(references.tasks["task_1"])(
                    prediction=OutputReference(**{**vars(reference), "torch": torchs}),
                    routing_weights=references.tasks["task_1"].routing_weights,
                ),
            },
        }
    )

    with pytest.raises(GateError, match="not finite"):
        verify_graphs(staged_graphs(bundle), broken, Tolerance())


def test_the_manifest_has_only_finite_figures(exported: te_export.ExportResult) -> None:
    text = (exported.bundle / "manifest.json").read_text()

    assert json.loads(text, parse_constant=pytest.fail)


# Through the whole pipeline: a graph that is wrong leaves no bundle


@pytest.fixture
def corrupting(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pipeline's writer, followed by one flipped bit in weights.bin."""
    from te_export import pipeline

    write = pipeline.write_variant

    def write_and_corrupt(staged: object, *rest: object, **options: object) -> StagedGraphs:
        graphs = write(staged, *rest, **options)  # type: ignore[arg-type]
        weights = graphs.root / "fp32/weights.bin"
        data = bytearray(weights.read_bytes())
        data[0:48:4] = bytes(byte ^ 0xFF for byte in data[0:48:4])
        data[3:4000:4] = bytes(byte ^ 0x80 for byte in data[3:4000:4])
        weights.write_bytes(bytes(data))
        return graphs

    monkeypatch.setattr(pipeline, "write_variant", write_and_corrupt)


@pytest.mark.usefixtures("corrupting")
def test_a_failed_gate_leaves_no_bundle_and_replaces_none(
    exported: te_export.ExportResult, tmp_path: Path
) -> None:
    checkpoint = exported.bundle.parent / "model.pt"
    target = Path(shutil.copytree(exported.bundle, tmp_path / "old"))
    before = {path: path.read_bytes() for path in target.rglob("*") if path.is_file()}

    with pytest.raises(ParityError):
        te_export.export(checkpoint, target, te_export.ExportOptions(force=True))

    assert {path: path.read_bytes() for path in target.rglob("*") if path.is_file()} == before
    assert list(tmp_path.iterdir()) == [target]
