"""Builders shared by the checkpoint tests: a small seeded model, and files made of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from te_export.models.task_expert import TaskExpertConfig, TaskExpertModel

Save = Callable[..., Path]


@pytest.fixture
def config() -> TaskExpertConfig:
    return TaskExpertConfig(
        input_dim=6, backbone_dim=5, expert_dim=4, num_experts=3, num_tasks=2, task_output_dims=(2, 3)
    )


@pytest.fixture
def model(config: TaskExpertConfig) -> TaskExpertModel:
    torch.manual_seed(7)
    return TaskExpertModel(config)


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """torch.save to a file of its own; keyword arguments go to torch.save."""

    def save_object(value: object, name: str = "model.pt", **options: object) -> Path:
        path = tmp_path / name
        torch.save(value, path, **options)
        return path

    return save_object
