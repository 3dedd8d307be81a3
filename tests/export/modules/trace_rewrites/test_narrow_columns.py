"""A slice of columns reads what makes those columns and no more, its numbers stay, and weights are not copied."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

import te_export
import te_runtime
from te_export.models.input_rows import InputRows
from te_export.modules.trace import Traced, ancestors
from te_export.modules.trace_rewrites.narrow_columns import narrow_columns
from te_export.modules.traced_module import TracedModule, record_values

FEATURES, WIDTH, ROWS = 4, 6, 5
TraceModule = Callable[..., Traced]


class Layers(nn.Module):
    """What the cases below are made of; each has its own."""

    def __init__(self, forward: Callable[[Layers, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(FEATURES, 2), nn.Linear(FEATURES, 3)
        self.wide = nn.Linear(FEATURES, WIDTH)
        self.plain = nn.Linear(FEATURES, WIDTH, bias=False)
        self.norm = nn.LayerNorm(WIDTH)
        self.shift = nn.Parameter(torch.randn(WIDTH))
        self.row = nn.Parameter(torch.randn(1, WIDTH))
        self.maps = nn.Conv1d(1, 2, 1)
        self.heads = nn.Parameter(torch.randn(3, FEATURES, 2))
        self.form = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.form(self, x)

    def joined(self, x: Tensor) -> Tensor:
        """(B, 2 + 3 + 2 + …): a is columns 0 and 1, b is 2, 3 and 4."""
        return torch.cat([self.a(x), self.b(x)], dim=1)


class Several(nn.Module):
    """Cases side by side, a task each: one trace for all."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.parts = nn.ModuleDict(
            {name.replace(" ", "_"): Layers(case.form) for name, case in CASES.items()}
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        return [part(x) for part in self.parts.values()]


@dataclass(frozen=True)
class Case:
    """A slice, and the names of the parameters that it still has to read."""

    form: Callable[[Layers, Tensor], Tensor]
    reads: tuple[str, ...]


