from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import te_runtime
from te_runtime import BundleError, ClosedError, InputError, Model, ProviderError, TeRuntimeError


@pytest.fixture(scope="module")
def model(pristine: Path) -> Model:
    return te_runtime.load(pristine, threads=1)


@pytest.fixture(scope="module")
def x() -> np.ndarray:
    return np.random.default_rng(7).normal(size=(9, 6)).astype(np.float32)


def assert_close(found: np.ndarray, oracle: np.ndarray) -> None:
    """float32 sums of at most 12 products, four layers deep: 1e-5 of the largest value is ten times what is seen."""
    assert found.dtype == np.float32
    assert found.shape == oracle.shape
    assert np.abs(found - oracle).max() <= 1e-5 * np.abs(oracle).max()


@pytest.mark.parametrize("batch", [1, 2, 9])
@pytest.mark.parametrize("options", [{}, {"gated": False}, {"two_inputs": True}, {"experts": 1}])
def test_predictions_are_those_of_the_oracle(
    tiny: ModuleType, tmp_path: Path, batch: int, options: dict[str, object]
) -> None:
    builder = tiny.TinyBundle(tiny.TinyOptions(**options))
    builder.write(tmp_path / "b")
    rng = np.random.default_rng(batch)
    feeds = {spec.name: rng.normal(size=(batch, spec.shape[1])).astype(np.float32) for spec in builder.inputs}
    with te_runtime.load(tmp_path / "b") as loaded:
        found = loaded.predict(feeds)
    oracle = builder.oracle(feeds)
    for task, prediction in found.items():
        assert_close(prediction.output, oracle[f"{task}.prediction"])
        if builder.options.gated:
            assert_close(prediction.routing_weights, oracle[f"{task}.routing_weights"])
        else:
            assert prediction.routing_weights is None


def test_what_a_model_tells(model: Model) -> None:
    assert model.tasks == ("task_0", "task_1")
    assert [spec.name for spec in model.inputs] == ["x"]
    assert (model.provider, model.precision) == ("cpu", "fp32")
    assert model.manifest.task_names == model.tasks
    assert repr(model) == "<te_runtime.Model tiny-onnx, fp32, 2 tasks, cpu>"


def test_any_subset_of_tasks_in_the_order_asked_for(model: Model, x: np.ndarray) -> None:
    every = model.predict(x)
    assert list(every) == ["task_0", "task_1"]
    assert list(model.predict(x, tasks=["task_1", "task_0"])) == ["task_1", "task_0"]
    one = model.predict(x, tasks=["task_1"])
    assert list(one) == ["task_1"]
    np.testing.assert_array_equal(one["task_1"].output, every["task_1"].output)
    assert list(model.predict(x, tasks=("task_0",))) == ["task_0"]


def test_a_batch_is_its_rows(model: Model, x: np.ndarray) -> None:
    every = model.predict(x)["task_0"].output
    for row in range(len(x)):
        assert_close(model.predict(x[row][None, :])["task_0"].output, every[row : row + 1])


def test_no_rows_give_no_rows(model: Model) -> None:
    found = model.predict(np.zeros((0, 6)))
    assert found["task_0"].output.shape == (0, 2)
    assert found["task_0"].output.dtype == np.float32
    assert found["task_0"].routing_weights.shape == (0, 3)


def test_a_dict_is_the_same_as_an_array(model: Model, x: np.ndarray) -> None:
    np.testing.assert_array_equal(model.predict({"x": x})["task_0"].output, model.predict(x)["task_0"].output)


def test_the_caller_s_array_is_not_changed(model: Model, x: np.ndarray) -> None:
    kept = x.copy()
    x.flags.writeable = False
    model.predict(x)
    x.flags.writeable = True
    np.testing.assert_array_equal(x, kept)


def test_nan_stays_in_its_row(model: Model, x: np.ndarray) -> None:
    broken = x.copy()
    broken[3] = np.nan
    found = model.predict(broken)["task_0"].output
    good = np.delete(np.arange(len(x)), 3)
    np.testing.assert_array_equal(found[good], model.predict(x)["task_0"].output[good])


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        (["tsk_0"], "unknown task 'tsk_0': did you mean 'task_0'? The tasks are task_0, task_1"),
        (["zebra"], "unknown task 'zebra': The tasks are task_0, task_1"),
        ([0], "found 0 among them"),
        (5, "tasks: found 5, expected a list of names"),
        (np.array([["task_0"]]), "among them, expected names: task_0, task_1"),
        (["task_0", "task_0"], "task 'task_0' is asked for twice"),
        ([], "tasks is empty"),
        ("task_0", "got the text 'task_0', expected a list of names: pass ['task_0']"),
    ],
)
def test_tasks_that_cannot_be_meant_are_refused(
    model: Model, x: np.ndarray, tasks: list[str], message: str
) -> None:
    for call in (lambda: model.predict(x, tasks=tasks), lambda: model.prepare(tasks)):
        with pytest.raises(InputError) as caught:
            call()
        assert message in str(caught.value)


