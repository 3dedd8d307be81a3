from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import te_runtime
from te_runtime.errors import InputError
from te_runtime.manifest import parse_manifest
from te_runtime.plan import Plan, choose_plan, takes_joint_tails

MODES = ("joint", "split", "task")


def test_what_each_mode_opens(pristine: Path) -> None:
    variant = parse_manifest((pristine / "manifest.json").read_bytes(), "manifest.json").variants[0]
    opened = {mode: choose_plan(variant, mode) for mode in MODES}
    assert opened["joint"].graphs == ("fp32/joint.onnx",)
    assert opened["split"].graphs == (
        "fp32/trunk.onnx",
        "fp32/joint-tails.onnx",
        "fp32/tail-task_0.onnx",
        "fp32/tail-task_1.onnx",
    )
    assert opened["task"].graphs == (
        "fp32/task-task_0.onnx",
        "fp32/task-task_1.onnx",
        "fp32/trunk.onnx",
        "fp32/tail-task_0.onnx",
        "fp32/tail-task_1.onnx",
    )
    assert {plan.reason for plan in opened.values()} == {"asked for"}


def test_several_tasks_are_split_and_one_is_not(tiny: ModuleType, pristine: Path, tmp_path: Path) -> None:
    tiny.write_tiny_bundle(tmp_path / "one", outputs={"only": 2})
    with te_runtime.load(pristine) as several, te_runtime.load(tmp_path / "one") as one:
        assert (several.plan.mode, one.plan.mode) == ("split", "joint")
        assert "only the tails asked for" in several.plan.reason
        assert "one graph" in one.plan.reason
        assert one.predict(np.zeros((2, 6)))["only"].output.shape == (2, 2)


@pytest.mark.parametrize(("of", "least"), [(2, 2), (5, 5), (10, 9), (20, 18), (200, 180)])
def test_joint_tails_are_for_nine_tenths_of_the_tasks(of: int, least: int) -> None:
    assert [asked for asked in range(1, of + 1) if takes_joint_tails(asked, of=of)] == [*range(least, of + 1)]


@pytest.mark.parametrize("mode", MODES)
def test_what_is_loaded_when(pristine: Path, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = keep_opened(monkeypatch)
    x = np.zeros((2, 6), dtype=np.float32)
    at_load = {"joint": ["joint"], "split": ["trunk"], "task": []}[mode]
    for_one = {"joint": [], "split": ["tail-task_1"], "task": ["task-task_1"]}[mode]
    for_all = {"joint": [], "split": ["joint-tails"], "task": ["trunk", "tail-task_0", "tail-task_1"]}[mode]
    with te_runtime.load(pristine, mode=mode) as model:
        assert opened == at_load
        model.prepare(["task_1"])
        assert opened == at_load + for_one
        model.predict(x, ["task_1"])
        assert opened == at_load + for_one
        model.predict(x)
        model.prepare()
        assert sorted(opened) == sorted(at_load + for_one + for_all)
        assert {f"fp32/{stem}.onnx" for stem in opened} <= set(model.plan.graphs)


def test_tails_run_on_the_calling_thread_and_what_is_large_on_several(
    pristine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxruntime

    real, threads = onnxruntime.InferenceSession, {}

    def keep(path: str, options: onnxruntime.SessionOptions, **others: object) -> object:
        threads[Path(path).stem] = options.intra_op_num_threads
        return real(path, options, **others)

    monkeypatch.setattr(onnxruntime, "InferenceSession", keep)
    with te_runtime.load(pristine, threads=3) as model:
        model.prepare()
        model.prepare(["task_0"])
    assert threads == {"trunk": 3, "joint-tails": 3, "tail-task_0": 1}


def keep_opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The stems of the graphs that onnxruntime opens from now on, as they come."""
    import onnxruntime

    real, opened = onnxruntime.InferenceSession, []

    def keep(path: str, *arguments: object, **options: object) -> object:
        opened.append(Path(path).stem)
        return real(path, *arguments, **options)

    monkeypatch.setattr(onnxruntime, "InferenceSession", keep)
    return opened


def test_a_plan_prints_what_a_person_wants_to_know() -> None:
    shown = str(Plan("split", ("fp32/trunk.onnx", "fp32/tail-a.onnx"), "asked for"))
    assert shown == "mode split: asked for\n  fp32/trunk.onnx\n  fp32/tail-a.onnx"


def test_a_mode_that_is_none_is_refused(pristine: Path) -> None:
    with pytest.raises(
        InputError, match=r"mode: found 'fast', expected 'joint', 'split', 'task' or 'pruned'"
    ):
        te_runtime.load(pristine, mode="fast")


@pytest.mark.parametrize("batch", [1, 2, 9, 64])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gated": False},
        {"two_inputs": True},
        {"gates_read_inputs": True, "two_inputs": True},
        {"joint_tails": False},
    ],
)
def test_every_mode_gives_the_same(
    tiny: ModuleType, tmp_path: Path, batch: int, options: dict[str, object]
) -> None:
    """float32 sums of at most 12 products, four layers deep: modes differ by at most 1e-5 of the largest value."""
    builder = tiny.TinyBundle(tiny.TinyOptions(outputs={"a": 2, "b": 1, "c": 3}, **options))
    builder.write(tmp_path / "b")
    rng = np.random.default_rng(batch)
    feeds = {s.name: rng.standard_normal((batch, s.shape[1]), dtype=np.float32) for s in builder.inputs}
    oracle = builder.oracle(feeds)
    for mode in MODES:
        with te_runtime.load(tmp_path / "b", mode=mode) as model:
            assert model.plan.mode == mode
            for tasks in (None, ["c", "a"], ["b"], ["b", "c", "a"]):
                found = model.predict(feeds, tasks)
                assert list(found) == (tasks or ["a", "b", "c"])
                for task, (output, weights, _) in found.items():
                    exact = oracle[f"{task}.prediction"]
                    assert np.abs(output - exact).max() <= 1e-5 * np.abs(exact).max()
                    if builder.options.gated:
                        np.testing.assert_allclose(weights, oracle[f"{task}.routing_weights"], atol=1e-5)
                    else:
                        assert weights is None
            empty = model.predict({name: array[:0] for name, array in feeds.items()}, ["c"])
            assert empty["c"].output.shape == (0, 3)


@pytest.mark.parametrize("mode", MODES)
def test_verify_checks_every_graph_in_every_mode(pristine: Path, mode: str) -> None:
    with te_runtime.load(pristine, mode=mode) as model:
        report = model.verify()
    assert report.ok
    assert "fp32/trunk.onnx + fp32/tail-task_0.onnx" in report.graphs
    assert "fp32/trunk.onnx + fp32/joint-tails.onnx" in report.graphs
    assert "fp32/joint.onnx" in report.graphs
