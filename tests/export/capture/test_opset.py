"""Which opsets may be asked for, and that each of them gives graphs that are right."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from te_export.bundle.graph_file import standalone_bytes
from te_export.capture import opset as opset_module
from te_export.capture.opset import OLDEST_OPSET, choose_opset, newest_opset
from te_export.capture.torch_capture import capture
from te_export.errors import DependencyError, UsageError
from te_export.models.exportable import ExportableModel
from te_export.models.task_expert import TaskExpertModel

ALLOWED = range(OLDEST_OPSET, newest_opset() + 1)


@pytest.fixture(scope="module")
def tiny(make_model: Callable[..., TaskExpertModel], load: Callable[..., ExportableModel]) -> ExportableModel:
    model = make_model(
        input_dim=5, backbone_dim=3, expert_dim=4, num_experts=2, task_output_dims=(2,), final_relu=True
    )
    return load(model.state_dict(), config={"final_relu": True})


def test_the_newest_is_the_default_and_known_to_onnx() -> None:
    assert choose_opset(None) == newest_opset()
    assert OLDEST_OPSET < newest_opset() <= onnx.defs.onnx_opset_version()


@pytest.mark.parametrize("asked", sorted({*ALLOWED[::2], ALLOWED[-1]}))
def test_every_allowed_opset_gives_right_graphs(asked: int, tiny: ExportableModel) -> None:
    joint = capture(tiny, choose_opset(asked))
    data = standalone_bytes(joint.model, "joint")

    proto = onnx.load_from_string(data)
    onnx.checker.check_model(proto, full_check=True)
    assert [(entry.domain, entry.version) for entry in proto.opset_import] == [("", asked)]
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    for rows in (1, 3, 64):
        x = np.random.default_rng(rows).standard_normal((rows, 5)).astype(np.float32)
        with torch.no_grad():
            wanted = [value.double().numpy() for value in tiny.module(torch.from_numpy(x))]
        for found, expected in zip(session.run(None, {"x": x}), wanted, strict=True):
            # Sums of at most 8 products of values near 1, in float32: a few of their units in the last place.
            np.testing.assert_allclose(found, expected, rtol=0, atol=16 * np.finfo(np.float32).eps)


@pytest.mark.parametrize("asked", [-1, 0, 7, OLDEST_OPSET - 1, newest_opset() + 1, 10**6])
def test_other_opsets_are_refused_with_the_range(asked: int) -> None:
    with pytest.raises(UsageError, match=f"--opset {asked}: expected {OLDEST_OPSET} to {newest_opset()}"):
        choose_opset(asked)


def test_an_onnxruntime_that_runs_none_of_them_is_a_dependency_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opset_module, "_runs", lambda opset: False)

    with pytest.raises(DependencyError, match="Upgrade it"):
        newest_opset()


def test_the_newest_is_found_by_asking_onnxruntime(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opset_module, "_runs", lambda opset: opset <= 21)

    assert newest_opset() == 21
    with pytest.raises(UsageError, match="expected 18 to 21"):
        choose_opset(22)
