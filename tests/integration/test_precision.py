"""Variants of lower precision, as a person meets them: trained on digits, exported, run on rows that nobody saw."""

from __future__ import annotations

import errno
import functools
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import te_export
import te_runtime
from te_export import add_variants, cli, cli_frame, pipeline
from te_export.bundle.staged_graphs import StagedGraphs
from te_export.capture.joint_graph import JointGraph
from te_export.errors import ParityError
from te_export.models.exportable import ExportableModel
from te_export.models.task_expert import TaskExpertConfig, TaskExpertModel
from te_export.precision import form_trial, trial, variants
from te_export.precision.latency import LatencyRatio, measure_ratios
from te_export.precision.static import activation_ranges
from te_runtime.bundle import open_bundle
from te_runtime.manifest import Variant

ROOT = Path(__file__).parents[2]
LOWER = ("int8", "int4", "fp16")
BUDGET_POINTS = 0.5
MODES = ("joint", "split", "task")


@dataclass(frozen=True)
class Outcome:
    """What one run of the command left."""

    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Digits:
    """A trained model and its rows. Not to be changed.

    Attributes:
        model_pt: the checkpoint.
        data: training rows with labels, as --calibration-data takes them.
        rows: training rows without labels.
        x: held-out rows (N, 64) float32.
        labels: their classes (N,) by task.
        torch: torch's predictions of them, by task.
    """

    model_pt: Path
    data: Path
    rows: Path
    x: NDArray[np.float32]
    labels: dict[str, NDArray[np.int64]]
    torch: dict[str, NDArray[np.float32]]


Command = Callable[..., Outcome]


@pytest.fixture(scope="module", autouse=True)
def _quick() -> Iterator[None]:
    """Each model is captured once, and latencies, which decide nothing here, are timed briefly."""
    known: dict[tuple[int, float], JointGraph] = {}
    plain = pipeline.capture

    def capture_once(model: ExportableModel, opset: int) -> JointGraph:
        key = opset, float(next(model.module.parameters()).flatten()[0])
        if key not in known:
            known[key] = plain(model, opset)
        found = known[key]
        return JointGraph(model=found.model.clone(), tasks=found.tasks, opset=found.opset)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "capture", capture_once)
        patch.setattr(variants, "measure_ratios", functools.partial(measure_ratios, seconds=0.2))
        yield


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Digits:
    """The demo's model, wide enough to be worth converting, after a third of the demo's epochs."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("digits")
    demo = demo_module()
    training, held_out = demo.digit_rows()
    model, trainer = demo.train(training, held_out, lambda epoch, *, loss, held_out: None)
    demo.store(folder, held_out=held_out, model=model, optimizer=trainer.optimizer)
    labels = {f"labels.{task}": label.numpy() for task, label in training.labels.items()}
    np.savez(folder / "data.npz", x=training.x.numpy(), **labels)
    np.savez(folder / "rows.npz", x=training.x.numpy())
    return Digits(
        model_pt=folder / "model.pt",
        data=folder / "data.npz",
        rows=folder / "rows.npz",
        x=held_out.x.numpy(),
        labels={task: label.numpy() for task, label in held_out.labels.items()},
        torch=dict(np.load(folder / "torch-predictions.npz")),
    )


def demo_module() -> ModuleType:
    """scripts/demo_train.py with a wider model and fewer epochs."""
    spec = importlib.util.spec_from_file_location("demo_train", ROOT / "scripts/demo_train.py")
    assert spec is not None
    assert spec.loader is not None
    demo = importlib.util.module_from_spec(spec)
    sys.modules["demo_train"] = demo  # dataclasses look there for the module that they are made in
    try:
        spec.loader.exec_module(demo)
    finally:
        del sys.modules["demo_train"]
    demo.EPOCHS = 5
    demo.CONFIG = TaskExpertConfig(
        input_dim=64,
        backbone_dim=512,
        expert_dim=128,
        num_experts=6,
        num_tasks=len(demo.CLASSES),
        task_output_dims=tuple(demo.CLASSES.values()),
        learning_rate=1e-3,
    )
    return demo


def export_all(digits: Digits, folder: Path, data: Path | None) -> te_export.ExportResult:
    options = te_export.ExportOptions(precisions=("fp32", *LOWER), calibration_data=data)
    return te_export.export(digits.model_pt, folder / "bundle", options)


@pytest.fixture(scope="module")
def with_data(digits: Digits, tmp_path_factory: pytest.TempPathFactory) -> te_export.ExportResult:
    """Every variant, judged on labels. Not to be changed."""
    return export_all(digits, tmp_path_factory.mktemp("with"), digits.data)


@pytest.fixture(scope="module")
def without_data(digits: Digits, tmp_path_factory: pytest.TempPathFactory) -> te_export.ExportResult:
    """Every variant, judged on random rows. Not to be changed."""
    return export_all(digits, tmp_path_factory.mktemp("without"), None)


@pytest.fixture(params=["with data", "without data"])
def result(
    request: pytest.FixtureRequest, with_data: te_export.ExportResult, without_data: te_export.ExportResult
) -> te_export.ExportResult:
    """Both, one after the other."""
    return with_data if request.param == "with data" else without_data


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in which no layer is worth converting. Not to be changed."""
    torch.manual_seed(0)
    config = TaskExpertConfig(
        input_dim=20, backbone_dim=24, expert_dim=8, num_experts=3, num_tasks=2, task_output_dims=(4, 1)
    )
    path = tmp_path_factory.mktemp("tiny") / "model.pt"
    torch.save(TaskExpertModel(config).state_dict(), path)
    return path


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """`command("model.pt", "--json")`: te-export in this process."""

    def run(*arguments: str | Path) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["te-export", *map(str, arguments)])
        monkeypatch.setattr(cli_frame.signal, "signal", lambda number, handler: None)
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            cli.main()
        streams = capsys.readouterr()
        assert isinstance(left.value.code, int)
        return Outcome(left.value.code, streams.out, streams.err)

    return run


