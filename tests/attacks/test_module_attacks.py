"""Modules that have no faithful graph: each is refused, the message names the line at fault and the usual mend, and
neither the target folder nor the module is touched."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import te_export
import te_runtime
from te_export.errors import TeExportError

FEATURES, HIDDEN = 6, 4
ROWS = 5
TASKS = ("click", "buy")
HERE = "# at fault"

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's, on what these modules do


class TwoHeads(nn.Module):
    """A shared bottom of two tasks, which each attack spoils in one place."""

    def __init__(self) -> None:
        super().__init__()
        self.bottom = nn.Linear(FEATURES, HIDDEN)
        self.click = nn.Linear(HIDDEN, 1)
        self.buy = nn.Linear(HIDDEN, 2)

    def heads(self, h: Tensor) -> dict[str, Tensor]:
        return {"click": self.click(h), "buy": self.buy(h)}


# Python that looks at values


class BranchesOnValues(TwoHeads):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.bottom(x)
        if h.sum() > 0:  # at fault
            h = h * 2
        return self.heads(h)


class BranchesWithinASubmodule(TwoHeads):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Clipping()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return self.heads(self.inner(self.bottom(x)))


class Clipping(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        while h.abs().max() > 1:  # at fault
            h = h / 2
        return h


class AssertsOnValues(TwoHeads):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        assert bool((x > -100).all())  # at fault
        return self.heads(self.bottom(x))


class TakesAnItem(TwoHeads):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        largest = x.abs().max().item()  # at fault
        return self.heads(self.bottom(x) / max(largest, 1.0))  # at fault


class GoesThroughNumpy(TwoHeads):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = torch.from_numpy(np.tanh(self.bottom(x).detach().numpy()))  # at fault
        return self.heads(h)


class KeepsPositiveValues(TwoHeads):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.bottom(x)
        positive = h[h > 0]  # at fault
        return self.heads(h + positive.sum())  # at fault


# Python that looks at the number of rows


class ViewsTheTracedRows(TwoHeads):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return self.heads(self.bottom(x.view(ROWS, -1)))  # at fault


class CountsRowsInPython(TwoHeads):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        rows = int(x.shape[0])  # at fault
        return self.heads(self.bottom(x) + torch.linspace(0.0, 1.0, HIDDEN).repeat(rows, 1))  # at fault


class WalksOverRows(TwoHeads):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = torch.stack([self.bottom(row) for row in x])  # at fault
        return self.heads(h)


class SlicesABuffer(TwoHeads):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("offsets", torch.randn(8, HIDDEN))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return self.heads(self.bottom(x) + self.offsets[: x.shape[0]])  # at fault


class HasAConstantPerRow(TwoHeads):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("offsets", torch.randn(ROWS, HIDDEN))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return self.heads(self.bottom(x) + self.offsets)  # at fault


class SqueezesASingleRow(TwoHeads):
    """(B, 1) becomes (B,), and one row becomes a number."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.bottom(x)
        return {"click": self.click(h).squeeze(), "buy": self.buy(h)}


class AnswersOtherwiseForOneRow(TwoHeads):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        found = self.heads(self.bottom(x))
        return found if x.shape[0] > 1 else {"click": found["click"]}


# Modules that change


class CountsItsCalls(TwoHeads):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        self.calls += 1
        return self.heads(self.bottom(x) * self.calls)


class KeepsRunningStatistics(TwoHeads):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(HIDDEN))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.bottom(x)
        self.mean.mul_(0.9).add_(h.mean(dim=0), alpha=0.1)  # at fault
        return self.heads(h - self.mean)  # at fault


class ReplacesABuffer(TwoHeads):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("last", torch.zeros(HIDDEN))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.bottom(x) + self.last
        self.last = h[0]  # at fault
        return self.heads(h)


# Rows that see each other


class CentersOverTheBatch(TwoHeads):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.bottom(x)
        return self.heads(h - h.mean(dim=0))  # at fault


class NormalizesByTheBatch(TwoHeads):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = F.batch_norm(self.bottom(x), None, None, training=True)  # at fault
        return self.heads(h)


class CompetesOverTheBatch(TwoHeads):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return self.heads(F.softmax(self.bottom(x), dim=0))  # at fault


class SortsTheBatch(TwoHeads):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return self.heads(self.bottom(x).sort(dim=0).values)  # at fault


class SumsUpTheBatch(TwoHeads):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return self.heads(self.bottom(x).cumsum(dim=0))  # at fault


class ComparesRowsWithEachOther(TwoHeads):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.bottom(x)
        attention = F.softmax(h @ h.T, dim=-1)  # at fault
        return self.heads(attention @ h)


# Chance


class DropsAtRandom(TwoHeads):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return self.heads(F.dropout(self.bottom(x), 0.5))  # at fault


class AddsNoise(TwoHeads):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.bottom(x)
        return self.heads(h + 0.1 * torch.rand_like(h))  # at fault


