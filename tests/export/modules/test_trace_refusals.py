"""What torch cannot trace is told in one message, with the mend, and with nothing of torch's own above it."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from te_export.errors import CaptureError
from te_export.modules.trace import Traced

TraceModule = Callable[..., Traced]
SEQUENCES = {"x": torch.randn(4, 5, 3), "lengths": torch.tensor([5, 1, 3, 2])}


class Packing(nn.Module):
    """Two tasks over sequences of their own lengths, from the last state or from all places."""

    def __init__(self, *, unpacks: bool) -> None:
        super().__init__()
        self.layer, self.unpacks = nn.GRU(3, 4, batch_first=True), unpacks

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        states, last = self.layer(packed)
        if self.unpacks:
            states, _ = pad_packed_sequence(states, batch_first=True, total_length=5)
            return states.mean(dim=1), states.amax(dim=1)
        return last[0], last[0] * 2


class Padding(nn.Module):
    """What the message for Packing says to write instead."""

    def __init__(self, layer: nn.GRU) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        out, _ = self.layer(x)
        last = out.gather(1, (lengths - 1).view(-1, 1, 1).expand(-1, 1, out.shape[2])).squeeze(1)
        return last, last * 2


@pytest.mark.parametrize("unpacks", [False, True])
def test_packed_sequences_are_refused_with_what_to_write(unpacks: bool, trace_module: TraceModule) -> None:
    with pytest.raises(CaptureError, match=r"Packing: it packs sequences \(.*out\.gather\(1, "):
        trace_module(Packing(unpacks=unpacks).eval(), SEQUENCES)


def test_what_the_message_says_gives_the_same(trace_module: TraceModule) -> None:
    packing = Packing(unpacks=False).eval()
    padding = Padding(packing.layer).eval()

    trace_module(padding, SEQUENCES)
    with torch.no_grad():
        for found, expected in zip(padding(**SEQUENCES), packing(**SEQUENCES), strict=True):
            torch.testing.assert_close(found, expected)


class LoopOverExperts(nn.Module):
    """Each expert sees the rows that chose it, and none at all where none did."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(3, 3) for _ in range(2))
        self.gate = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        chosen, found = self.gate(x).argmax(dim=1), torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            (rows,) = torch.where(chosen == index)
            if rows.numel():
                found[rows] = expert(x[rows])
        return found, found * 2


def test_torchs_half_made_graph_stays_off_the_screen(
    trace_module: TraceModule, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(CaptureError, match=r"depends on the data \(.*if rows\.numel\(\)"):
        trace_module(LoopOverExperts().eval(), torch.randn(4, 3))

    assert capsys.readouterr() == ("", "")


class Talking(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        print("layer 1", file=sys.stderr)
        return x * 2, x * 3


def test_what_the_module_itself_prints_is_kept(
    trace_module: TraceModule, capsys: pytest.CaptureFixture[str]
) -> None:
    trace_module(Talking(), torch.randn(4, 3))

    assert capsys.readouterr().err.count("layer 1") == 2  # once for its form, once for its trace