def variant_of(result: te_export.ExportResult, precision: str) -> Variant:
    (found,) = [variant for variant in result.manifest.variants if variant.precision == precision]
    return found


def files(bundle: Path) -> dict[str, bytes]:
    return {
        path.relative_to(bundle).as_posix(): path.read_bytes() for path in bundle.rglob("*") if path.is_file()
    }


def right(predictions: NDArray[np.float32], labels: NDArray[np.int64]) -> int:
    """How many rows are classified rightly."""
    return int(np.count_nonzero(predictions.argmax(axis=1) == labels))


def folder_bytes(bundle: Path, folder: str) -> int:
    return sum(path.stat().st_size for path in (bundle / folder).iterdir())


# What a variant is worth


def test_every_variant_is_built_and_listed(result: te_export.ExportResult) -> None:
    assert result.failed_variants == ()
    assert [variant.precision for variant in result.manifest.variants] == ["fp32", *LOWER]
    assert [summary.precision for summary in result.variants] == [*LOWER]
    assert all(summary.converted for summary in result.variants)


def test_int8_is_static_where_data_gives_ranges(
    with_data: te_export.ExportResult, without_data: te_export.ExportResult
) -> None:
    assert variant_of(with_data, "int8").form == "static"
    assert variant_of(without_data, "int8").form == "dynamic"


def test_int8_loses_at_most_the_budget_on_rows_that_nobody_saw(
    result: te_export.ExportResult, digits: Digits
) -> None:
    with te_runtime.load(result.bundle, precision="int8", threads=1) as model:
        found = model.predict(digits.x)

    rows = len(digits.x)
    lost = {
        task: 100 * (right(digits.torch[task], labels) - right(found[task].output, labels)) / rows
        for task, labels in digits.labels.items()
    }
    assert rows == 360
    assert max(lost.values()) <= BUDGET_POINTS, lost


@pytest.mark.parametrize("precision", LOWER)
def test_the_manifest_says_what_te_runtime_answers_on_the_judged_rows(
    precision: str, with_data: te_export.ExportResult, digits: Digits
) -> None:
    arrays = np.load(digits.data)
    with te_runtime.load(
        with_data.bundle, precision=precision, threads=1, mode="joint", max_batch=64
    ) as model:
        found = model.predict(arrays["x"][1::2])

    for entry in variant_of(with_data, precision).accuracy:
        correct = right(found[entry.task].output, arrays[f"labels.{entry.task}"][1::2])
        assert entry.rows == len(arrays["x"][1::2])
        assert entry.variant_percent == pytest.approx(100 * correct / entry.rows, abs=1e-9)
        assert entry.loss_points == pytest.approx(entry.oracle_percent - entry.variant_percent, abs=1e-9)
        assert entry.loss_points <= entry.budget_points == BUDGET_POINTS