A, B, WIDE = ("a.weight", "a.bias"), ("b.weight", "b.bias"), ("wide.weight", "wide.bias")
NARROWED = {
    "all columns but some": Case(lambda m, x: torch.cat([m.joined(x)[:, :0], m.joined(x)[:, 2:]], 1), B),
    "a product of each row": Case(
        lambda m, x: torch.matmul(m.wide(x).view(-1, 3, 2), x.view(-1, 2, 2))[:, 1],
        ("wide.weight rows 2 4", "wide.bias rows 2 4"),
    ),
    "einsum of a broadcast axis": Case(
        lambda m, x: torch.einsum("bti,tio->bto", x.unsqueeze(1), m.heads)[:, 2], ("heads rows 2 3",)
    ),
    "softmax along another axis": Case(
        lambda m, x: F.softmax(m.wide(x).view(-1, 3, 2), -1)[:, 1],
        ("wide.weight rows 2 4", "wide.bias rows 2 4"),
    ),
    "rows of a shared layer": Case(
        lambda m, x: m.a(torch.stack([m.heads[0] @ x.new_ones(2) * m.wide(x)[:, :4], x], 1))[:, 1], A
    ),
    "softmax without a sign": Case(
        lambda m, x: F.softmax(m.wide(x).reshape(x.shape[0], 2, 3), dim=2)[:, 1:],
        ("wide.weight rows 3 6", "wide.bias rows 3 6"),
    ),
    "cat": Case(lambda m, x: m.joined(x)[:, :2], A),
    "one column of a cat": Case(lambda m, x: m.joined(x)[:, 1:2], ("a.weight rows 1 2", "a.bias rows 1 2")),
    "columns of two parts": Case(
        lambda m, x: m.joined(x)[:, 1:3],
        ("a.weight rows 1 2", "a.bias rows 1 2", "b.weight rows 0 1", "b.bias rows 0 1"),
    ),
    "cat by a negative axis": Case(lambda m, x: torch.cat([m.a(x), m.b(x)], -1)[:, 2:], B),
    "cat without an axis named": Case(
        lambda m, x: torch.cat([m.a(x).t(), m.b(x).t()]).t()[:, 2:], (*A, *B)
    ),
    "from the end": Case(lambda m, x: m.joined(x)[:, -3:], B),
    "one from the end": Case(
        lambda m, x: m.joined(x)[:, -1:], ("b.weight rows 2 3", "b.bias rows 2 3")
    ),
    "up to the end but some": Case(lambda m, x: m.joined(x)[:, :-3], A),
    "past the end": Case(lambda m, x: m.joined(x)[:, 2:99], B),
    "cat over other columns": Case(
        lambda m, x: torch.cat([m.joined(x).unsqueeze(2), m.joined(x).unsqueeze(2)], 2)[:, :2], A
    ),
    "stack": Case(lambda m, x: torch.stack([m.a(x).sum(1), m.b(x).sum(1)], 1)[:, 1:], B),
    "linear": Case(lambda m, x: m.wide(x)[:, 2:4], ("wide.weight rows 2 4", "wide.bias rows 2 4")),
    "linear without a bias": Case(lambda m, x: m.plain(x)[:, 4:], ("plain.weight rows 4 6",)),
    "sigmoid": Case(lambda m, x: torch.sigmoid(m.joined(x))[:, :2], A),
    "softplus": Case(lambda m, x: F.softplus(m.joined(x), beta=2.0)[:, :2], A),
    "gelu with a word": Case(lambda m, x: F.gelu(m.joined(x), approximate="tanh")[:, :2], A),
    "clamp": Case(lambda m, x: m.joined(x).clamp(min=-0.1, max=0.1)[:, :2], A),
    "leaky relu": Case(lambda m, x: F.leaky_relu(m.joined(x), 0.3)[:, :2], A),
    "square": Case(lambda m, x: (m.joined(x) ** 2)[:, :2], A),
    "a number added": Case(lambda m, x: (m.joined(x) + 1.5)[:, :2], A),
    "one minus": Case(lambda m, x: (1.0 - m.joined(x))[:, :2], A),
    "a parameter added": Case(
        lambda m, x: (m.wide(x) + m.shift)[:, 1:2],
        ("wide.weight rows 1 2", "wide.bias rows 1 2", "shift rows 1 2"),
    ),
    "a parameter on the left": Case(
        lambda m, x: (m.shift / m.wide(x).exp())[:, :1],
        ("wide.weight rows 0 1", "wide.bias rows 0 1", "shift rows 0 1"),
    ),
    "a row added": Case(
        lambda m, x: (m.wide(x) - m.row)[:, :1], ("wide.weight rows 0 1", "wide.bias rows 0 1", "row")
    ),
    "a column for all": Case(
        lambda m, x: (m.joined(x) * m.wide(x)[:, :1])[:, :2],
        (*A, "wide.weight rows 0 1", "wide.bias rows 0 1"),
    ),
    "two cats": Case(lambda m, x: (m.joined(x) * torch.sigmoid(m.joined(x)))[:, :2], A),
    "unsqueeze after": Case(lambda m, x: m.joined(x).unsqueeze(2)[:, :2], A),
    "unsqueeze before": Case(lambda m, x: m.joined(x).unsqueeze(1)[:, :, :2], A),
    "squeeze after": Case(lambda m, x: m.joined(x).unsqueeze(2).squeeze(2)[:, :2], A),
    "squeeze before": Case(lambda m, x: m.joined(x).unsqueeze(1).squeeze(1)[:, :2], A),
    "squeeze of nothing": Case(
        lambda m, x: m.joined(x).squeeze(1)[:, :1], ("a.weight rows 0 1", "a.bias rows 0 1")
    ),
    "a slice of a slice": Case(lambda m, x: m.joined(x)[:, 1:][:, :1], ("a.weight rows 1 2", "a.bias rows 1 2")),
    "einsum": Case(lambda m, x: torch.einsum("bd,tdo->bto", x, m.heads)[:, 1:2], ("heads rows 1 2",)),
    "einsum, tasks last": Case(
        lambda m, x: torch.einsum("tdo, bd -> bot", m.heads, x)[:, :, 1:], ("heads rows 1 3",)
    ),
    "bmm": Case(
        lambda m, x: torch.bmm(x.unsqueeze(0).expand(3, -1, -1), m.heads)[2:].permute(1, 0, 2), ("heads rows 2 3",)
    ),
    "bmm, turned": Case(
        lambda m, x: torch.bmm(x.unsqueeze(0).expand(3, -1, -1), m.heads).permute(1, 0, 2)[:, 2:], ("heads rows 2 3",)
    ),
    "bmm, transposed": Case(
        lambda m, x: torch.bmm(x.unsqueeze(0).expand(3, -1, -1), m.heads).transpose(0, 1)[:, :1], ("heads rows 0 1",)
    ),
    "multiplied and summed": Case(
        lambda m, x: (x[:, None, :, None] * m.heads).sum(2)[:, 1:2], ("heads rows 1 2",)
    ),
    "multiplied and averaged": Case(
        lambda m, x: (x[:, None, :, None] * m.heads).mean(-2, keepdim=True)[:, 1:2], ("heads rows 1 2",)
    ),
    "nested": Case(
        lambda m, x: torch.sigmoid(torch.cat([m.joined(x).relu() * 2, m.wide(x) + m.shift], 1))[:, 5:6],
        ("wide.weight rows 0 1", "wide.bias rows 0 1", "shift rows 0 1"),
    ),
}  # fmt: skip
KEPT = {
    "matrices of several batches": Case(lambda m, x: torch.matmul(x.unsqueeze(0), m.heads)[1:2].sum(0), ("heads",)),
    "a layer of one feature": Case(
        lambda m, x: F.linear(m.wide(x).view(-1, 3, 2), m.shift[:2])[:, 1:2], (*WIDE, "shift")
    ),
    "a bias for all": Case(lambda m, x: F.linear(x, m.wide.weight, m.shift[:1])[:, 1:2], ("wide.weight", "shift")),
    "softmax along the axis": Case(lambda m, x: F.softmax(m.wide(x), 1)[:, :2], WIDE),
    "softmax over the first part of a view": Case(lambda m, x: F.softmax(m.wide(x).view(-1, 3, 2), 1)[:, 1], WIDE),
    "the last part of a view": Case(lambda m, x: m.wide(x).view(-1, 3, 2)[:, :, 1], WIDE),
    "a view that joins": Case(lambda m, x: m.wide(x).view(-1, 3, 2).flatten(1)[:, 1:3], WIDE),
    "layer norm": Case(lambda m, x: m.norm(m.wide(x))[:, :1], (*WIDE, "norm.weight", "norm.bias")),
    "softmax over the columns": Case(lambda m, x: F.softmax(m.joined(x), 1)[:, :1], (*A, *B)),
    "cumulated": Case(lambda m, x: m.joined(x).cumsum(1)[:, :2], (*A, *B)),
    "summed over the columns": Case(
        lambda m, x: torch.einsum("bd,tdo->bto", x, m.heads).sum(1, keepdim=True)[:, :1], ("heads",)
    ),
    "einsum of a diagonal": Case(
        lambda m, x: torch.einsum("bdd,to->bto", x[:, :, None] * x[:, None, :], m.heads.sum(1))[:, 1:2],
        ("heads",),
    ),
    "every other column": Case(lambda m, x: m.joined(x)[:, ::2], (*A, *B)),
    "columns of every other": Case(lambda m, x: m.joined(x)[:, ::2][:, 1:2], (*A, *B)),
    "every column": Case(lambda m, x: m.joined(x)[:, :], (*A, *B)),
    "turned around": Case(lambda m, x: m.joined(x).flip(1)[:, :3], (*A, *B)),
    "an added axis": Case(lambda m, x: m.joined(x).unsqueeze(1)[:, :1], (*A, *B)),
    "of a convolution": Case(
        lambda m, x: m.maps(x.unsqueeze(1))[:, 1:], ("maps.weight", "maps.bias")
    ),
    "a weight made on the way": Case(
        lambda m, x: F.linear(x, m.wide.weight * 2, m.wide.bias)[:, :1], WIDE
    ),
    "of the input": Case(lambda m, x: x[:, 1:2], ()),
}  # fmt: skip
CASES = {**NARROWED, **KEPT}


