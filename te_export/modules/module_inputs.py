"""What a traced module reads, and rows to look at it with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.fx import Node

from te_export.errors import CaptureError
from te_export.models.exportable import ModelInput
from te_export.models.input_rows import InputRows, join_rows
from te_export.modules.blame import line_of_error
from te_export.modules.check_behaviour import MIDDLE
from te_export.modules.example_inputs import ExampleInputs, input_dtype
from te_export.modules.trace import Traced
from te_export.modules.traced_module import TracedModule
from te_export.verify.probe_rows import draw_rows

__all__ = ["module_inputs", "sample_rows"]

_aten = torch.ops.aten
_SAMPLE = 12
_CASTS = frozenset({_aten._to_copy.default, _aten.unsqueeze.default, _aten.view.default, _aten.squeeze.dim,
                    _aten.reshape.default, _aten.select.int, _aten.slice.Tensor})  # fmt: skip


def module_inputs(example: ExampleInputs, traced: Traced) -> tuple[ModelInput, ...]:
    """The module's inputs, with the rows it is known to accept and what indexes an embedding.

    Raises:
        CaptureError: the program fails on rows of other values than the example's.
    """
    specs = tuple(
        ModelInput(
            name=name,
            dtype=input_dtype(array),
            shape=array.shape[1:],
            examples=array,
            below=_embedding_rows(node) if array.dtype.kind == "i" else None,
        )
        for (name, array), node in zip(example.rows.arrays.items(), traced.inputs(), strict=True)
    )
    cautious = tuple(replace(spec, below=None) for spec in specs)
    for known in (specs, cautious):  # what indexes an embedding may be read by something narrower, too
        try:
            _run(traced, draw_rows(known, np.random.default_rng(0), _SAMPLE))
        except (RuntimeError, IndexError, ValueError) as error:
            problem = error
        else:
            return known
    where = line_of_error(problem)
    raise CaptureError(
        f"the module fails on rows of other values than the example's, with {type(problem).__name__}: {problem!s:.300}"
        f"{f' ({where})' if where else ''}: floats were drawn at random, integers from the example's own columns. Give "
        "example rows that show what each input may hold, and have forward take any floats"
    ) from problem


def _embedding_rows(node: Node) -> int | None:
    """The fewest rows of the embeddings that read these indices, where nothing else is known of them."""
    rows: list[int] = []
    for user in node.users:
        if user.target is _aten.embedding.default and user.args[1] is node:
            weight = user.args[0]
            value = weight.meta["val"] if isinstance(weight, Node) else None
            if isinstance(value, Tensor):
                rows.append(int(value.shape[0]))
        elif user.target in _CASTS:
            inner = _embedding_rows(user)
            rows += [] if inner is None else [inner]
    return min(rows, default=None)


def sample_rows(specs: Sequence[ModelInput], examples: InputRows, traced: Traced) -> InputRows:
    """Two halves of different rows but for one in the middle; examples where the module has no finite answer to random
    rows.
    """
    rng = np.random.default_rng(0)
    drawn = draw_rows(specs, rng, _SAMPLE)
    known = examples[np.arange(_SAMPLE) % len(examples)]
    finite = [torch.isfinite(answer).all() for answer in _run(traced, drawn)]
    rows = drawn if all(finite) else known
    half = _SAMPLE // 2
    same = half + MIDDLE
    return join_rows([rows[:same], rows[[MIDDLE]], rows[same + 1 :]])


@torch.no_grad()
def _run(traced: Traced, rows: InputRows) -> tuple[Tensor, ...]:
    answers: tuple[Tensor, ...] = TracedModule(traced)(*rows.tensors())
    return answers
