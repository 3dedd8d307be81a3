"""The trace against the module itself, untraced, as torch runs it: at every batch size, on the probe rows.

A trace that took a branch, a length or a constant from the rows it was made with answers other rows otherwise. Its own
float32 error and simulated rounding say by how much the two may differ.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import nn

from te_export.capture.joint_graph import prediction_name
from te_export.errors import CaptureError
from te_export.models.exportable import ExportableModel
from te_export.modules.all_tasks import AllTasks, evaluating
from te_export.modules.blame import line_of_error
from te_export.verify.batches import plan_batches
from te_export.verify.error_figures import absolute_errors
from te_export.verify.oracle import evaluate_float32
from te_export.verify.references import References
from te_export.verify.tolerance import Tolerance

__all__ = ["check_eager"]

_ADVICE = (
    "Its forward decides something by the rows it is given, or by how many there are: take that out, or choose with "
    "torch.where"
)
_NESTED_ADVICE = (
    "A TransformerEncoder with a padding mask leaves the places of padding out in eval mode, and the tasks read them: build "
    "it with enable_nested_tensor=False, as it is in training, or have the tasks read no padding"
)


def check_eager(model: ExportableModel, references: References) -> None:
    """Run the module itself in the batches of the references.

    Raises:
        CaptureError: it fails, or answers otherwise than its trace, with the batch size and by how much.
    """
    assert model.eager is not None  # a module was traced
    planned = plan_batches(len(references.rows))
    sizes = np.repeat([len(batch) for batch in planned], [len(batch) for batch in planned])
    answers = _answers(model.eager, references, planned)
    for name, found in zip(model.task_names, answers, strict=True):
        reference = references.tasks[name].prediction
        for group, start, stop in references.rows.groups:
            inside = (references.indices >= start) & (references.indices < stop)
            exact = reference.oracle[references.indices[inside]]
            torch_error = float(absolute_errors(reference.torch[inside], exact).max())
            noise = float(reference.noise[start:stop].max())
            bound = Tolerance().bound(reference.oracle[start:stop], torch_error=torch_error, noise=noise)
            apart = absolute_errors(found[inside], exact).reshape(int(inside.sum()), -1).max(axis=1)
            if not bool((apart <= bound).all()):
                worst = int(apart.argmax())
                raise CaptureError(
                    f"{type(model.eager.module).__name__} answers {group} rows otherwise than its trace: "
                    f"{prediction_name(name)} at batch size {sizes[inside][worst]} differs by {apart[worst]:.3g}, allowed "
                    f"{bound:.3g}. {_NESTED_ADVICE if _leaves_padding_out(model.eager) else _ADVICE}"
                )


def _answers(
    eager: AllTasks, references: References, planned: Sequence[NDArray[np.int64]]
) -> list[NDArray[np.float32]]:
    with evaluating(eager.module):
        try:
            return evaluate_float32(eager, references.rows.x, planned)
        except Exception as error:  # the module's own code may raise anything
            where = line_of_error(error)
            raise CaptureError(
                f"{type(eager.module).__name__} fails on rows that its trace answers, with {type(error).__name__}: "
                f"{error!s:.300}{f' ({where})' if where else ''}. Floats were drawn at random, integers and bools from the "
                "example's own columns: give example rows that show what each input may hold, and have forward take any "
                "of them together"
            ) from error


def _leaves_padding_out(eager: AllTasks) -> bool:
    return any(isinstance(part, nn.TransformerEncoder) and part.use_nested_tensor for part in eager.modules())
