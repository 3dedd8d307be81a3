"""What changed of the model, its inputs, what wrote the bundle, the use of the experts, and the files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from te_export.compare_bundles.result import Fact, FactValue, FileChange, RoutingChange, TaskPair
from te_runtime.manifest import Manifest

__all__ = ["compare_files", "compare_inputs", "compare_model", "compare_routing"]


def compare_model(before: Manifest, after: Manifest) -> tuple[Fact, ...]:
    """Checkpoint, family, config, parameters, and the versions of what wrote the bundle."""
    return tuple(_facts(_model_values(before), _model_values(after)))


def compare_inputs(before: Manifest, after: Manifest) -> tuple[Fact, ...]:
    """Inputs by name: shape and dtype; None where a model does not have it. Their order where that differs."""
    found = list(_facts(_input_values(before), _input_values(after)))
    names = [tuple(spec.name for spec in manifest.inputs) for manifest in (before, after)]
    if sorted(names[0]) == sorted(names[1]) and names[0] != names[1]:
        found.append(Fact("order", names[0], names[1]))
    return tuple(found)


def compare_routing(
    before: Manifest, after: Manifest, tasks: Sequence[TaskPair]
) -> tuple[RoutingChange, ...]:
    """The tasks in both whose baseline of routing weights is another one."""
    old = {entry.task: entry.mean for entry in before.utilization}
    new = {entry.task: entry.mean for entry in after.utilization}
    found = []
    for pair in tasks:
        one, other = old.get(pair.before or "", ()), new.get(pair.after or "", ())
        if one != other:
            found.append(RoutingChange(pair, _total_variation(one, other)))
    return tuple(found)


def compare_files(before: Manifest, after: Manifest) -> tuple[FileChange, ...]:
    """Every file that either manifest lists, by path."""
    old = {entry.path: entry for entry in before.files}
    new = {entry.path: entry for entry in after.files}
    found = []
    for path in sorted(old.keys() | new.keys()):
        one, other = old.get(path), new.get(path)
        found.append(
            FileChange(
                path,
                None if one is None else one.size_bytes,
                None if other is None else other.size_bytes,
                is_same=one is not None and other is not None and one.sha256 == other.sha256,
            )
        )
    return tuple(found)


def _total_variation(before: Sequence[float], after: Sequence[float]) -> float | None:
    if len(before) != len(after) or not before:
        return None
    return sum(abs(one - other) for one, other in zip(before, after, strict=True)) / 2


def _model_values(manifest: Manifest) -> Mapping[str, FactValue]:
    model, producer = manifest.model, manifest.producer
    return {
        "checkpoint sha256": model.checkpoint_sha256,
        "family": model.family,
        "bytes of parameters": model.parameter_bytes,
        "unused parameters": model.unused_parameters,
        **{f"config.{name}": value for name, value in model.config.items()},
        "opset": producer.opset,
        **{f"{name} version": str(getattr(producer, name)) for name in _PACKAGES},
    }


_PACKAGES = ("te_export", "torch", "onnx", "onnxscript", "onnxruntime")


def _input_values(manifest: Manifest) -> Mapping[str, FactValue]:
    return {spec.name: (spec.dtype, *spec.shape) for spec in manifest.inputs}


def _facts(before: Mapping[str, FactValue], after: Mapping[str, FactValue]) -> Iterator[Fact]:
    for name in dict.fromkeys((*before, *after)):
        old, new = before.get(name), after.get(name)
        if old != new or type(old) is not type(new):
            yield Fact(name, old, new)
