"""The trace against the module untraced: a module that decides by its rows, or by their number, is refused."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from te_export.errors import CaptureError
from te_export.models.exportable import ExportableModel
from te_export.modules.exportable_module import make_exportable
from te_export.verify.eager import check_eager
from te_export.verify.probe_rows import make_probe_rows
from te_export.verify.references import References, evaluate_references

FEATURES = 4


class Switched(nn.Module):
    """Two tasks, of which `change` makes another answer once the trace is done."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.bottom = nn.Linear(FEATURES, 5)
        self.heads = nn.ModuleList(nn.Linear(5, 2) for _ in range(2))
        self.dropout = nn.Dropout(0.5)
        self.change: Callable[[Tensor, Tensor], Tensor] | None = None

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.dropout(torch.relu(self.bottom(x)))
        second: Tensor = self.heads[1](h)
        if self.change is not None:
            second = self.change(x, second)
        return {"click": self.heads[0](h), "buy": second}


@pytest.fixture(scope="module")
def traced() -> tuple[Switched, ExportableModel, References]:
    rows = np.random.default_rng(0).standard_normal((6, FEATURES)).astype(np.float32)
    module = Switched().eval()
    model = make_exportable(module, rows)
    return module, model, evaluate_references(model, make_probe_rows(model))


@pytest.fixture
def changed(
    traced: tuple[Switched, ExportableModel, References], monkeypatch: pytest.MonkeyPatch
) -> Callable[[Callable[[Tensor, Tensor], Tensor] | None], None]:
    """`changed(change)`: check the module while its second task answers otherwise."""
    module, model, references = traced

    def check(change: Callable[[Tensor, Tensor], Tensor] | None) -> None:
        monkeypatch.setattr(module, "change", change)
        check_eager(model, references)

    return check


Changed = Callable[[Callable[[Tensor, Tensor], Tensor] | None], None]


def test_a_module_that_answers_as_its_trace_passes(changed: Changed) -> None:
    changed(None)


@pytest.mark.parametrize("size", [1, 2, 7, 64])
def test_another_answer_at_one_batch_size_is_refused_and_the_size_told(size: int, changed: Changed) -> None:
    with pytest.raises(
        CaptureError,
        match=rf"Switched answers \w+ rows otherwise .*: buy.prediction at batch size {size} differs",
    ):
        changed(lambda x, found: found * 1.01 if len(x) == size else found)


def test_another_answer_to_large_rows_is_refused(changed: Changed) -> None:
    with pytest.raises(CaptureError, match=r"answers large rows otherwise than its trace: buy\.prediction"):
        changed(lambda x, found: torch.where(x.abs().amax(1, keepdim=True) > 8, found * 1.01, found))


def test_another_answer_to_one_row_is_refused(changed: Changed) -> None:
    def first_of_many(x: Tensor, found: Tensor) -> Tensor:
        return torch.cat([found[:1] + 1e-3, found[1:]]) if len(x) == 7 else found

    with pytest.raises(CaptureError, match=r"buy.prediction at batch size 7 .*torch\.where"):
        changed(first_of_many)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_answer_that_is_no_number_is_refused(value: float, changed: Changed) -> None:
    with pytest.raises(CaptureError, match="differs by inf"):
        changed(lambda x, found: found.masked_fill(found == found.max(), value) if len(x) == 2 else found)


def test_float32s_own_rounding_is_no_difference(changed: Changed) -> None:
    """Twice the same sum in another order."""
    changed(lambda x, found: (found * 3.0) / 3.0)


def test_a_module_in_training_mode_is_asked_in_eval_mode_and_stays(
    traced: tuple[Switched, ExportableModel, References],
) -> None:
    module, model, references = traced
    module.train()
    try:
        check_eager(model, references)
        assert module.training
    finally:
        module.eval()


def test_a_module_that_fails_where_its_trace_does_not_is_refused_with_the_line(changed: Changed) -> None:
    def fail(x: Tensor, found: Tensor) -> Tensor:
        if len(x) == 1:
            raise ValueError("no single rows")
        return found

    with pytest.raises(
        CaptureError,
        match=r"Switched fails on rows that its trace answers, with ValueError: no single .*test_eager",
    ):
        changed(fail)


class Encoder(nn.Module):
    """A sequence with a padding mask through torch's encoder, then the mean over all places or what is first."""

    def __init__(self, *, reads_padding: bool, **options: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(FEATURES, 2, 8, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, **options)
        self.head, self.reads_padding = nn.Linear(FEATURES, 2), reads_padding

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        states = self.encoder(x, src_key_padding_mask=padding)
        found: Tensor = self.head(states.mean(dim=1) if self.reads_padding else states[:, 0])
        return found


def check_encoder(encoder: Encoder) -> None:
    padding = np.arange(6) >= np.array([[1], [4], [6], [2]])
    x = np.random.default_rng(0).standard_normal((4, 6, FEATURES)).astype(np.float32)
    model = make_exportable(encoder.eval(), {"x": x, "padding": padding}, task_names=("only",))
    check_eager(model, evaluate_references(model, make_probe_rows(model)))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_an_encoder_that_leaves_padding_out_is_refused_where_padding_is_read() -> None:
    with pytest.raises(CaptureError, match=r"build it with enable_nested_tensor=False"):
        check_encoder(Encoder(reads_padding=True))


@pytest.mark.parametrize("options", [{}, {"enable_nested_tensor": False}], ids=["nested", "plain"])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_no_row_is_nothing_but_padding_where_the_example_has_none(options: dict[str, bool]) -> None:
    check_encoder(Encoder(reads_padding="enable_nested_tensor" in options, **options))
