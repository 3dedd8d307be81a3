"""A graph that is only tried is told of without the folder it was tried in, which has another name each time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from te_export.partition import GraphSet
from te_export.precision.trial import open_trial
from te_runtime.errors import BundleError


def test_a_refusal_names_no_folder(wide_graphs: Callable[[], GraphSet], tmp_path: Path) -> None:
    model = wide_graphs().joint.clone()
    for node in model.graph:
        if node.op_type == "Relu":
            node.op_type = "NoSuchOperator"

    with pytest.raises(BundleError, match="NoSuchOperator") as caught:
        open_trial(model, tmp_path)

    assert str(caught.value).startswith("graph.onnx: onnxruntime")
    assert str(tmp_path) not in str(caught.value)
