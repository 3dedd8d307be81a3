"""Small models of torch-rechub: recommendation models over dense features and sparse ids.

Every one takes a dict of named tensors, (B,) float32 for a dense feature, (B,) int64 for an id and (B, L) int64
for a sequence of ids, and gives one tensor (B, T) with a column per task.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from library_model import LibraryModel, as_if_trained
from torch import Tensor, nn
from torch_rechub.basic.features import DenseFeature, SequenceFeature, SparseFeature
from torch_rechub.models.multi_task import AITM, ESMM, MMOE, PLE, SharedBottom

__all__ = ["RECHUB_MODELS", "build_mmoe"]

Feature = DenseFeature | SparseFeature | SequenceFeature

TASKS = ("click", "buy", "seconds")
TASK_TYPES = ["classification", "classification", "regression"]
EXPERT = {"dims": [16, 8], "activation": "relu", "dropout": 0.2}
TOWER = {"dims": [8], "activation": "relu", "dropout": 0.2}
USERS, ITEMS, CATEGORIES, HISTORY = 40, 60, 12, 6


def _features() -> list[Feature]:
    """New ones for each model: a feature keeps the embedding it was first asked for."""
    return [
        DenseFeature("age"),
        DenseFeature("price"),
        SparseFeature("user", vocab_size=USERS, embed_dim=4),
        SparseFeature("item", vocab_size=ITEMS, embed_dim=4),
        SparseFeature("category", vocab_size=CATEGORIES, embed_dim=4),
        SequenceFeature(
            "history", vocab_size=ITEMS, embed_dim=4, pooling="mean", shared_with="item", padding_idx=0
        ),
    ]


def _rows(rows: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def ids(vocabulary: int, *shape: int) -> Tensor:
        return torch.randint(0, vocabulary, (rows, *shape), generator=generator)

    return {
        "age": torch.randn(rows, generator=generator),
        "price": torch.randn(rows, generator=generator),
        "user": ids(USERS),
        "item": ids(ITEMS),
        "category": ids(CATEGORIES),
        "history": ids(ITEMS, HISTORY),
    }


def _id_rows(rows: int, seed: int) -> dict[str, Tensor]:
    every = _rows(rows, seed)
    return {name: every[name] for name in ("user", "item", "category")}


def build_mmoe() -> nn.Module:
    """An untrained MMOE of four experts."""
    return MMOE(_features(), TASK_TYPES, 4, EXPERT, [TOWER] * len(TASKS))


def _mmoe() -> LibraryModel:
    torch.manual_seed(1)
    module = build_mmoe()
    gates = {task: f"gates.{index}" for index, task in enumerate(TASKS)}
    return LibraryModel(as_if_trained(module, 1), _rows, TASKS, gates, fused_output=True)


def _ple() -> LibraryModel:
    """Two levels; a task's last gate weighs its two own experts, then the three shared ones."""
    torch.manual_seed(2)
    module = PLE(_features(), TASK_TYPES, 2, 2, 3, EXPERT, [TOWER] * len(TASKS))
    gates = {task: f"cgc_layers.1.gates_specific.{index}" for index, task in enumerate(TASKS)}
    return LibraryModel(as_if_trained(module, 2), _rows, TASKS, gates, fused_output=True)


def _shared_bottom() -> LibraryModel:
    torch.manual_seed(3)
    module = SharedBottom(_features(), TASK_TYPES, EXPERT, [TOWER] * len(TASKS))
    return LibraryModel(as_if_trained(module, 3), _rows, TASKS, fused_output=True)


def _esmm() -> LibraryModel:
    """Two towers, three outputs: the last is the product of the first two."""
    user = [SparseFeature("user", vocab_size=USERS, embed_dim=4)]
    item = [
        SparseFeature("item", vocab_size=ITEMS, embed_dim=4),
        SparseFeature("category", vocab_size=CATEGORIES, embed_dim=4),
    ]
    torch.manual_seed(4)
    module = ESMM(user, item, TOWER, TOWER)
    return LibraryModel(
        as_if_trained(module, 4),
        _id_rows,
        ("cvr", "ctr", "ctcvr"),
        fused_output=True,
        needs_whole_model=frozenset({"ctcvr"}),
    )


def _aitm() -> LibraryModel:
    """Each task after the first attends over its own tower and what the task before hands on."""
    tasks = ("impression", "click", "buy")
    torch.manual_seed(5)
    module = AITM(_features(), len(tasks), EXPERT, [TOWER] * len(tasks))
    return LibraryModel(
        as_if_trained(module, 5),
        _rows,
        tasks,
        optional_gates={"click": 2, "buy": 2},
        fused_output=True,
    )


RECHUB_MODELS: Mapping[str, Callable[[], LibraryModel]] = MappingProxyType(
    {
        "rechub-mmoe": _mmoe,
        "rechub-ple": _ple,
        "rechub-shared-bottom": _shared_bottom,
        "rechub-esmm": _esmm,
        "rechub-aitm": _aitm,
    }
)