# Outputs that are no predictions


class GivesOneAnswerForAllRows(TwoHeads):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        found = self.heads(self.bottom(x))
        return {"click": found["click"].mean(), "buy": found["buy"]}


class GivesRowsLast(TwoHeads):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {name: answer.T for name, answer in self.heads(self.bottom(x)).items()}


class GivesNothingFinite(TwoHeads):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return self.heads(torch.log(-1 - self.bottom(x).abs()))


class GivesNestedAnswers(TwoHeads):
    def forward(self, x: Tensor) -> dict[str, dict[str, Tensor]]:
        return {name: {"logits": answer} for name, answer in self.heads(self.bottom(x)).items()}


class GivesClassNumbers(TwoHeads):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {
            name: answer.argmax(dim=1, keepdim=True) for name, answer in self.heads(self.bottom(x)).items()
        }


class GivesTexts(TwoHeads):
    def forward(self, x: Tensor) -> dict[str, object]:
        return {**self.heads(self.bottom(x)), "version": "1"}


class GivesNothing(TwoHeads):
    def forward(self, x: Tensor) -> None:
        self.heads(self.bottom(x))


class NeedsAnotherArgument(TwoHeads):
    def forward(self, x: Tensor, mask: Tensor) -> dict[str, Tensor]:
        return self.heads(self.bottom(x) * mask)


class Raises(TwoHeads):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return self.heads(self.bottom(x[:, :2]))  # at fault


@dataclass(frozen=True)
class Attack:
    """A module to refuse.

    Attributes:
        words: one of them is in the message: what is at fault, or the usual mend.
        changes_itself: its forward does, so that it need not be the same after the refusal.
    """

    make: Callable[[], nn.Module]
    words: tuple[str, ...]
    changes_itself: bool = False


ATTACKS = (
    Attack(BranchesOnValues, ("torch.where",)),
    Attack(BranchesWithinASubmodule, ("torch.where",)),
    Attack(AssertsOnValues, ("torch.where", "assert", "value")),
    Attack(TakesAnItem, (".item()", "torch.where")),
    Attack(GoesThroughNumpy, ("numpy",)),
    Attack(KeepsPositiveValues, ("torch.where", "row")),
    Attack(ViewsTheTracedRows, ("-1", "x.shape[0]", "x.size(0)")),
    Attack(CountsRowsInPython, ("x.shape[0]", "int(")),
    Attack(WalksOverRows, ("row", "batch")),
    Attack(SlicesABuffer, ("buffer", "batch")),
    Attack(HasAConstantPerRow, ("batch",)),
    Attack(SqueezesASingleRow, ("squeeze(-1)", "squeeze", "batch")),
    Attack(AnswersOtherwiseForOneRow, ("one row",)),
    Attack(CountsItsCalls, ("calls",), changes_itself=True),
    Attack(KeepsRunningStatistics, ("mean",), changes_itself=True),
    Attack(ReplacesABuffer, ("last",), changes_itself=True),
    Attack(CentersOverTheBatch, ("row",)),
    Attack(NormalizesByTheBatch, ("row", "training")),
    Attack(CompetesOverTheBatch, ("row",)),
    Attack(SortsTheBatch, ("row",)),
    Attack(SumsUpTheBatch, ("row",)),
    Attack(ComparesRowsWithEachOther, ("row",)),
    Attack(DropsAtRandom, ("random", "training", "chance")),
    Attack(AddsNoise, ("random", "chance")),
    Attack(GivesOneAnswerForAllRows, ("batch",)),
    Attack(GivesRowsLast, ("batch",)),
    Attack(GivesNothingFinite, ("finite", "NaN")),
    Attack(GivesNestedAnswers, ("nested", "dict")),
    Attack(GivesClassNumbers, ("int64",)),
    Attack(GivesTexts, ("version",)),
    Attack(GivesNothing, ("None",)),
    Attack(NeedsAnotherArgument, ("mask",)),
    Attack(Raises, ("mat1", "shape")),
)


def example() -> Tensor:
    return torch.randn(ROWS, FEATURES, generator=torch.Generator().manual_seed(0))


