"""All tasks of a module behind one forward, whatever form its own has."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from inspect import Parameter, Signature
from keyword import iskeyword

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from te_export.errors import UsageError
from te_export.modules.example_inputs import ExampleInputs
from te_export.modules.forward_form import ForwardForm

__all__ = ["PARAMETER_PREFIX", "AllTasks", "evaluating"]

PARAMETER_PREFIX = "module."


class AllTasks(nn.Module):
    """forward: one tensor per input → for each task its prediction (B, …), float32, of at least two axes.

    Its parameters have the names of the inputs: torch 2.9 cannot state what it assumes of a parameter like *inputs.
    """

    def __init__(self, module: nn.Module, example: ExampleInputs, form: ForwardForm) -> None:
        super().__init__()
        self.module = module
        self._example = example
        self._form = form
        object.__setattr__(self, "forward", _named(self.answer, example.names))

    def answer(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        copies = tuple(tensor.clone() for tensor in inputs)  # the module may write to what it is given
        return tuple(self._with_columns(answer.float()) for answer in self._answers(copies))

    def _answers(self, inputs: tuple[Tensor, ...]) -> Iterator[Tensor]:
        kind, keys = self._form.kind, self._form.keys
        if kind in ("task id", "task name"):
            for key in keys:
                yield self._prediction(self._call(inputs, key))
            return
        answer = self._call(inputs, None)
        for key in keys:
            if kind == "mapping":
                assert isinstance(answer, Mapping)  # it was when the form was found
                yield answer[key]
            elif kind == "sequence":
                assert isinstance(answer, tuple | list)
                assert isinstance(key, int)
                yield answer[key]
            elif kind == "columns":
                assert isinstance(key, int)
                yield self._prediction(answer)[:, key : key + 1]
            else:
                yield self._prediction(answer)

    def _call(self, inputs: tuple[Tensor, ...], task: object) -> object:
        positional, keywords = self._example.arguments(inputs)
        if task is None:
            return self.module(*positional, **keywords)
        if self._example.style == "keywords":
            keywords = {**keywords, **self._task_keyword(task)}
            return self.module(**keywords)
        return self.module(*positional, task)

    def _task_keyword(self, task: object) -> dict[str, object]:
        parameters = inspect.signature(self.module.forward).parameters
        return {next(name for name in parameters if name not in self._example.names): task}

    @staticmethod
    def _prediction(answer: object) -> Tensor:
        """The tensor, or the first of (tensor, aux)."""
        tensor = answer[0] if isinstance(answer, tuple | list) else answer
        assert isinstance(tensor, Tensor)  # it was when the form was found
        return tensor

    @staticmethod
    def _with_columns(answer: Tensor) -> Tensor:
        return answer.unsqueeze(1) if answer.ndim == 1 else answer


def _named(
    answer: Callable[..., tuple[Tensor, ...]], inputs: Sequence[str]
) -> Callable[..., tuple[Tensor, ...]]:
    """A function of as many parameters as there are inputs, by the names of those that are identifiers."""

    def forward(*tensors: Tensor) -> tuple[Tensor, ...]:
        return answer(*tensors)

    names = [
        name if name.isidentifier() and not iskeyword(name) else f"input_{index}"
        for index, name in enumerate(inputs)
    ]
    if len(set(names)) != len(names):
        names = [f"input_{index}" for index in range(len(names))]
    kind = Parameter.POSITIONAL_OR_KEYWORD
    forward.__dict__["__signature__"] = Signature([Parameter(name, kind) for name in names])
    return forward


@contextmanager
def evaluating(module: nn.Module) -> Iterator[list[str]]:
    """The module in eval mode, and as it was afterwards; gives notes on what that changed.

    Raises:
        UsageError: it is not on the CPU, not in float32, or has parameters without values.
    """
    _check_tensors(module)
    before = [(part, part.training) for part in module.modules()]
    notes = []
    if any(training for _, training in before) and not isinstance(module, torch.fx.GraphModule):
        notes.append("the module was in training mode; it was exported in eval mode")
    _to_eval(module)
    try:
        with torch.inference_mode(False):
            yield notes
    finally:
        for part, training in before:
            part.training = training


def _to_eval(module: nn.Module) -> None:
    """A program of torch.export is in the mode that it was traced in, and refuses to change it."""
    with suppress(NotImplementedError):
        module.eval()


def _check_tensors(module: nn.Module) -> None:
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if is_lazy(tensor):
            raise UsageError(
                f"{name} has no shape yet, since its layer was never called: load the trained weights, or call the module "
                "once"
            )
        if tensor.is_meta:
            raise UsageError(
                f"{name} is on the meta device, where tensors hold no numbers: build the module on the CPU, or load its "
                "weights with load_state_dict(state, assign=True) and set the buffers that are in no checkpoint"
            )
        if tensor.device.type != "cpu":
            raise UsageError(f"{name} is on {tensor.device}, expected the CPU: pass module.cpu()")
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise UsageError(f"{name} is {tensor.dtype}, expected float32: pass module.float()")
