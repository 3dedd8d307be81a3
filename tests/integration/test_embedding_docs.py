"""docs/embedding.md does what it says: its Python blocks run in order, as a reader would run them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import te_export
from te_export.models.task_expert import TaskExpertConfig, TaskExpertModel

DOCUMENT = Path(__file__).parents[2] / "docs" / "embedding.md"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the bundle that the document speaks of."""
    root = tmp_path_factory.mktemp("embedding")
    torch.manual_seed(0)
    config = TaskExpertConfig(backbone_dim=16, expert_dim=8, num_tasks=2, task_output_dims=(10, 5))
    torch.save(TaskExpertModel(config).state_dict(), root / "model.pt")
    te_export.export(root / "model.pt", root / "model-onnx")
    return root


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", DOCUMENT.read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.skipif(
    not hasattr(os, "fork"), reason="the block on forking needs os.fork, as on Linux and macOS"
)
def test_the_python_blocks_run(folder: Path) -> None:
    found = blocks("python")
    assert len(found) == 5
    (folder / "app.py").write_text("\n".join(found))
    command = [sys.executable, "-W", "error", "-W", "ignore::DeprecationWarning", "app.py"]
    process = subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        output, errors = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        pytest.fail("the Python blocks hang")
    assert process.returncode == 0, errors
    assert "mode split" in output


def test_paths_names_and_shapes_in_other_languages_are_those_of_a_bundle(folder: Path) -> None:
    manifest = json.loads((folder / "model-onnx" / "manifest.json").read_text())
    graph = manifest["variants"][0]["tasks"][0]["graph"]
    assert [(spec["name"], spec["shape"]) for spec in graph["inputs"]] == [("x", ["batch", 784])]
    shapes = {spec["name"]: spec["shape"] for spec in graph["outputs"]}
    assert shapes == {"prediction": ["batch", 10], "routing_weights": ["batch", 8]}
    for language in ("cpp", "csharp"):
        (block,) = blocks(language)
        for part in (f'"model-onnx/{graph["path"]}"', '"x"', "784", *(f'"{name}"' for name in shapes)):
            assert part in block