@pytest.mark.parametrize("precision", LOWER)
def test_without_data_a_variant_is_judged_on_random_rows(
    precision: str, without_data: te_export.ExportResult
) -> None:
    for entry in variant_of(without_data, precision).accuracy:
        assert (entry.source, entry.metric) == ("probe rows", "relative error")
        assert (entry.oracle_percent, entry.variant_percent) == (None, None)
        assert 0 <= entry.loss_points <= entry.budget_points == 10
    assert f"{precision} was judged on random rows only" in " ".join(without_data.notes)


@pytest.mark.parametrize("precision", LOWER)
def test_te_runtime_verifies_every_variant(precision: str, result: te_export.ExportResult) -> None:
    with te_runtime.load(result.bundle, precision=precision, threads=1) as model:
        report = model.verify()

    assert report.ok, report.mismatches
    assert report.precision == precision


@pytest.mark.parametrize("precision", LOWER)
def test_every_mode_gives_the_same_answers_within_the_bound(
    precision: str,
    result: te_export.ExportResult,
    digits: Digits,
    load_for_all_tasks: Callable[..., AbstractContextManager[Any]],
) -> None:
    answers = {}
    for mode in MODES:
        with load_for_all_tasks(result.bundle, precision=precision, threads=1, mode=mode) as model:
            answers[mode] = model.predict(digits.x)

    for parity in variant_of(result, precision).parity:
        for output, figures in zip(
            ("output", "routing_weights"), (parity.prediction, parity.routing_weights), strict=True
        ):
            (bound,) = [group.bound for group in figures.groups if group.group == "ordinary"]
            joint, *others = [getattr(answers[mode][parity.task], output) for mode in MODES]
            for other in others:
                assert np.abs(other - joint).max() <= bound


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_a_rows_answer_does_not_depend_on_its_batch(
    precision: str, result: te_export.ExportResult, digits: Digits
) -> None:
    calm, wild = digits.x[:2].copy(), digits.x[:2].copy()
    wild[1] *= 1000
    with te_runtime.load(result.bundle, precision=precision, threads=1) as model:
        beside_calm, beside_wild = model.predict(calm), model.predict(wild)

    for task in model.tasks:
        assert np.array_equal(beside_calm[task].output[0], beside_wild[task].output[0])
        assert not np.array_equal(beside_calm[task].output[1], beside_wild[task].output[1])


def test_int8_takes_at_most_three_tenths_of_fp32(result: te_export.ExportResult) -> None:
    int8, fp32 = (folder_bytes(result.bundle, folder) for folder in ("int8", "fp32"))

    assert int8 <= 0.30 * fp32
    assert result.variants[0].size_bytes == int8


def test_the_bundle_holds_what_the_manifest_lists_and_nothing_else(result: te_export.ExportResult) -> None:
    listed = {entry.path for entry in result.manifest.files} | {"manifest.json"}

    assert set(files(result.bundle)) == listed
    assert {path.name for path in result.bundle.iterdir() if path.is_dir()} == {"fp32", *LOWER}
    assert [path.name for path in result.bundle.parent.iterdir()] == ["bundle"]
    assert result.size_bytes == sum(len(data) for data in files(result.bundle).values())


def test_the_report_tells_what_each_task_lost(result: te_export.ExportResult) -> None:
    report = (result.bundle / "report.md").read_text()

    for precision in LOWER:
        assert f"## {precision} ({variant_of(result, precision).form}): what each task lost" in report
        assert f"## {precision}: parity with torch in float64" in report