@dataclass(frozen=True)
class Narrowing:
    """The cases before and after.

    Attributes:
        before, after: by case, the answers of the same rows in float64.
        reads: by case, the names of the parameters that it reads afterwards.
    """

    traced: Traced
    module: Several
    sources: dict[str, str]
    before: dict[str, NDArray[np.float64]]
    after: dict[str, NDArray[np.float64]]
    reads: dict[str, set[str]]


def answers(traced: Traced, rows: InputRows) -> dict[str, NDArray[np.float64]]:
    values = record_values(traced, rows)
    return {name: values[node].numpy() for name, node in zip(CASES, traced.outputs(), strict=True)}


@pytest.fixture(scope="module")
def narrowing(trace_module: TraceModule) -> Narrowing:
    module = Several()
    x = np.random.default_rng(0).standard_normal((ROWS, FEATURES)).astype(np.float32)
    rows = InputRows({"x": x})
    traced = trace_module(module, x)
    before = answers(traced, rows)
    narrowed = narrow_columns(traced)
    names = traced.parameter_names()
    reads = {
        case: {names[above] for above in ancestors(node) | {node} if above in names}
        for case, node in zip(CASES, traced.outputs(), strict=True)
    }
    return Narrowing(traced, module, narrowed.sources, before, answers(traced, rows), reads)


