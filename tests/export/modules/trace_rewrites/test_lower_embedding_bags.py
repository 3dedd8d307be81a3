"""An EmbeddingBag over padded ids becomes a lookup and a reduction, of the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import te_runtime
from te_export import export
from te_export.errors import CaptureError
from te_export.modules.example_inputs import read_example_inputs
from te_export.modules.module_inputs import module_inputs
from te_export.modules.trace import Traced
from te_export.modules.trace_rewrites.lower_embedding_bags import lower_embedding_bags
from te_export.modules.traced_module import TracedModule

TraceModule = Callable[..., Traced]
MODES = ("sum", "mean", "max")
PADDINGS = (None, 0, -1)
IDS, LENGTH = 11, 5
SMALL_ERROR = 1e-6
"""Of sums of five float32 numbers of size one."""


class Bags(nn.Module):
    """Every mode with every padding, and one whose ids are weighed."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.bags = nn.ModuleDict(
            {
                f"{mode}_{index}": nn.EmbeddingBag(IDS, 3, mode=mode, padding_idx=padding)
                for mode in MODES
                for index, padding in enumerate(PADDINGS)
            }
        )
        self.weighed = nn.EmbeddingBag(IDS, 3, mode="sum", padding_idx=0)

    def forward(self, ids: Tensor, weights: Tensor) -> dict[str, Tensor]:
        return {name: bag(ids) for name, bag in self.bags.items()} | {
            "weighed": self.weighed(ids, per_sample_weights=weights)
        }


def rows(count: int, seed: int) -> dict[str, Tensor]:
    """Ids with padding among them; the first row is nothing but id 0, the second nothing but the last one."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, IDS, (count, LENGTH), generator=generator)
    ids[:, 3:] = torch.tensor([0, IDS - 1])
    ids[0], ids[1:2] = 0, IDS - 1
    return {"ids": ids, "weights": torch.randn(count, LENGTH, generator=generator)}


@pytest.fixture(scope="module")
def lowered(trace_module: TraceModule) -> Traced:
    traced = trace_module(Bags().eval(), rows(4, 0))
    assert lower_embedding_bags(traced) == len(MODES) * len(PADDINGS) + 1
    return traced


@pytest.mark.parametrize("count", [1, 2, 9])
def test_the_numbers_stay(lowered: Traced, count: int) -> None:
    inputs = rows(count, count)
    with torch.no_grad():
        found = TracedModule(lowered)(*inputs.values())
        expected = Bags().eval()(**inputs)

    for (name, one), other in zip(expected.items(), found, strict=True):
        np.testing.assert_allclose(other, one, rtol=0, atol=SMALL_ERROR, err_msg=name)


def test_no_bag_is_left_and_shapes_are_known(lowered: Traced) -> None:
    assert not [node for node in lowered.graph.nodes if "embedding_bag" in str(node.target)]
    assert all(tuple(node.meta["val"].shape[1:]) == (3,) for node in lowered.outputs())


def test_ids_are_known_to_index_a_table(lowered: Traced) -> None:
    ids, weights = module_inputs(read_example_inputs(rows(4, 0), Bags()), lowered)

    assert (ids.below, weights.below) == (IDS, None)


class OfOffsets(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(IDS, 3))

    def forward(self, ids: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
        bags = F.embedding_bag(ids.reshape(-1), self.table, starts)
        return bags, bags * 2


def test_bags_of_their_own_lengths_are_refused_with_the_line(trace_module: TraceModule) -> None:
    example = {"ids": torch.zeros(4, 5, dtype=torch.long), "starts": torch.arange(0, 20, 5)}
    traced = trace_module(OfOffsets().eval(), example)

    with pytest.raises(
        CaptureError, match=r"by offsets \(test_lower_embedding_bags.py:\d+, in forward: bags = "
    ):
        lower_embedding_bags(traced)


class Recommender(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.history = nn.EmbeddingBag(IDS, 4, mode="mean", padding_idx=0)
        self.click, self.buy = nn.Linear(4, 1), nn.Linear(4, 2)

    def forward(self, history: Tensor) -> dict[str, Tensor]:
        h = self.history(history)
        return {"click": self.click(h), "buy": self.buy(h)}


def test_a_model_of_bags_is_exported(tmp_path: Path) -> None:
    history = rows(6, 2)["ids"]

    result = export(Recommender().eval(), tmp_path / "out", example_inputs=history)

    with te_runtime.load(result.bundle, threads=1) as model, torch.no_grad():
        found = model.predict(history.numpy())
        for task, expected in Recommender().eval()(history).items():
            np.testing.assert_allclose(found[task].output, expected.numpy(), rtol=0, atol=SMALL_ERROR)