def test_the_reports_tell_what_each_layer_costs(result: te_export.ExportResult) -> None:
    markdown, page = ((result.bundle / name).read_text() for name in ("report.md", "report.html"))
    for precision in LOWER:
        variant = variant_of(result, precision)
        (summary,) = (entry for entry in result.variants if entry.precision == precision)
        named = [name for layer in variant.layers for name in layer.weights]
        assert {*summary.converted, *variant.kept_weights} <= set(named)
        assert f"### {precision}: what each layer costs" in markdown
        assert f"<h3>{precision}: what each layer costs</h3>" in page
        for layer in variant.layers:
            assert layer.loss is not None
            budget = {entry.task: entry.loss_points for entry in variant.accuracy}
            if not variant.kept_weights:
                assert layer.loss.loss_points == budget[layer.loss.task]
    assert variant_of(result, "fp32").layers == ()


def test_layers_cost_the_tasks_that_read_them(result: te_export.ExportResult) -> None:
    """Gates are read by their task alone, and experts by all."""
    layers = [layer for precision in LOWER for layer in variant_of(result, precision).layers]
    for place, task in enumerate(result.manifest.task_names):
        own = [layer for layer in layers if f"gating_networks.{place}.gate.0.weight" in layer.weights]
        assert len(own) == len(LOWER)
        assert {layer.tasks for layer in own} == {(task,)}
    assert all(layer.tasks is None for layer in layers if layer.weights[0].startswith("experts."))


