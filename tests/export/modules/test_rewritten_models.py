"""Every rewritten model is exported from its module alone, and its bundle answers what the module does."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import te_export
import te_runtime
from te_runtime.manifest import OutputParity
from te_runtime.plan import Mode

BATCHES = (1, 2, 7, 64)
MODES: tuple[Mode, ...] = ("joint", "split", "task")
TORCH_FACTOR = 4.0
SUM_ERROR = 1e-6
"""A softmax of a few float32 numbers: their sum rounds by a few units of 2^-24."""


@dataclass(frozen=True)
class Answers:
    predictions: dict[str, NDArray[np.generic]]
    weights: dict[str, NDArray[np.generic]]


def answer(model: Any, module: nn.Module, inputs: Any) -> Answers:
    """The module's own predictions, and what its gates said meanwhile."""
    weights: dict[str, Tensor] = {}
    handles = [
        module.get_submodule(path).register_forward_hook(
            lambda _module, _inputs, output, task=task: weights.update({task: output})
        )
        for task, path in model.gates.items()
    ]
    with torch.no_grad():
        predictions = model.call(module, inputs)
    for handle in handles:
        handle.remove()
    return Answers(
        {task: tensor.numpy() for task, tensor in predictions.items()},
        {task: tensor.numpy() for task, tensor in weights.items()},
    )


def converted(inputs: Any, change: Callable[[Tensor], Any]) -> Any:
    if isinstance(inputs, dict):
        return {name: change(tensor) for name, tensor in inputs.items()}
    return tuple(map(change, inputs)) if isinstance(inputs, tuple) else change(inputs)


def feeds(model: te_runtime.Model, inputs: Any) -> Any:
    """What predict takes: the module's inputs by the names that the bundle has for them."""
    arrays = converted(inputs, Tensor.numpy)
    if isinstance(arrays, tuple):
        return {spec.name: array for spec, array in zip(model.inputs, arrays, strict=True)}
    return arrays


def allowed(parity: OutputParity, torch_error: float) -> float:
    return max(
        TORCH_FACTOR * torch_error, *(group.bound for group in parity.groups if group.group == "ordinary")
    )


def require_close(
    found: NDArray[np.generic],
    own: NDArray[np.generic],
    oracle: NDArray[np.generic],
    parity: OutputParity,
) -> None:
    assert found.shape == (oracle.shape if oracle.ndim > 1 else (len(oracle), 1))
    found = found.reshape(oracle.shape)
    assert np.abs(found - oracle).max() <= allowed(parity, float(np.abs(own - oracle).max()))


def test_the_builders_make_what_they_promise(model_name: str, rewritten_models: ModuleType) -> None:
    build = rewritten_models.REWRITTEN_MODELS[model_name]
    model, again = build(), build()

    answers = answer(model, model.module, model.example_inputs)

    assert not any(part.training for part in model.module.modules())
    assert tuple(answers.predictions) == model.task_names
    assert {task: weights.shape[1] for task, weights in answers.weights.items()} == dict(model.experts)
    for weights in answers.weights.values():
        np.testing.assert_allclose(weights.sum(axis=1), 1.0, rtol=0, atol=SUM_ERROR)
    for name, tensor in model.module.state_dict().items():
        assert torch.equal(tensor, again.module.state_dict()[name])


def test_a_rewritten_model_is_exported(
    model_name: str,
    rewritten_models: ModuleType,
    load_for_all_tasks: Callable[..., AbstractContextManager[Any]],
    tmp_path: Path,
) -> None:
    model = rewritten_models.REWRITTEN_MODELS[model_name]()
    exact = copy.deepcopy(model.module).double()

    result = te_export.export(
        model.module, tmp_path / "bundle", example_inputs=model.example_inputs, task_names=model.task_names
    )

    tasks = {task.name: task for task in result.manifest.tasks}
    assert tuple(tasks) == model.task_names
    gated = {name for name, task in tasks.items() if task.routing_weights is not None}
    assert gated == set(model.gates) or (model.gates_may_stay_hidden and gated < set(model.gates))
    parity = {entry.task: entry for entry in result.manifest.variants[0].parity}
    for mode in MODES:
        with load_for_all_tasks(result.bundle, mode=mode, threads=1) as loaded:
            for rows in BATCHES:
                inputs = model.make_rows(rows, 100 + rows)
                own = answer(model, model.module, inputs)
                oracle = answer(
                    model, exact, converted(inputs, lambda t: t.double() if t.is_floating_point() else t)
                )
                for task, found in loaded.predict(feeds(loaded, inputs)).items():
                    predictions = own.predictions[task], oracle.predictions[task]
                    require_close(found.output, *predictions, parity[task].prediction)
                    if task not in gated:
                        assert found.routing_weights is None
                        continue
                    assert found.routing_weights is not None
                    assert found.routing_weights.shape[1] == model.experts[task]
                    judged = parity[task].routing_weights
                    assert judged is not None
                    require_close(found.routing_weights, own.weights[task], oracle.weights[task], judged)
                    np.testing.assert_allclose(found.routing_weights.sum(axis=1), 1.0, rtol=0, atol=SUM_ERROR)


@pytest.mark.parametrize("name", ["mmoe to a dict", "mmoe of two inputs"])
def test_arrays_are_as_good_as_tensors(name: str, rewritten_models: ModuleType, tmp_path: Path) -> None:
    model = rewritten_models.REWRITTEN_MODELS[name]()

    found = [
        te_export.export(
            model.module, tmp_path / folder, example_inputs=inputs, task_names=model.task_names
        ).manifest.inputs
        for folder, inputs in (
            ("tensors", model.example_inputs),
            ("arrays", converted(model.example_inputs, Tensor.numpy)),
        )
    ]

    assert found[0] == found[1]
