"""docs/scheduler.md does what it says: its Python blocks run in order, and its table names the metrics there are."""

from __future__ import annotations

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
from te_runtime.scheduling.metrics import SchedulerMetrics
from te_runtime.scheduling.prometheus import SchedulerCollector

DOCUMENT = Path(__file__).parents[2] / "docs" / "scheduler.md"


def blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", DOCUMENT.read_text(), re.DOTALL | re.MULTILINE)


def test_the_python_blocks_run(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = TaskExpertConfig(backbone_dim=16, expert_dim=8, num_tasks=2, task_output_dims=(10, 5))
    torch.save(TaskExpertModel(config).state_dict(), tmp_path / "model.pt")
    te_export.export(tmp_path / "model.pt", tmp_path / "model-onnx")
    found = blocks()
    assert len(found) == 8
    (tmp_path / "app.py").write_text("\n".join(found))
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "app.py"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        output, errors = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        pytest.fail("the Python blocks hang")
    assert process.returncode == 0, errors
    assert "(1, 10) (1, 8)" in output
    assert "refused: it would be answered after" in output


def test_the_table_names_the_metrics_there_are() -> None:
    def never() -> SchedulerMetrics:
        raise AssertionError("describing asks no scheduler")

    there = {
        family.name + "_total" if family.type == "counter" else family.name
        for family in SchedulerCollector(never).describe()
    }
    told: set[str] = set()
    for line in DOCUMENT.read_text().splitlines():
        if line.startswith("| `te_runtime_"):
            names = re.findall(r"`(te_runtime_\w+|\.\.\.\w+)`", line.split("|")[1])
            told |= {name.replace("...", "te_runtime_executor") for name in names}
    assert told == there