def test_what_was_timed_is_told_and_written_nowhere(
    digits: Digits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same checkpoint is to give the same bytes."""

    def slow(sessions: Mapping[str, object], feeds: Mapping[int, object]) -> tuple[LatencyRatio, ...]:
        return tuple(
            LatencyRatio(
                name,
                batch,
                ratio=1.75,
                low=1.5,
                high=2.0,
                latency_us=123.0,
                latency_low_us=120.0,
                latency_high_us=130.0,
                rounds=9,
            )
            for batch in feeds
            for name in sessions
        )

    monkeypatch.setattr(variants, "measure_ratios", slow)
    options = te_export.ExportOptions(precisions=("fp32", "int8"))

    result = te_export.export(digits.model_pt, tmp_path / "out", options)

    (note,) = [note for note in result.notes if "SLOWER" in note]
    assert "1.75x at B=1, 1.75x at B=8, 1.75x at B=64" in note
    assert not any(b"SLOWER" in data or b"1.75x" in data for data in files(result.bundle).values())


# The command


def export_int8(command: Command, digits: Digits, target: Path, *arguments: str | Path) -> Outcome:
    return command(digits.model_pt, "-o", target, "--precision", "fp32,int8", *arguments)


def test_a_variant_that_cannot_be_built_is_left_out_and_told_of(
    command: Command, tiny: Path, tmp_path: Path
) -> None:
    target = tmp_path / "out"

    done = command(tiny, "-o", target, "--precision", "int8,int4", "--json")

    told = json.loads(done.out, parse_constant=pytest.fail)
    assert done.code == told["exit_code"] == 1
    assert told["status"] == "incomplete"
    assert told["published"] is True
    assert [failed["precision"] for failed in told["failed_variants"]] == ["int8", "int4"]
    for failed in told["failed_variants"]:
        assert "no linear layer or table is large enough to convert" in failed["reason"]
        assert f"error: {failed['reason']}" in done.err
    assert [variant.precision for variant in open_bundle(target).manifest.variants] == ["fp32"]
    assert {path.name for path in target.iterdir()} == {
        *("fp32", "golden.npz", "manifest.json", "report.html", "report.md")
    }
    for name in ("report.md", "report.html"):
        report = (target / name).read_text()
        assert (
            report.count(
                "dynamic: no linear layer or table is large enough to convert, so nothing would be gained"
            )
            == 1
        )
        assert (
            report.count(
                "block4: no linear layer or table is large enough to convert, so nothing would be gained"
            )
            == 1
        )
    with te_runtime.load(target) as model:
        assert model.verify().ok


def test_why_a_variant_is_left_out_names_no_folder_of_this_machine(
    digits: Digits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is staged in a folder of another name each time, and the reports are to have the same bytes."""

    def refuse(precision: str, graphs: StagedGraphs, references: object) -> None:
        raise ParityError(f"{graphs.root / graphs.joint.path}: its graphs differ from one another")

    monkeypatch.setattr(add_variants, "verify_lower_precision", refuse)
    options = te_export.ExportOptions(precisions=("fp32", "int8"))

    result = te_export.export(digits.model_pt, tmp_path / "out", options)

    (failed,) = result.failed_variants
    assert failed.reason == "int8 is left out: int8/joint.onnx: its graphs differ from one another"
    for name in ("report.md", "report.html"):
        assert "int8/joint.onnx: its graphs differ from one another" in (result.bundle / name).read_text()


def test_latency_is_written_down_where_it_was_asked_for(command: Command, tiny: Path, tmp_path: Path) -> None:
    plain, timed = tmp_path / "plain", tmp_path / "timed"

    assert command(tiny, "-o", plain).code == 0
    done = command(tiny, "-o", timed, "--measure-latency")

    assert done.code == 0
    assert "latency, median and over fp32, on " in done.out
    assert re.search(
        r"^  latency +\d+\.\d\d s  3 graphs over 1, 8, 64 rows, one thread$", done.err, re.MULTILINE
    )
    assert open_bundle(plain).manifest.latency is None
    manifest = open_bundle(timed).manifest
    assert manifest.latency is not None
    assert [(entry.path, entry.batch) for entry in manifest.latency.graphs] == [
        (f"fp32/{name}.onnx", batch)
        for name in ("joint", "task-task_0", "task-task_1")
        for batch in (1, 8, 64)
    ]
    one, other = files(plain), files(timed)
    assert {name for name in one if one[name] != other[name]} == {"manifest.json", "report.md", "report.html"}
    for name in ("report.md", "report.html"):
        assert manifest.latency.machine in other[name].decode()
        assert str(tmp_path) not in other[name].decode()


def test_a_budget_of_nothing_keeps_layers_in_8_bits_or_leaves_the_variant_out(
    command: Command, digits: Digits, tmp_path: Path
) -> None:
    """Without labels one row with another arg-max is already over it, and 4 bits cost some."""
    target = tmp_path / "out"
    options = ["--precision", "int4", "--calibration-data", digits.rows, "--max-accuracy-drop", "0", "--json"]

    done = command(digits.model_pt, "-o", target, *options)

    told = json.loads(done.out, parse_constant=pytest.fail)
    manifest = open_bundle(target).manifest
    if done.code == 1:
        assert "allowed 0" in told["failed_variants"][0]["reason"]
        assert [variant.precision for variant in manifest.variants] == ["fp32"]
        return
    assert done.code == 0, done.err
    int4 = manifest.variants[1]
    assert int4.kept_weights
    (kept,) = (note for note in told["notes"] if "in 8 bits, which" in note)
    assert re.search(r"stays? in 8 bits, which takes [1-9][\d,]* bytes more, because", kept)
    (cost,) = (note for note in told["notes"] if "what is held more exactly costs" in note)
    assert re.search(r"costs, of fp32's time, \d+\.\d\dx for \d+\.\d\dx at B=1, ", cost)
    assert [entry.loss_points for entry in int4.accuracy] == [0.0] * len(manifest.tasks)
    assert [entry.agreement for entry in int4.accuracy] == [1.0] * len(manifest.tasks)


def test_labels_of_other_rows_are_noticed(command: Command, digits: Digits, tmp_path: Path) -> None:
    arrays = dict(np.load(digits.data))
    arrays["labels.closed_loops"] = arrays["labels.closed_loops"][::-1]
    np.savez(tmp_path / "turned.npz", **arrays)

    done = export_int8(
        command, digits, tmp_path / "out", "--calibration-data", tmp_path / "turned.npz", "--json"
    )

    assert done.code == 0, done.err
    notes = [note for note in json.loads(done.out)["notes"] if "cannot judge" in note]
    assert len(notes) == 1
    assert "labels.closed_loops cannot judge int8" in notes[0]
    assert "in the order of the rows?" in notes[0]


REFUSED = {
    "without a lower precision": "Add --precision fp32,int8 or --prune-experts 0.5, or leave --calibration-data out",
    "missing": "no such file, expected an .npz file",
    "NaN": "1 of 6400 values are NaN or infinite, the first (nan) in row 3, column 5",
    "too few rows": "got 31 rows, expected at least 32",
    "labels of another task": "array 'labels.digits' is unknown (did you mean 'labels.digit'?)",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_calibration_data_that_cannot_be_used_is_refused_before_anything_is_written(
    kind: str, command: Command, digits: Digits, tmp_path: Path
) -> None:
    x = digits.x[:100].copy()
    arrays = {"x": x[:31] if kind == "too few rows" else x}
    if kind == "NaN":
        x[3, 5] = np.nan
    if kind == "labels of another task":
        arrays["labels.digits"] = np.zeros(len(x), np.int64)
    path = tmp_path / "rows.npz"
    if kind != "missing":
        np.savez(path, **arrays)
    precision = "fp32" if kind == "without a lower precision" else "fp32,int8"
    before = sorted(tmp_path.iterdir())

    done = command(
        digits.model_pt, "-o", tmp_path / "out", "--precision", precision, "--calibration-data", path
    )

    assert done.code == 2
    assert REFUSED[kind] in done.err
    assert sorted(tmp_path.iterdir()) == before


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("what", ["weights", "folder", "calibration graph"])
def test_a_disk_that_fills_while_int8_is_built_leaves_nothing(
    what: str, command: Command, digits: Digits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise FULL

    where, name = {
        "weights": (trial, "weight_chunks"),
        "folder": (form_trial.tempfile, "mkdtemp"),
        "calibration graph": (activation_ranges, "linked_bytes"),
    }[what]
    monkeypatch.setattr(where, name, fail)

    done = export_int8(command, digits, tmp_path / "out", "--calibration-data", digits.data, "--json")

    assert done.code == json.loads(done.out)["exit_code"] == 2
    assert "No space left on device. Free some space, or choose another folder with -o DIR" in done.err
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_builds_int8_and_writes_nothing(command: Command, digits: Digits, tmp_path: Path) -> None:
    done = export_int8(
        command, digits, tmp_path / "out", "--calibration-data", digits.data, "--dry-run", "--json"
    )

    told = json.loads(done.out, parse_constant=pytest.fail)
    assert done.code == 0, done.err
    assert (told["status"], told["published"]) == ("dry-run", False)
    assert [variant["precision"] for variant in told["manifest"]["variants"]] == ["fp32", "int8"]
    assert list(tmp_path.iterdir()) == []


def test_force_replaces_a_bundle_of_variants(command: Command, digits: Digits, tmp_path: Path) -> None:
    target = tmp_path / "out"
    first = export_int8(command, digits, target)
    before = files(target)

    refused = export_int8(command, digits, target)
    replaced = command(digits.model_pt, "-o", target, "--force")

    assert (first.code, refused.code, replaced.code) == (0, 2, 0)
    assert any(name.startswith("int8/") for name in before)
    assert not any(name.startswith("int8/") for name in files(target))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


CHANGED_SURROUNDINGS = {
    "PYTHONHASHSEED": "12345",
    "OMP_NUM_THREADS": "2",
    "TZ": "Pacific/Auckland",
    "LC_ALL": "C",
    "HOME": "/nowhere",
    "COLUMNS": "20",
}


def test_another_process_in_another_folder_writes_the_same_int8(
    with_data: te_export.ExportResult, digits: Digits, tmp_path: Path
) -> None:
    folder = tmp_path / "quite another folder"
    folder.mkdir()
    shutil.copy(digits.model_pt, folder / "renamed.pt")
    shutil.copy(digits.data, folder / "other.npz")
    arguments = ["renamed.pt", "-o", "out", "--precision", "int8", "--calibration-data", "other.npz", "-q"]

    done = subprocess.run(
        [sys.executable, "-m", "te_export.cli", *arguments],
        cwd=folder,
        env=os.environ | CHANGED_SURROUNDINGS,
        capture_output=True,
        text=True,
        timeout=300,
    )

    assert done.returncode == 0, done.stderr
    found, expected = files(folder / "out"), files(with_data.bundle)
    shared = {name for name in expected if not name.startswith(("int4/", "fp16/"))}
    assert found.keys() == shared
    assert {name for name in shared if found[name] != expected[name]} == {
        *("manifest.json", "report.html", "report.md")
    }
    assert open_bundle(folder / "out").manifest.variants[1] == variant_of(with_data, "int8")
