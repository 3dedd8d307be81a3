"""What is exported: a checkpoint of a known family, a checkpoint with the code of its module, a .pt2 file, or a module."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from te_export.checkpoint import read_checkpoint
from te_export.checkpoint.contents import Checkpoint
from te_export.errors import UsageError
from te_export.models.exportable import ExportableModel
from te_export.models.loaded_module import LoadedModule
from te_export.models.shared_component_checkpoint import is_shared_component, load_shared_component
from te_export.models.task_branch_checkpoint import is_task_branch, load_task_branch
from te_export.models.task_expert_checkpoint import load_task_expert
from te_export.modules.example_inputs import Example
from te_export.modules.exportable_module import make_exportable
from te_export.modules.module_source import build_module, load_weights, read_pt2
from te_export.options import ExportOptions

__all__ = ["LoadedModel", "load_model"]


@dataclass(frozen=True)
class LoadedModel:
    """A model to export.

    Attributes:
        sha256: of the checkpoint; of the parameters and buffers, by name, where there is no file.
    """

    model: ExportableModel
    sha256: str


def load_model(source: Path | nn.Module, options: ExportOptions, example: Example | None) -> LoadedModel:
    """Load what is to be exported.

    Args:
        example: inputs that a module accepts; None where the checkpoint's family says what it reads.

    Raises:
        UsageError: what is given does not go together.
        CheckpointError: the file cannot be read, or holds nothing that can be exported.
        CaptureError: the module cannot be traced.
    """
    given = options.example_input if example is None else example
    if isinstance(source, nn.Module):
        _refuse_factory(options, "a module")
        module = _unwrapped(source)
        return LoadedModel(_exportable(module, given, options), _state_sha256(module))
    if options.model is not None:
        checkpoint = read_checkpoint(source, trust_pickle=options.trust_pickle)
        module = build_module(options.model).eval()
        load_weights(module, checkpoint, options.model)
        notes = checkpoint.notes
        model = _exportable(module, given, options, notes=notes, config={"model": options.model})
        return LoadedModel(model, checkpoint.sha256)
    if source.suffix == ".pt2":
        module, own_example, sha256 = read_pt2(source, trust_pickle=options.trust_pickle)
        return LoadedModel(_exportable(module, given if given is not None else own_example, options), sha256)
    if given is not None:
        raise UsageError(
            "example inputs are for a module's code: add --model package.module:factory, or leave --example-input out"
        )
    checkpoint = read_checkpoint(source, trust_pickle=options.trust_pickle)
    return LoadedModel(_of_family(checkpoint, options), checkpoint.sha256)


def _of_family(checkpoint: Checkpoint, options: ExportOptions) -> ExportableModel:
    """The model of a checkpoint, whose parameter names tell its family."""
    if is_shared_component(checkpoint.state):
        return _traced_family(load_shared_component(checkpoint, task_names=options.task_names), options)
    if is_task_branch(checkpoint.state):
        return _traced_family(load_task_branch(checkpoint, task_names=options.task_names), options)
    return load_task_expert(checkpoint, task_names=options.task_names, tasks=options.tasks)


def _traced_family(loaded: LoadedModule, options: ExportOptions) -> ExportableModel:
    model = make_exportable(
        loaded.module,
        loaded.example_inputs,
        task_names=loaded.task_names,
        tasks=options.tasks,
        family=loaded.family,
        config=loaded.config,
        notes=loaded.notes,
    )
    unused = (*loaded.unused_parameters, *model.unused_parameters)
    return _with_gates(replace(model, unused_parameters=unused), options)


def _exportable(
    module: nn.Module,
    example: Example | None,
    options: ExportOptions,
    *,
    notes: tuple[str, ...] = (),
    config: Mapping[str, str] | None = None,
) -> ExportableModel:
    if example is None:
        raise UsageError(
            "a module needs example inputs: what its forward takes, some rows of it. Pass --example-input F.npz (in Python "
            "example_inputs=x, or a dict from name to array)"
        )
    model = make_exportable(
        module, example, task_names=options.task_names, tasks=options.tasks, notes=notes, config=config
    )
    return _with_gates(model, options)


def _unwrapped(module: nn.Module) -> nn.Module:
    """The module inside torch.compile, DataParallel or DistributedDataParallel.

    Raises:
        UsageError: it is a script, whose code torch.export cannot follow.
    """
    if isinstance(module, torch.jit.ScriptModule):
        raise UsageError(
            "a ScriptModule cannot be exported: pass the torch.nn.Module that was scripted or traced"
        )
    wrapped = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    inner = module.module if isinstance(module, wrapped) else getattr(module, "_orig_mod", None)
    return _unwrapped(inner) if isinstance(inner, nn.Module) else module


def _with_gates(model: ExportableModel, options: ExportOptions) -> ExportableModel:
    """The model, if it has what the options need."""
    if options.prune_experts is not None and all(task.num_experts is None for task in model.tasks):
        raise UsageError(
            "--prune-experts: no gate of any task was found, so that nothing tells which experts a task uses: leave it out"
        )
    return model


def _refuse_factory(options: ExportOptions, what: str) -> None:
    if options.model is not None:
        raise UsageError(
            f"model={options.model!r} is for checkpoint files, and {what} was given: leave it out"
        )


def _state_sha256(module: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        array = tensor.detach().cpu()
        digest.update(f"{name} {array.dtype} {tuple(array.shape)}\n".encode())
        digest.update(array.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