@pytest.mark.parametrize("case", CASES)
def test_the_numbers_are_the_same(case: str, narrowing: Narrowing) -> None:
    assert narrowing.after[case].shape == narrowing.before[case].shape
    np.testing.assert_allclose(narrowing.after[case], narrowing.before[case], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("case", CASES)
def test_a_column_reads_what_makes_it_and_no_more(case: str, narrowing: Narrowing) -> None:
    prefix = f"module.parts.{case.replace(' ', '_')}."
    expected = {prefix + name.replace(" ", "_") for name in CASES[case].reads}

    assert narrowing.reads[case] == expected


def test_rows_of_a_weight_share_its_memory(narrowing: Narrowing) -> None:
    assert narrowing.sources
    for part, whole in narrowing.sources.items():
        one, other = narrowing.traced.tensor(part), narrowing.traced.tensor(whole)
        assert one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def test_every_new_name_has_the_weight_it_is_cut_from(narrowing: Narrowing) -> None:
    own = {f"module.{name}" for name, _ in narrowing.module.named_parameters()}
    made = {name for name in narrowing.traced.parameter_names().values() if name not in own}

    assert set(narrowing.sources) == made
    assert set(narrowing.sources.values()) <= own


def test_the_program_runs_in_float32_too(narrowing: Narrowing) -> None:
    x = torch.randn(3, FEATURES, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found, expected = TracedModule(narrowing.traced)(x), narrowing.module(x)

    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)  # torch's own tolerances for float32


def test_a_program_without_slices_stays_as_it_is(trace_module: TraceModule) -> None:
    traced = trace_module(nn.Linear(FEATURES, 1), np.zeros((ROWS, FEATURES), np.float32))
    before = str(traced.graph)

    narrowed = narrow_columns(traced)

    assert (narrowed.slices, narrowed.sources, str(traced.graph)) == (0, {}, before)


class OneHead(nn.Module):
    """A head for all tasks, and columns that a task takes before it does something with them."""

    FORMS: ClassVar[dict[str, Callable[[Tensor], dict[str, Tensor]]]] = {
        "select": lambda y: {"a": y[:, 0], "b": torch.sigmoid(y[:, 1]), "c": y[:, 2:]},
        "slice": lambda y: {"a": y[:, :1].tanh(), "b": y[:, 1:2], "c": y[:, -2:] * 2},
        "chunk": lambda y: dict(zip("ab", (part.tanh() for part in y.chunk(2, 1)), strict=True)),
        "split": lambda y: dict(zip("ab", (part.exp() for part in y.split([1, 3], 1)), strict=True)),
        "unbind": lambda y: dict(zip("abcd", (part * 3 for part in y.unbind(1)), strict=True)),
    }

    def __init__(self, form: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.bottom, self.head = nn.Linear(FEATURES, 5), nn.Linear(5, 4)
        self.form = self.FORMS[form]

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return self.form(self.head(torch.relu(self.bottom(x))))


@pytest.mark.parametrize("form", OneHead.FORMS)
def test_columns_that_a_task_takes_on_the_way_are_narrowed(form: str, trace_module: TraceModule) -> None:
    x = np.random.default_rng(0).standard_normal((ROWS, FEATURES)).astype(np.float32)
    traced = trace_module(OneHead(form), x)
    rows = InputRows({"x": x})
    before = [record_values(traced, rows)[node] for node in traced.outputs()]

    narrow_columns(traced)

    names = traced.parameter_names()
    after = record_values(traced, rows)
    for node, expected in zip(traced.outputs(), before, strict=True):
        torch.testing.assert_close(after[node], expected, rtol=1e-12, atol=1e-15)
        read = {names[above] for above in ancestors(node) if above in names}
        columns = expected.shape[1]
        assert "module.head.weight" not in read
        assert sum(traced.tensor(name).numel() for name in read if "head" in name) == columns * (5 + 1)


class WideExperts(nn.Module):
    """Both tasks need all columns of the layer that makes the experts."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Linear(FEATURES, 6)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        one, other = self.experts(x).chunk(2, 1)
        return {"a": one + other, "b": one - other}


def test_a_layer_whose_columns_every_task_needs_stays_whole(trace_module: TraceModule) -> None:
    traced = trace_module(WideExperts(), np.zeros((ROWS, FEATURES), np.float32))

    assert narrow_columns(traced).slices == 0


class Towers(nn.Module):
    """What a tower reads serves one task only once the output that joins them is pulled apart."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.bottom = nn.Linear(FEATURES, 4)
        self.towers = nn.ModuleList(nn.Linear(2, 2) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        parts = torch.relu(self.bottom(x)).view(-1, 2, 2)
        return torch.cat([tower(parts[:, task]) for task, tower in enumerate(self.towers)], 1)


def test_a_task_may_read_all_columns_but_its_own(tmp_path: Path) -> None:
    """The first piece of the first task is empty."""

    class LeaveOneOut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.parts = nn.ModuleList(nn.Linear(FEATURES, 2) for _ in range(3))
            self.heads = nn.ModuleList(nn.Linear(4, 1) for _ in range(3))

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            y = torch.cat([part(x) for part in self.parts], 1)
            left = [torch.cat([y[:, : 2 * k], y[:, 2 * k + 2 :]], 1) for k in range(3)]
            return tuple(head(part) for head, part in zip(self.heads, left, strict=True))

    module, x = LeaveOneOut(), torch.randn(ROWS, FEATURES)

    result = te_export.export(module, tmp_path / "bundle", example_inputs=x)

    with te_runtime.load(result.bundle, threads=1) as model, torch.no_grad():
        for answer, wanted in zip(model.predict(x.numpy()).values(), module(x), strict=True):
            np.testing.assert_allclose(answer.output, wanted, rtol=0, atol=1e-6)


def test_what_a_joined_output_hid_is_narrowed_after_it(trace_module: TraceModule) -> None:
    x = np.random.default_rng(0).standard_normal((ROWS, FEATURES)).astype(np.float32)
    traced = trace_module(Towers(), x)
    rows = InputRows({"x": x})
    before = [record_values(traced, rows)[node] for node in traced.outputs()]

    narrow_columns(traced)

    names, after = traced.parameter_names(), record_values(traced, rows)
    for task, (node, expected) in enumerate(zip(traced.outputs(), before, strict=True)):
        torch.testing.assert_close(after[node], expected, rtol=1e-12, atol=1e-15)
        read = {names[above] for above in ancestors(node) if above in names}
        first = 2 * (task // 2)
        assert f"module.bottom.weight_rows_{first}_{first + 2}" in read
        assert "module.bottom.weight" not in read


class HiddenHead(nn.Module):
    """A plain list hides the head from parameters()."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.bottom = nn.Linear(FEATURES, 3)
        self.heads = [nn.Linear(3, 2)]

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.heads[0](torch.relu(self.bottom(x)))
        return found


def test_rows_of_what_is_no_parameter_are_none(trace_module: TraceModule) -> None:
    traced = trace_module(HiddenHead(), np.ones((ROWS, FEATURES), np.float32))

    narrowed = narrow_columns(traced)

    assert narrowed.slices == 2
    assert all(traced.is_constant(name) for name in (*narrowed.sources, *narrowed.sources.values()))


def test_columns_of_a_hidden_head_are_exported(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).standard_normal((ROWS, FEATURES)).astype(np.float32)

    result = te_export.export(HiddenHead().eval(), tmp_path / "bundle", example_inputs=rows)

    assert any("2 tensors (8 numbers) are neither parameters nor buffers" in note for note in result.notes)