def lines_at_fault(module: nn.Module) -> list[str]:
    """`file:line` of the lines that are marked in the sources of a module of this file; one of them is to be named."""
    found = []
    for source in {type(part) for part in module.modules() if type(part).__module__ == __name__}:
        lines, first = inspect.getsourcelines(source)
        found += [
            f"{Path(__file__).name}:{first + offset}"
            for offset, line in enumerate(lines)
            if line.rstrip().endswith(HERE)
        ]
    return found


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.make.__name__)
def test_a_module_without_a_faithful_graph_is_refused(attack: Attack, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = attack.make().eval()
    before = copy.deepcopy(module.state_dict())
    target = tmp_path / "out" / "bundle"
    target.parent.mkdir()

    with pytest.raises(TeExportError) as refusal:
        te_export.export(module, target, example_inputs=example(), task_names=TASKS)

    message = str(refusal.value)
    assert list(target.parent.iterdir()) == []
    assert any(word in message for word in attack.words), message
    at_fault = lines_at_fault(module)
    assert not at_fault or any(line in message for line in at_fault), f"{at_fault}: {message}"
    if not attack.changes_itself:
        assert all(torch.equal(module.state_dict()[name], tensor) for name, tensor in before.items())
    assert not module.training


class Normalizes(TwoHeads):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(HIDDEN)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return self.heads(self.norm(self.bottom(x)))


class DropsInTraining(TwoHeads):
    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return self.heads(self.dropout(self.bottom(x)))


@pytest.mark.parametrize("make", [Normalizes, DropsInTraining])
@pytest.mark.parametrize("only_a_part", [False, True])
def test_a_module_left_in_training_mode_is_exported_in_eval_mode_and_told(
    make: Callable[[], TwoHeads], only_a_part: bool, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    module = make().eval()
    expected = answers(module, example())
    part = (
        next(part for part in module.children() if not isinstance(part, nn.Linear)) if only_a_part else module
    )
    part.train()
    before = copy.deepcopy(module.state_dict())

    result = te_export.export(module, tmp_path / "bundle", example_inputs=example(), task_names=TASKS)

    assert any("training mode" in note for note in result.notes)
    require_answers(result.bundle, expected)
    assert part.training
    assert module.training != only_a_part
    assert all(torch.equal(module.state_dict()[name], tensor) for name, tensor in before.items())


def test_names_of_a_dicts_own_tasks_choose_by_name_and_not_by_place(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Normalizes().eval()

    result = te_export.export(
        module, tmp_path / "bundle", example_inputs=example(), task_names=("buy", "click")
    )

    require_answers(result.bundle, answers(module, example()))


def answers(module: nn.Module, rows: Tensor) -> dict[str, Tensor]:
    with torch.no_grad():
        found: dict[str, Tensor] = module(rows)
    return found


def require_answers(bundle: Path, expected: dict[str, Tensor]) -> None:
    """The bundle answers the example by each task's name, to within float32's rounding of small layers."""
    with te_runtime.load(bundle) as model:
        found = model.predict(example().numpy())
    assert set(found) == set(expected)
    for task, prediction in found.items():
        np.testing.assert_allclose(prediction.output, expected[task].numpy(), rtol=0, atol=1e-6)


class ChangesItsInput(TwoHeads):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return self.heads(self.bottom(x.mul_(0.5)))


def test_an_input_changed_in_place_is_the_modules_own_copy(tmp_path: Path) -> None:
    """Many modules begin with an in-place activation: their function of the rows is plain all the same."""
    torch.manual_seed(0)
    module, rows = ChangesItsInput().eval(), example()

    te_export.export(module, tmp_path / "bundle", example_inputs=rows, task_names=TASKS)

    assert torch.equal(rows, example())
    require_answers(tmp_path / "bundle", answers(module, example()))


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("click", "buy", "rating"), ("rating", "3")),
        (("click",), ("buy", "1")),
        (("click", "rating"), ("rating",)),
        (("click", "click"), ("click",)),
        (("click", "b/uy"), ("b/uy",)),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else None,
)
def test_task_names_that_do_not_fit_the_outputs(
    names: tuple[str, ...], words: tuple[str, ...], tmp_path: Path
) -> None:
    module = Normalizes().eval()

    with pytest.raises(TeExportError) as refusal:
        te_export.export(module, tmp_path / "bundle", example_inputs=example(), task_names=names)

    assert any(word in str(refusal.value) for word in words), str(refusal.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("make_inputs", "words"),
    [
        (lambda: example()[:, :3], ("mat1", "shape", "3")),
        (lambda: example()[:0], ("row",)),
        (lambda: torch.tensor(1.0), ("batch", "shape")),
        (lambda: {"x": example(), "y": example()}, ("y",)),
        (lambda: (example(), example()), ("argument",)),
        (lambda: example() * float("nan"), ("finite", "NaN")),
        (lambda: np.array(["a", "b"]), ("dtype", "<U1", "text")),
        (lambda: [1.0, 2.0], ("float", "list")),
    ],
    ids=["too narrow", "no rows", "a number", "one too many", "two", "NaN", "texts", "a list"],
)
def test_example_inputs_that_the_module_cannot_take(
    make_inputs: Callable[[], Tensor], words: tuple[str, ...], tmp_path: Path
) -> None:
    module = Normalizes().eval()

    with pytest.raises(TeExportError) as refusal:
        te_export.export(module, tmp_path / "bundle", example_inputs=make_inputs(), task_names=TASKS)

    assert any(word in str(refusal.value) for word in words), str(refusal.value)
    assert list(tmp_path.iterdir()) == []
