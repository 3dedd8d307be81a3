"""scripts/benchmark_rivals.py: what is planned, who is timed and who is named instead, ratios, losses, the page.

None of it needs a rival installed.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import benchmark_rivals
import numpy as np
import onnx
import pytest
import rivals_graphs
import rivals_models
import rivals_openvino
import rivals_run
import rivals_torch
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from reference_graphs import export_naive, write_roof
from rivals_losses import find_losses
from rivals_onnxruntime import open_roof, open_session, open_te_export
from rivals_opening import Answers, MissingRivalError, Setting, import_rival
from rivals_page import write_page
from rivals_parity import WrongAnswersError, check_answers
from rivals_plan import (
    BASE,
    BATCH_SIZES,
    TRAINED,
    Block,
    Family,
    ModelChoice,
    Plan,
    Point,
    Scope,
    make_plan,
)
from rivals_plots import draw_figures
from rivals_results import Absence, Measured, Results, read_json, take_ratio, write_json
from rivals_subjects import Role, Subject, subjects_on
from rivals_timing import MAX_ROUNDS, TIMED_CALLS, Clock, TimingOptions, time_in_rounds

import te_export
from te_export.models.task_expert import TaskExpertModel

NEEDS_EXTRA = "needs matplotlib: pip install '.[rivals]', as scripts/benchmark rivals does"
SMALL = ModelChoice(Family.R, tasks=2, experts=2)
POINT = Point(BASE, threads=1, device="cpu", batch=8)
MakeModel = Callable[..., TaskExpertModel]


# --- the plan


def test_the_full_plan_has_every_size_that_is_asked_for() -> None:
    points = {point for block in make_plan(quick=False, has_cuda=False).blocks for point in block.points}

    for batch in (1, 8, 64, 512):
        assert {Point(BASE, threads, "cpu", batch) for threads in (1, 2)} <= points
        assert {p.model.tasks for p in points if (p.model.experts, p.batch) == (8, batch)} == {1, 5, 20, 100}
        assert {
            p.model.experts
            for p in points
            if (p.model.family, p.model.tasks, p.batch) == (Family.R, 5, batch)
        } == {4, 8, 32}
        assert Point(TRAINED, 1, "cpu", batch) in points


def test_from_the_base_one_number_at_a_time_is_changed() -> None:
    for block in make_plan(quick=False, has_cuda=True).blocks:
        if block.model.family is Family.R:
            numbers = (block.model.tasks, block.model.experts, block.threads, block.device)
            changed = sum(a != b for a, b in zip(numbers, (5, 8, 1, "cpu"), strict=True))
            assert changed <= 1, block


@pytest.mark.parametrize("quick", [False, True])
def test_cuda_is_planned_where_it_works_and_models_are_made_once(quick: bool) -> None:
    with_cuda, without = (make_plan(quick=quick, has_cuda=has_cuda) for has_cuda in (True, False))

    assert {block.device for block in without.blocks} == {"cpu"}
    assert {block.device for block in with_cuda.blocks} == {"cpu", "cuda"}
    assert [block for block in with_cuda.blocks if block.device == "cpu"] == list(without.blocks)
    models = [block.model for block in with_cuda.blocks]
    runs = [model for model, before in zip(models, [None, *models], strict=False) if model != before]
    assert len(runs) == len(set(runs))


def test_quick_is_part_of_the_full_plan() -> None:
    quick, full = (
        {point for block in make_plan(quick=quick, has_cuda=True).blocks for point in block.points}
        for quick in (True, False)
    )
    assert quick < full


def test_every_point_has_naive_ours_and_a_roof_for_both_scopes() -> None:
    for device in ("cpu", "cuda"):
        for scope in Scope:
            roles = [subject.role for subject in subjects_on(device) if subject.scope is scope]
            assert roles.count(Role.NAIVE) == roles.count(Role.ROOF) == 1
            assert roles.count(Role.OURS) >= 2
            assert Role.RIVAL in roles
    names = [(subject.name, subject.scope) for subject in subjects_on("cpu")]
    assert len(names) == len(set(names))
    assert not {subject.name for subject in subjects_on("cuda")} & {"torch.compile", "OpenVINO, float32"}


# --- timing, with a clock that the calls move


class FakeTime:
    """Time that passes only by calls and by sleeping."""

    def __init__(self) -> None:
        self.ns = 0
        self.slept = 0.0

    def sleep(self, seconds: float) -> None:
        self.slept += seconds
        self.ns += round(seconds * 1e9)

    def clock(self) -> Clock:
        return Clock(lambda: self.ns, self.sleep)

    def call(self, latencies_us: Iterator[float]) -> Callable[[], None]:
        def call() -> None:
            self.ns += round(next(latencies_us) * 1e3)

        return call


def constant(latency_us: float) -> Iterator[float]:
    while True:
        yield latency_us


@given(latencies_us=st.lists(st.floats(1, 1e6), min_size=1, max_size=4), seconds=st.sampled_from([0, 0.1, 3]))
def test_every_subject_has_as_many_rounds(latencies_us: list[float], seconds: float) -> None:
    time = FakeTime()
    calls = {number: time.call(constant(latency)) for number, latency in enumerate(latencies_us)}

    found = time_in_rounds(calls, TimingOptions(seconds=seconds, least_rounds=3), time.clock())

    (count,) = {len(rounds) for rounds in found.values()}
    assert 3 <= count <= MAX_ROUNDS
    for number, latency in enumerate(latencies_us):
        sizes = {len(samples) for samples in found[number]}
        assert len(sizes) == 1
        assert 1 <= sizes.pop() <= TIMED_CALLS
        np.testing.assert_allclose(np.concatenate(found[number]), latency, atol=0.01)


def test_what_comes_first_is_not_counted() -> None:
    """Two calls that tell the cost, a round that warms up, and the first calls of each turn."""
    time = FakeTime()
    slow_first = iter([9e5, 100, *[7e5] * 2, *[100] * TIMED_CALLS, *([7e5] * 2 + [100] * TIMED_CALLS) * 3])

    found = time_in_rounds({"it": time.call(slow_first)}, TimingOptions(0, 3), time.clock())

    assert found == {"it": [[100.0] * TIMED_CALLS] * 3}


def test_long_calls_are_timed_fewer_times_in_a_turn() -> None:
    time = FakeTime()
    found = time_in_rounds({"it": time.call(constant(20_000))}, TimingOptions(0, 2), time.clock())

    assert found == {"it": [[20_000.0]] * 2}


def test_turns_wait_for_threads_of_others_to_fall_asleep() -> None:
    time = FakeTime()
    calls = {name: time.call(constant(100)) for name in "abc"}
    time_in_rounds(calls, TimingOptions(0, 4, pause_seconds=0.05), time.clock())

    assert time.slept == pytest.approx(3 * 4 * 0.05)


# --- whose answers are right

ANSWERS = [np.random.default_rng(0).standard_normal((16, 3)) * 0.01 + 5]
DEVIATIONS = [0.01]


def test_answers_that_round_are_right_and_the_error_is_over_their_spread() -> None:
    found = [(ANSWERS[0] + 1e-6).astype(np.float32)]
    error = check_answers(found, ANSWERS, DEVIATIONS, "int8")

    assert error == pytest.approx(1e-4, rel=0.2)  # 1e-6 over 0.01, though answers are about 5


@pytest.mark.parametrize(
    "wrong",
    [
        (ANSWERS[0] + 1e-4).astype(np.float32),
        np.full((16, 3), np.nan, np.float32),
        np.full((16, 3), 5, np.float32),  # what a graph gives that has lost its input
    ],
)
def test_answers_that_are_off_are_refused(wrong: np.ndarray) -> None:
    with pytest.raises(WrongAnswersError, match="of their spread off float64's"):
        check_answers([wrong], ANSWERS, DEVIATIONS, "float32")


def test_int8_may_err_more_and_not_at_will() -> None:
    off = [(ANSWERS[0] + 1e-3).astype(np.float32)]
    assert check_answers(off, ANSWERS, DEVIATIONS, "int8") == pytest.approx(0.1, rel=0.01)
    with pytest.raises(WrongAnswersError):
        check_answers([np.full((16, 3), 5, np.float32)], ANSWERS, DEVIATIONS, "int8")


@pytest.mark.parametrize(
    "found", [[], [np.zeros((16, 4), np.float32)], [ANSWERS[0]], [np.zeros((16, 3), np.float32)] * 2]
)
def test_other_shapes_dtypes_or_counts_are_refused(found: list[np.ndarray]) -> None:
    with pytest.raises(WrongAnswersError, match=re.escape("expected float32 [16, 3]")):
        check_answers(found, ANSWERS, DEVIATIONS, "int8")


# --- ratios and losses


def measured(subject: str, rounds_us: list[float], **changes: object) -> Measured:
    settings: dict[str, object] = {
        "point": POINT,
        "scope": Scope.ONE_TASK,
        "role": Role.RIVAL,
        "precision": "float32",
        "error": 1e-6,
    }
    return Measured(subject=subject, rounds_us=[[us] * 3 for us in rounds_us], **{**settings, **changes})


def results_of(*entries: Measured, absences: tuple[Absence, ...] = ()) -> Results:
    settings = {"command": "scripts/benchmark rivals", "seconds per point": "8", "least rounds": "5"}
    return Results(settings, {BASE.label: "a note"}, list(entries), list(absences))


def test_a_ratio_is_taken_within_rounds() -> None:
    """A machine that is slow for a while slows both."""
    ratio = take_ratio(measured("a", [100, 300, 200]), measured("b", [50, 150, 100]))

    assert (ratio.median, ratio.low, ratio.high, ratio.is_steady) == (2, 2, 2, True)


def test_a_ratio_that_moves_is_called_unsteady() -> None:
    ratio = take_ratio(measured("a", [100, 100, 110, 110]), measured("b", [100] * 4))

    assert not ratio.is_steady
    assert ratio.low < ratio.median < ratio.high


def test_what_was_not_measured_together_has_no_ratio() -> None:
    for other in (measured("b", [1, 2]), measured("b", [1], point=dataclasses.replace(POINT, batch=64))):
        with pytest.raises(ValueError, match="not measured in the same rounds"):
            take_ratio(measured("a", [1]), other)


def test_losses_are_found_at_equal_or_better_precision_only() -> None:
    found = find_losses(
        results_of(
            measured("naive", [100, 100], role=Role.NAIVE),
            measured("ours", [80, 80], role=Role.OURS),
            measured("ours, int8", [50, 50], role=Role.OURS, precision="int8"),
            measured("faster", [60, 72]),
            measured("coarser", [20, 20], precision="bfloat16"),
            measured("slower", [90, 90]),
            measured("roof", [1, 1], role=Role.ROOF),
            measured("ours elsewhere", [1, 1], role=Role.OURS_ELSEWHERE),
        )
    )

    assert [(loss.ours, loss.rival) for loss in found] == [("ours, int8", "coarser"), ("ours", "faster")]
    assert [loss.clear for loss in found] == [1, 1]
    assert found[0].worst[1].median == pytest.approx(0.4)


def test_a_loss_counts_points_and_keeps_the_worst() -> None:
    points = [dataclasses.replace(POINT, batch=batch) for batch in BATCH_SIZES]
    entries = [
        entry
        for point, rival_us in zip(points, (50, 99, 101, 200), strict=True)
        for entry in (
            measured("ours", [100] * 3, role=Role.OURS, point=point),
            measured("rival", [rival_us] * 3, point=point),
        )
    ]
    (loss,) = find_losses(results_of(*entries))

    assert (len(loss.points), loss.measured, loss.clear) == (2, 4, 2)
    assert loss.worst[0].batch == 1


# --- the page


def test_the_page_has_ratios_to_naive_and_to_the_roof() -> None:
    text = write_page(
        results_of(
            measured("naive", [100] * 4, role=Role.NAIVE),
            measured("ours", [80] * 4, role=Role.OURS),
            measured("roof", [40] * 4, role=Role.ROOF, error=None),
        ),
        [],
    )

    assert "| naive | 100 µs | 2.50 |" in text
    assert "| ours | 0.80 (0.80–0.80) | 2.00 |" in text  # noqa: RUF001 - a span
    assert "Nowhere at the points that were measured" in text
    assert "| ours, one task | float32 | 1.0e-06 | 0.0001 |" in text
    assert "Left out" not in text


def test_all_tasks_are_held_against_one_naive_session_too() -> None:
    text = write_page(
        results_of(
            measured("naive", [100] * 4, role=Role.NAIVE),
            measured("naive, a session per task", [500] * 4, role=Role.NAIVE, scope=Scope.ALL_TASKS),
            measured("joint", [120] * 4, role=Role.OURS, scope=Scope.ALL_TASKS),
        ),
        [],
    )

    assert "| joint | 0.24 (0.24–0.24) | — | 1.20 |" in text  # noqa: RUF001 - a span


def test_the_page_says_where_we_lose() -> None:
    text = write_page(results_of(measured("ours", [80] * 2, role=Role.OURS), measured("rival", [40] * 2)), [])

    assert f"| ours, one task | rival | 1 of 1 | 1 | 0.50 (0.50–0.50) | {POINT.label} |" in text  # noqa: RUF001
    assert "Nowhere" not in text


@pytest.mark.parametrize(("second_us", "is_noisy"), [(80, False), (160, True)])
def test_a_noisy_run_is_called_noisy(second_us: float, is_noisy: bool) -> None:
    naive, ours = measured("naive", [100] * 4, role=Role.NAIVE), [80, 80, second_us, second_us]
    text = write_page(results_of(naive, measured("ours", ours, role=Role.OURS)), [])

    assert ("a noisy run" in text) is is_noisy
    assert f"{int(not is_noisy)} of 1 ratios to naive are steady" in text


def test_who_is_left_out_is_named_once_with_every_place_and_the_reason() -> None:
    reason = "broke | in\ntwo lines"
    text = write_page(
        results_of(
            measured("naive", [1], role=Role.NAIVE),
            absences=(Absence("rival", "here", reason), Absence("rival", "there", reason)),
        ),
        [],
    )

    assert "| rival | here; there | broke \\| in two lines |" in text


def test_samples_that_were_kept_make_the_same_page(tmp_path: Path) -> None:
    found = results_of(
        measured("naive", [100.123, 102.5], role=Role.NAIVE),
        measured("ours", [80.123, 82.01], role=Role.OURS),
        absences=(Absence("rival", "here", "why"),),
    )
    write_json(tmp_path / "found.json", found)
    page = tmp_path / "kept.md"

    done = CliRunner().invoke(
        benchmark_rivals.main, ["--from-json", str(tmp_path / "found.json"), "--page", str(page)]
    )

    assert done.exit_code == 0, done.output
    assert read_json(tmp_path / "found.json").points() == [POINT]
    assert "| ours | 0.80 (0.80–0.80) | — |" in page.read_text()  # noqa: RUF001 - a span
    assert str(tmp_path) not in page.read_text()


def test_without_matplotlib_the_page_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark_rivals, "is_installed", lambda: False)
    text = benchmark_rivals.publish(results_of(measured("naive", [1], role=Role.NAIVE)), tmp_path / "page.md")

    assert "| plots | this page | matplotlib is not installed" in text


def test_plots_are_drawn_beside_the_page(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason=NEEDS_EXTRA)
    points = [dataclasses.replace(POINT, batch=batch) for batch in BATCH_SIZES]
    entries = [
        entry
        for point in points
        for entry in (
            measured("naive", [100, 110], role=Role.NAIVE, point=point),
            measured("te-export task graph", [80, 85], role=Role.OURS, point=point),
        )
    ]
    (figure,) = draw_figures(results_of(*entries), tmp_path / "page.md")

    assert figure.path == tmp_path / "page-batch.png"
    assert figure.path.read_bytes().startswith(b"\x89PNG")
    assert f"]({figure.path.name})" in write_page(results_of(*entries), [figure])


# --- who is missing, fails or answers wrongly


@dataclasses.dataclass(frozen=True)
class Gives:
    """A subject that is open and gives what a function makes of the right answers."""

    model: rivals_models.Model
    change: Callable[[np.ndarray], np.ndarray]

    def call_for(self, x: np.ndarray) -> Callable[[], Answers]:
        return lambda: [self.change(answers).astype(np.float32) for answers in self.model.answers(len(x))]


def subject(name: str, role: Role, change: Callable[[np.ndarray], np.ndarray]) -> Subject:
    return Subject(name, Scope.ALL_TASKS, role, "float32", lambda setting: Gives(setting.model, change))


def raising(name: str, role: Role, error: Exception) -> Subject:
    def fail(setting: Setting) -> Gives:
        raise error

    return Subject(name, Scope.ALL_TASKS, role, "float32", fail)


NAIVE = subject("naive", Role.NAIVE, np.copy)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, make_model: MakeModel) -> Callable[..., tuple[Results, list[str]]]:
    """`run(*subjects)`: a plan of one small point with these; its results and what was told."""
    module = make_model(num_experts=2, task_output_dims=(3, 2))
    rows = np.random.default_rng(0).standard_normal((32, 20), dtype=np.float32)
    graphs = SimpleNamespace(int8="none")
    monkeypatch.setattr(
        rivals_run, "build_model", lambda choice: rivals_models.Model(choice, module, rows, "small")
    )
    monkeypatch.setattr(rivals_run, "make_graphs", lambda model, folder, has_cuda: graphs)

    def run_with(*subjects: Subject) -> tuple[Results, list[str]]:
        monkeypatch.setattr(rivals_run, "subjects_on", lambda device: list(subjects))
        results, told = results_of(), []
        rivals_run.run_plan(Plan((Block(SMALL, (4,)),), seconds=0, least_rounds=2), results, told.append)
        return results, told

    return run_with


def test_rivals_that_are_missing_or_fail_are_named_and_the_others_timed(run: Callable[..., object]) -> None:
    results, told = run(
        NAIVE,
        raising("absent", Role.RIVAL, MissingRivalError("pip install it")),
        raising("broken", Role.RIVAL, RuntimeError("no such\nkernel")),
        subject("fine", Role.RIVAL, np.copy),
    )

    assert [entry.subject for entry in results.measured] == ["naive", "fine"]
    assert [(each.subject, each.reason) for each in results.absences] == [
        ("absent, all tasks", "pip install it"),
        ("broken, all tasks", "RuntimeError: no such kernel"),
    ]
    assert any("left out: broken, all tasks" in line for line in told)
    assert "pip install it" in write_page(results, [])


def test_a_rival_with_other_numbers_is_named_with_its_error_and_not_timed(run: Callable[..., object]) -> None:
    results, _ = run(NAIVE, subject("off", Role.RIVAL, lambda answers: answers + 0.5))

    assert [entry.subject for entry in results.measured] == ["naive"]
    (absence,) = results.absences
    assert re.search(r"its answers are [\d.]+ of their spread off float64's", absence.reason)
    assert absence.where.endswith("B = 4")


def test_ours_that_fails_or_errs_ends_the_run(run: Callable[..., object]) -> None:
    with pytest.raises(RuntimeError, match="broken"):
        run(NAIVE, raising("te-export", Role.OURS, RuntimeError("broken")))
    with pytest.raises(WrongAnswersError):
        run(NAIVE, subject("te-export", Role.OURS, lambda answers: answers * 1.1))


def test_int8_of_ours_that_loses_too_much_is_named(run: Callable[..., object]) -> None:
    lossy = subject("te-export, int8", Role.OURS, lambda answers: answers + 0.5)
    results, _ = run(NAIVE, dataclasses.replace(lossy, precision="int8"))

    assert [entry.subject for entry in results.measured] == ["naive"]
    assert "allowed for int8: 0.3" in results.absences[0].reason


def test_what_the_plan_leaves_out_is_named(run: Callable[..., object]) -> None:
    few = dataclasses.replace(
        subject("few only", Role.RIVAL, np.copy), most_tasks=1, too_many="takes too long"
    )
    results, _ = run(NAIVE, few)

    assert [(each.subject, each.reason) for each in results.absences] == [
        ("few only, all tasks", "takes too long")
    ]


def test_a_package_that_is_missing_is_told_with_how_to_get_it() -> None:
    with pytest.raises(MissingRivalError, match=r"pip install .*'\.\[rivals\]'"):
        import_rival("no_such_rival")


def test_torch_compile_without_a_compiler_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(MissingRivalError, match="found no no-such-compiler"):
        rivals_torch.open_compiled(SimpleNamespace())


class FakeOpenVino:
    """As far as subjects use it; it compiles for `given`, whatever is asked for."""

    def __init__(self, given: str) -> None:
        self.given = given

    def Core(self) -> FakeOpenVino:
        return self

    def get_property(self, *names: str) -> object:
        if names == ("CPU", "OPTIMIZATION_CAPABILITIES"):
            return ["FP32", "INT8"]
        return 1 if names == ("INFERENCE_NUM_THREADS",) else SimpleNamespace(to_string=lambda: self.given)

    def read_model(self, path: Path) -> SimpleNamespace:
        return SimpleNamespace(reshape=lambda shape: None)

    def compile_model(self, model: object, device: str, settings: dict[str, object]) -> FakeOpenVino:
        assert (device, settings["PERFORMANCE_HINT"]) == ("CPU", "LATENCY")
        return self


def test_openvino_in_another_precision_than_asked_for_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rivals_openvino, "import_rival", lambda name: FakeOpenVino("bf16"))
    setting = SimpleNamespace(
        scope=Scope.ONE_TASK, graphs=SimpleNamespace(naive=Path("naive.onnx")), threads=1
    )
    with pytest.raises(RuntimeError, match="compiled for bf16 and 1 threads, expected f32 and 1"):
        rivals_openvino.open_openvino(setting, "f32").call_for(np.zeros((2, 3), np.float32))
    with pytest.raises(MissingRivalError, match="does not compute in bfloat16 on this CPU"):
        rivals_openvino.open_openvino(setting, "bf16")


# --- graphs and the command


@pytest.fixture(scope="module")
def small(make_model: MakeModel) -> rivals_models.Model:
    """The model that `exported` is a bundle of."""
    rows = np.random.default_rng(0).standard_normal((512, 20), dtype=np.float32)
    return rivals_models.Model(dataclasses.replace(SMALL, tasks=3, experts=3), make_model(), rows, "small")


@pytest.fixture(scope="module")
def graphs(
    small: rivals_models.Model,
    exported: te_export.ExportResult,
    tmp_path_factory: pytest.TempPathFactory,
) -> rivals_graphs.Graphs:
    """Those of the small model, without int8 and without all tasks as one graph."""
    folder = tmp_path_factory.mktemp("graphs")
    export_naive(small.module, folder / "naive.onnx")
    roofs = {scope: folder / f"{scope.name}.onnx" for scope in Scope}
    for path in roofs.values():
        write_roof(path, 4000, input_dim=20)
    return rivals_graphs.Graphs(
        naive=folder / "naive.onnx",
        all_tasks=folder / "missing.onnx",
        bundles={"cpu": exported.bundle},
        roofs=roofs,
        int8="not asked for",
        has_int8=False,
    )


def test_the_graph_of_another_task_is_what_torch_exports_of_it(
    small: rivals_models.Model, graphs: rivals_graphs.Graphs, tmp_path: Path
) -> None:
    export_naive(small.module, tmp_path / "second.onnx", task=1)

    found = rivals_graphs.graph_of_task(graphs, small, 1).graph
    expected = onnx.load(tmp_path / "second.onnx").graph

    assert [node.op_type for node in found.node] == [node.op_type for node in expected.node]
    weights = [
        [onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer] for graph in (found, expected)
    ]
    for own, right in zip(*weights, strict=True):
        np.testing.assert_array_equal(own, right)
    assert found.output[0].type.tensor_type.shape == expected.output[0].type.tensor_type.shape


@pytest.mark.parametrize("scope", list(Scope))
def test_who_needs_no_rival_answers_as_the_model_does(
    scope: Scope, small: rivals_models.Model, graphs: rivals_graphs.Graphs
) -> None:
    setting = Setting(small, graphs, scope, "cpu", threads=1)
    tasks = slice(len(setting.tasks))
    by_name = {
        subject.name: subject
        for subject in subjects_on("cpu")
        if subject.scope is scope and "cuda" in subject.devices and "one graph" not in subject.name
    }
    assert len(by_name) == 5  # naive, torch eager, te-export, te_runtime, roof
    for batch in (1, 5):
        for subject in by_name.values():
            found = subject.open(setting).call_for(small.batch(batch))()
            if subject.role is Role.ROOF:
                assert found == []
            else:
                answers, deviations = small.answers(batch)[tasks], small.deviations[tasks]
                check_answers(found, answers, deviations, subject.precision)


def test_a_roof_that_is_no_gemm_of_its_weight_is_refused(
    small: rivals_models.Model, graphs: rivals_graphs.Graphs, tmp_path: Path
) -> None:
    wrong = onnx.load(graphs.roofs[Scope.ONE_TASK])
    wrong.graph.node[0].attribute.append(onnx.helper.make_attribute("alpha", 1.5))
    onnx.save(wrong, tmp_path / "wrong.onnx")
    setting = Setting(
        small,
        dataclasses.replace(graphs, roofs={Scope.ONE_TASK: tmp_path / "wrong.onnx"}),
        Scope.ONE_TASK,
        "cpu",
        threads=1,
    )
    with pytest.raises(ArithmeticError, match="the roof's Gemm is"):
        open_roof(setting)


def test_int8_that_te_export_did_not_publish_is_told(
    small: rivals_models.Model, graphs: rivals_graphs.Graphs
) -> None:
    with pytest.raises(MissingRivalError, match="published no int8 variant: not asked for"):
        open_te_export(Setting(small, graphs, Scope.ONE_TASK, "cpu", threads=1), "int8")


@pytest.mark.skipif(torch.cuda.is_available(), reason="only where there is no GPU")
def test_cuda_that_is_not_there_is_told(graphs: rivals_graphs.Graphs) -> None:
    with pytest.raises(RuntimeError, match="asked for CUDAExecutionProvider"):
        open_session(str(graphs.naive), device="cuda", threads=1)
    with pytest.raises(MissingRivalError, match="sees no CUDA device"):
        rivals_torch.open_eager(SimpleNamespace(device="cuda"))

    done = CliRunner().invoke(benchmark_rivals.main, ["--quick", "--device", "cuda"])
    assert done.exit_code == 2
    assert "provider 'cuda' does not work here" in done.output
    assert benchmark_rivals.find_cuda("auto")[0] is False


def test_a_folder_that_is_not_there_is_told_before_anything_runs(tmp_path: Path) -> None:
    done = CliRunner().invoke(benchmark_rivals.main, ["--quick", "--page", str(tmp_path / "missing/page.md")])

    assert done.exit_code == 2
    assert "no such folder" in done.output


def test_an_interrupted_run_prints_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(plan: Plan, results: Results, tell: object) -> None:
        results.measured.append(measured("naive", [100], role=Role.NAIVE))
        raise KeyboardInterrupt

    monkeypatch.setattr(benchmark_rivals, "run_plan", interrupt)
    done = CliRunner().invoke(benchmark_rivals.main, ["--quick", "--device", "cpu"])

    assert done.exit_code == 130
    assert "| naive | 100 µs | — |" in done.output
    assert "interrupted after 1 of 4 points" in done.output
