"""What te_export writes, te_runtime runs: exported for real, read back whole, predicted, checked and refused."""

from __future__ import annotations

import io
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx.external_data_helper import uses_external_data

import te_export
import te_runtime
from te_export.models.task_expert import TaskExpertConfig, TaskExpertModel
from te_runtime.bundle import open_bundle
from te_runtime.errors import BundleError

OUTPUTS = {"click": 4, "buy": 1, "like": 3}
BATCHES = (0, 1, 2, 7, 64)


def make_model(
    seed: int, outputs: tuple[int, ...], *, num_experts: int = 3, input_dim: int = 20, width: int = 24
) -> TaskExpertModel:
    """A model with seeded N(0, 1/fan_in) weights."""
    config = TaskExpertConfig(
        input_dim=input_dim,
        backbone_dim=width,
        expert_dim=max(2, width // 3),
        num_experts=num_experts,
        num_tasks=len(outputs),
        task_output_dims=outputs,
    )
    model = TaskExpertModel(config)
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            values = rng.standard_normal(parameter.shape) / math.sqrt(parameter.shape[-1])
            parameter.copy_(torch.from_numpy(values))
    return model.eval()


@pytest.fixture(scope="module")
def model() -> TaskExpertModel:
    return make_model(21, tuple(OUTPUTS.values()))


@pytest.fixture(scope="module")
def result(model: TaskExpertModel, tmp_path_factory: pytest.TempPathFactory) -> te_export.ExportResult:
    """One export with standalone graphs. Not to be changed."""
    folder = tmp_path_factory.mktemp("first")
    torch.save(model.state_dict(), folder / "model.pt")
    options = te_export.ExportOptions(task_names=tuple(OUTPUTS), standalone=True)
    return te_export.export(folder / "model.pt", options=options)


@pytest.fixture(scope="module")
def loaded(result: te_export.ExportResult) -> Iterator[te_runtime.Model]:
    with te_runtime.load(result.bundle, provider="cpu", threads=1) as loaded:
        yield loaded


@pytest.fixture
def bundle(result: te_export.ExportResult, tmp_path: Path) -> Path:
    """A copy that the test may damage."""
    return Path(shutil.copytree(result.bundle, tmp_path / "copy"))


def files(bundle: Path) -> dict[str, bytes]:
    return {
        path.relative_to(bundle).as_posix(): path.read_bytes() for path in bundle.rglob("*") if path.is_file()
    }


@torch.no_grad()
def oracle(model: TaskExpertModel, x: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Prediction and routing weights of each task in float64."""
    wide = make_model(21, tuple(OUTPUTS.values())).double()
    wide.load_state_dict({name: tensor.double() for name, tensor in model.state_dict().items()})
    answers = {}
    for task, name in enumerate(OUTPUTS):
        prediction, aux = wide(torch.from_numpy(x).double(), task)
        answers[name] = prediction.numpy(), aux["gate_weights"].numpy()
    return answers


def bound(result: te_export.ExportResult, task: str, output: str) -> float:
    """What the manifest allows on ordinary rows; twice, since these are other rows of the same kind."""
    (parity,) = [entry for entry in result.manifest.variants[0].parity if entry.task == task]
    (group,) = [group for group in getattr(parity, output).groups if group.group == "ordinary"]
    return 2.0 * float(group.bound)


# Predictions


@pytest.mark.parametrize("rows", BATCHES)
def test_predictions_are_the_oracles_within_the_manifests_bounds(
    rows: int, loaded: te_runtime.Model, model: TaskExpertModel, result: te_export.ExportResult
) -> None:
    x = np.random.default_rng(rows).standard_normal((rows, 20)).astype(np.float32)

    found = loaded.predict(x)

    assert list(found) == list(OUTPUTS)
    for name, (prediction, weights) in oracle(model, x).items():
        assert found[name].output.shape == prediction.shape == (rows, OUTPUTS[name])
        assert found[name].routing_weights is not None
        assert found[name].routing_weights.shape == weights.shape == (rows, 3)
        if rows:
            assert np.abs(found[name].output - prediction).max() <= bound(result, name, "prediction")
            assert np.abs(found[name].routing_weights - weights).max() <= bound(
                result, name, "routing_weights"
            )


@pytest.mark.parametrize("tasks", [["like"], ["buy", "click"], ["like", "click", "buy"]])
def test_a_subset_of_tasks_gets_the_same_answers(
    tasks: list[str], result: te_export.ExportResult, loaded: te_runtime.Model
) -> None:
    """Tails apart and together are two graphs, each within its bound of the oracle."""
    x = np.random.default_rng(5).standard_normal((7, 20)).astype(np.float32)
    everything = loaded.predict(x)

    found = loaded.predict(x, tasks)

    assert list(found) == tasks
    for name in tasks:
        allowed = 0.0 if len(tasks) == 3 else 2 * bound(result, name, "prediction")
        assert np.abs(found[name].output - everything[name].output).max() <= allowed


def test_the_joint_task_and_standalone_graphs_give_the_same_answers_as_trunk_and_tails(
    result: te_export.ExportResult, loaded: te_runtime.Model
) -> None:
    x = np.random.default_rng(6).standard_normal((7, 20)).astype(np.float32)
    composed = loaded.predict(x)

    def run(name: str) -> dict[str, np.ndarray]:
        path = result.bundle / f"fp32/{name}.onnx"
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]
        return dict(zip(names, session.run(names, {"x": x}), strict=True))

    joint = run("joint")
    for task in OUTPUTS:
        allowed = bound(result, task, "prediction")
        for values in (
            joint[f"{task}.prediction"],
            run(f"task-{task}")["prediction"],
            run(f"standalone-{task}")["prediction"],
        ):
            assert np.abs(values - composed[task].output).max() <= 2 * allowed


def test_a_bundle_runs_wherever_it_is_copied_to(
    bundle: Path, loaded: te_runtime.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = np.random.default_rng(7).standard_normal((2, 20)).astype(np.float32)
    monkeypatch.chdir(bundle.parent)

    with te_runtime.load("copy") as moved:
        found = moved.predict(x)

    assert np.array_equal(found["click"].output, loaded.predict(x)["click"].output)


# The graphs, read by others


def graph_paths(result: te_export.ExportResult) -> list[Path]:
    paths = sorted((result.bundle / "fp32").glob("*.onnx"))
    assert len(paths) == 3 + 3 * 3
    return paths


def test_onnx_accepts_every_graph_from_its_path(result: te_export.ExportResult) -> None:
    for path in graph_paths(result):
        onnx.checker.check_model(str(path), full_check=True)


def test_every_graph_loads_in_plain_onnxruntime_and_needs_weights_bin_only(
    result: te_export.ExportResult, tmp_path: Path
) -> None:
    shutil.copy(result.bundle / "fp32/weights.bin", tmp_path)
    for path in graph_paths(result):
        alone = Path(shutil.copy(path, tmp_path))
        session = onnxruntime.InferenceSession(str(alone), providers=["CPUExecutionProvider"])
        assert [axis for value in session.get_inputs() for axis in value.shape][:1] == ["batch"]
        alone.unlink()


def test_standalone_graphs_run_with_nothing_beside_them(
    result: te_export.ExportResult, loaded: te_runtime.Model, tmp_path: Path
) -> None:
    x = np.random.default_rng(8).standard_normal((2, 20)).astype(np.float32)
    composed = loaded.predict(x)
    for task in OUTPUTS:
        path = Path(shutil.copy(result.bundle / f"fp32/standalone-{task}.onnx", tmp_path / "only.onnx"))
        assert [entry.name for entry in tmp_path.iterdir()] == ["only.onnx"]
        (found, _) = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(
            None, {"x": x}
        )
        assert np.abs(found - composed[task].output).max() <= 2 * bound(result, task, "prediction")
        path.unlink()


def test_every_weight_is_stored_once(result: te_export.ExportResult, model: TaskExpertModel) -> None:
    weights = (result.bundle / "fp32/weights.bin").read_bytes()
    state = model.state_dict()
    places: dict[str, tuple[int, int]] = {}
    for path in graph_paths(result):
        for tensor in onnx.load(path, load_external_data=False).graph.initializer:
            if uses_external_data(tensor):
                where = {entry.key: entry.value for entry in tensor.external_data}
                assert where["location"] == "weights.bin"
                place = (int(where["offset"]), int(where["length"]))
                assert places.setdefault(tensor.name, place) == place
    assert len(places) == 11  # the other tensors are small and stay inside the graphs
    for name, (offset, length) in places.items():
        stored = np.frombuffer(weights[offset : offset + length], "<f4")
        if name in state:
            assert np.array_equal(stored, state[name].numpy().reshape(-1))
    inside = {
        place for place in places.values() for other in places.values()
        if place != other and other[0] <= place[0] and sum(place) <= sum(other)
    }  # fmt: skip
    assert places["gating_networks.1.gate.0.weight"] in inside
    assert places["backbone.network.0.weight"] not in inside
    whole = sorted(set(places.values()) - inside)
    assert all(sum(first) <= second[0] for first, second in itertools.pairwise(whole))
    assert all(offset % 4096 == 0 for offset, length in whole if length >= 4096)
    assert len(weights) == sum(whole[-1])
    assert sum(length for _, length in whole) <= result.manifest.model.parameter_bytes


def test_golden_rows_are_what_the_manifest_says(result: te_export.ExportResult) -> None:
    golden = np.load(io.BytesIO((result.bundle / "golden.npz").read_bytes()), allow_pickle=False)

    assert len(golden["input.x"]) == sum(group.rows for group in result.manifest.golden.groups)
    for task, width in OUTPUTS.items():
        assert golden[f"{task}.prediction"].shape == (len(golden["input.x"]), width)


# te-runtime's commands


def te_runtime_command(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "te_runtime", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_verify_and_inspect_exit_0(result: te_export.ExportResult) -> None:
    verified = te_runtime_command("verify", result.bundle, "--json")

    assert verified.returncode == 0, verified.stderr
    assert json.loads(verified.stdout)
    inspected = te_runtime_command("inspect", result.bundle)
    assert inspected.returncode == 0, inspected.stderr
    for task in OUTPUTS:
        assert task in inspected.stdout


def test_run_writes_what_predict_answers(
    result: te_export.ExportResult, loaded: te_runtime.Model, tmp_path: Path
) -> None:
    x = np.random.default_rng(9).standard_normal((3, 20)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)

    done = te_runtime_command("run", result.bundle, tmp_path / "x.npy", "--threads", 1)

    assert done.returncode == 0, done.stderr
    written = np.load(tmp_path / "x-predictions.npz")
    for task, prediction in loaded.predict(x).items():
        assert np.array_equal(written[f"{task}.prediction"], prediction.output)


def test_verify_exits_1_where_the_numbers_are_wrong(bundle: Path) -> None:
    """Another model's weights, with a manifest that lists them rightly: only the golden rows can tell."""
    weights = bundle / "fp32/weights.bin"
    values = np.frombuffer(weights.read_bytes(), "<f4") * np.float32(1.01)
    weights.write_bytes(values.tobytes())
    reseal(bundle, "fp32/weights.bin")

    verified = te_runtime_command("verify", bundle)

    assert verified.returncode == 1, verified.stderr


def reseal(bundle: Path, path: str) -> None:
    """Write the file's new checksum into the manifest."""
    import hashlib

    from te_runtime.manifest import FileEntry, serialize_manifest

    manifest = open_bundle(bundle, check="size").manifest
    digest = hashlib.sha256((bundle / path).read_bytes()).hexdigest()
    entries = tuple(
        FileEntry(entry.path, entry.size_bytes, digest) if entry.path == path else entry
        for entry in manifest.files
    )
    changed = serialize_manifest(manifest._replace(files=entries))
    (bundle / "manifest.json").write_bytes(changed)


# Damage


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 0x10
    path.write_bytes(bytes(data))


def listed(result: te_export.ExportResult) -> list[str]:
    return sorted(set(files(result.bundle)) - {"manifest.json"})


def test_a_changed_byte_in_any_file_is_refused_with_the_file_named(
    result: te_export.ExportResult, bundle: Path
) -> None:
    rng = np.random.default_rng(4)
    for name in listed(result):
        path = bundle / name
        before = path.read_bytes()
        for position in (0, len(before) - 1, *rng.integers(0, len(before), 3).tolist()):
            flip(path, position)
            with pytest.raises(BundleError, match=name.replace(".", r"\.")):
                te_runtime.load(bundle)
            path.write_bytes(before)
    te_runtime.load(bundle).close()


def test_a_changed_byte_in_the_manifest_is_refused_with_the_file_named(bundle: Path) -> None:
    path = bundle / "manifest.json"
    before = path.read_bytes()
    positions = np.linspace(0, len(before) - 1, 400).astype(int).tolist()
    for position in positions:
        flip(path, position)
        with pytest.raises(BundleError, match=r"manifest\.json"):
            open_bundle(bundle, check="size")
        path.write_bytes(before)


@pytest.mark.parametrize("damage", ["removed", "emptied", "cut", "grown"])
def test_a_file_that_is_not_whole_is_refused_with_the_file_named(
    damage: str, result: te_export.ExportResult, bundle: Path
) -> None:
    for name in [*listed(result), "manifest.json"]:
        path = bundle / name
        before = path.read_bytes()
        if damage == "removed":
            path.unlink()
        else:
            path.write_bytes({"emptied": b"", "cut": before[:-1], "grown": before + b"\x00"}[damage])
        with pytest.raises(BundleError, match=name.replace(".", r"\.")):
            te_runtime.load(bundle)
        path.write_bytes(before)


# Reproducibility

CHANGED_SURROUNDINGS = {
    "PYTHONHASHSEED": "12345",
    "OMP_NUM_THREADS": "2",
    "TZ": "Pacific/Auckland",
    "LC_ALL": "C",
    "HOME": "/nowhere",
    "COLUMNS": "20",
}


def test_another_process_in_another_folder_writes_the_same_bytes(
    model: TaskExpertModel, result: te_export.ExportResult, tmp_path: Path
) -> None:
    folder = tmp_path / "quite another folder" / "deeper"
    folder.mkdir(parents=True)
    shutil.copy(result.bundle.parent / "model.pt", folder / "renamed.pt")
    arguments = ["renamed.pt", "-o", "../out", "--task-names", ",".join(OUTPUTS), "--standalone", "-q"]

    done = subprocess.run(
        [sys.executable, "-m", "te_export.cli", *arguments],
        cwd=folder,
        env=os.environ | CHANGED_SURROUNDINGS,
        capture_output=True,
        text=True,
        timeout=300,
    )

    assert done.returncode == 0, done.stderr
    found, expected = files(folder.parent / "out"), files(result.bundle)
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []


# Many tasks


def test_a_hundred_tasks_work(tmp_path: Path) -> None:
    model = make_model(6, (2, 1) * 50, num_experts=2, input_dim=3, width=6)
    torch.save(model.state_dict(), tmp_path / "model.pt")

    result = te_export.export(tmp_path / "model.pt")

    assert len(list((result.bundle / "fp32").iterdir())) == 2 * 100 + 4
    x = np.random.default_rng(1).standard_normal((3, 3)).astype(np.float32)
    with te_runtime.load(result.bundle, threads=1) as loaded, torch.no_grad():
        everything = loaded.predict(x)
        assert list(everything) == list(loaded.tasks)
        for found in (loaded.predict(x, ["task_99", "task_0"]), everything):
            for name, task in (("task_0", 0), ("task_99", 99)):
                expected = model(torch.from_numpy(x), task)[0].numpy()
                np.testing.assert_allclose(found[name].output, expected, rtol=0, atol=1e-5)