def test_a_wrong_input_is_refused_before_anything_runs(model: Model) -> None:
    with pytest.raises(
        InputError, match=r"got shape \(6,\), expected \(batch, 6\): for one row pass x\[None, :\]"
    ):
        model.predict(np.zeros(6))
    with pytest.raises(ValueError, match="expected a numpy array"):
        model.predict([[0.0] * 6])


def test_after_close_everything_raises(pristine: Path, x: np.ndarray) -> None:
    with te_runtime.load(pristine) as loaded:
        assert loaded.predict(x)
    for use in (lambda: loaded.predict(x), loaded.prepare, loaded.verify, loaded.__enter__):
        with pytest.raises(ClosedError, match=r"call te_runtime\.load\(\) again"):
            use()
    loaded.close()
    assert "closed" in repr(loaded)
    assert loaded.tasks == ("task_0", "task_1")


def test_threads_may_share_a_model(model: Model, x: np.ndarray) -> None:
    alone = [model.predict(x[:rows])["task_1"].output for rows in range(1, 10)]
    with ThreadPoolExecutor(4) as pool:
        together = list(
            pool.map(lambda rows: model.predict(x[:rows])["task_1"].output, list(range(1, 10)) * 20)
        )
    for number, found in enumerate(together):
        np.testing.assert_array_equal(found, alone[number % 9])


ARRAY = np.array(["split", "joint"])


@pytest.mark.parametrize(
    ("argument", "values", "expected"),
    [
        ("mode", ("fast", 5, ARRAY), "'joint', 'split', 'task' or 'pruned'"),
        ("provider", ("tpu", 5, None, ARRAY), "'cpu', 'cuda' or 'auto'"),
        ("precision", ("fp16", 5, ARRAY), "'fp32'"),
        ("check", ("never", None, ARRAY), "'full' or 'size'"),
        ("on_nonfinite", ("no", None, ARRAY), "'pass' or 'error'"),
        ("threads", (0, 2.0, "2", True, 10**9), "a whole number from 1 to 1024"),
        ("max_batch", (0, 2.0, "2", True), "a whole number from 1"),
        ("spinning", (1, "yes", None), "True or False"),
    ],
)
def test_arguments_of_load_say_what_was_found_and_expected(
    pristine: Path, argument: str, values: tuple[object, ...], expected: str
) -> None:
    for value in values:
        with pytest.raises(TeRuntimeError) as caught:
            te_runtime.load(pristine, **{argument: value})
        assert str(caught.value).startswith(argument)
        assert f"found {value!r:.80}, expected {expected}" in str(caught.value)


def test_any_integer_will_do(pristine: Path) -> None:
    with te_runtime.load(pristine, threads=np.int64(1), max_batch=np.uint8(2)) as model:
        assert model.predict(np.zeros((5, 6)))["task_0"].output.shape == (5, 2)


def test_paths_of_any_kind(pristine: Path) -> None:
    for path in (pristine, str(pristine), os.fsencode(pristine)):
        te_runtime.load(path).close()
    for wrong in (None, 5, 3.0, [str(pristine)]):
        with pytest.raises(InputError, match="expected text or a path: the bundle"):
            te_runtime.load(wrong)
    with pytest.raises(BundleError, match="`~` is not expanded"):
        te_runtime.load("~/nothing-there")


def test_wrong_arguments_of_load(pristine: Path, tmp_path: Path) -> None:
    with pytest.raises(ProviderError, match="expected 'cpu', 'cuda' or 'auto'"):
        te_runtime.load(pristine, provider="tpu")
    with pytest.raises(InputError, match="precision of this bundle: found 'fp16', expected 'fp32'"):
        te_runtime.load(pristine, precision="fp16")
    with pytest.raises(InputError, match="threads"):
        te_runtime.load(pristine, threads=0)
    with pytest.raises(InputError, match="check"):
        te_runtime.load(pristine, check="never")
    with pytest.raises(BundleError, match="no such folder"):
        te_runtime.load(tmp_path / "nothing")
    assert te_runtime.load(pristine, precision="fp32", check="size").precision == "fp32"
