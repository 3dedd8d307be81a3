"""Checking the layers of a pickled TaskExpert module, where the file names them.

A state dict holds tensors only; a pickled module also says which layers stand between them. Where it does, a layer
that TaskExpert does not have could change every number, so it is refused rather than overlooked: the table below is
closed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from te_export.errors import CheckpointError

__all__ = ["final_relu_of"]

_SHOWN_LAYERS = 20
_ANY = re.compile(r".*")
_LINEAR = re.compile(r"Linear")
_RELU = re.compile(r"ReLU")
_SOFTMAX = re.compile(r"Softmax")
_INERT = re.compile(r"Dropout|Identity|\w*Loss")
"""Layers that change nothing in eval mode, and loss functions, which no prediction passes through."""

_MAX_CONVOLUTIONS = 16
_CONVOLUTIONS = tuple(
    (rf"backbone\.convolutions\.{3 * index + place}", re.compile(kind))
    for index in range(_MAX_CONVOLUTIONS)
    for place, kind in enumerate(("Conv2d", "ReLU", "MaxPool2d"))
)

_LAYERS = tuple(
    (re.compile(path), allowed)
    for path, allowed in (
        (r"backbone\.convolutions", _ANY),
        *_CONVOLUTIONS,
        (r"backbone\.projection", _LINEAR),
        (r"", _ANY),
        (r"(backbone|experts\.\d+)(\.network)?|experts", _ANY),
        (r"(backbone|experts\.\d+)\.network\.[036]", _LINEAR),
        (r"(backbone|experts\.\d+)\.network\.[147]", _RELU),
        (r"gating_networks(\.\d+(\.gate)?)?", _ANY),
        (r"gating_networks\.\d+\.gate\.[02]", _LINEAR),
        (r"gating_networks\.\d+\.gate\.1", _RELU),
        (r"gating_networks\.\d+\.gate\.3", _SOFTMAX),
        (r"task_heads(\.\d+(\.head)?)?", _ANY),
        (r"task_heads\.\d+\.head\.[03]", _LINEAR),
        (r"task_heads\.\d+\.head\.1", _RELU),
        (r"feature_fusion(\.\d+)?", _ANY),
        (r".*", _INERT),
    )
)
"""Path of a module → what its class may be; the first path that fits counts."""

_LAST_LINEAR = re.compile(r"(backbone|experts\.\d+)\.network\.6")
_FINAL_RELU = re.compile(r"(backbone|experts\.\d+)\.network\.7")


def final_relu_of(layer_types: Mapping[str, str], in_config: bool | None) -> bool:
    """Whether ReLU follows the last layer of backbone and experts: from the layers where known, else from the
    config, else not.

    Args:
        layer_types: module path to class name; empty where the file holds tensors only.
        in_config: `final_relu` of the config in the file, None where it has none.

    Raises:
        CheckpointError: a layer is not one TaskExpert has there, or layers and config disagree.
    """
    _check_layers(layer_types)
    ends = [path for path in layer_types if _LAST_LINEAR.fullmatch(path)]
    relus = sorted(path for path in layer_types if _FINAL_RELU.fullmatch(path))
    if not ends:
        return bool(in_config)
    if relus and len(relus) != len(ends):
        raise CheckpointError(
            f"{len(relus)} of {len(ends)} backbone and expert networks end with ReLU, expected all of them or "
            f"none: {', '.join(relus[:4])}"
        )
    if in_config is not None and in_config != bool(relus):
        raise CheckpointError(
            f"final_relu is {in_config} in the config, but the pickled networks "
            f"{'end' if relus else 'do not end'} with ReLU. Save model.state_dict() with the config that is right."
        )
    return bool(relus)


def _check_layers(layer_types: Mapping[str, str]) -> None:
    odd = []
    for path, kind in layer_types.items():
        allowed = next(allowed for pattern, allowed in _LAYERS if pattern.fullmatch(path))
        if allowed.fullmatch(kind) is None:
            expected = "no such layer" if allowed is _INERT else allowed.pattern
            odd.append(f"{path} is {kind}, expected {expected}")
    if odd:
        more = [f"… and {len(odd) - _SHOWN_LAYERS} more"] if len(odd) > _SHOWN_LAYERS else []
        raise CheckpointError(
            "the pickled module has layers that TaskExpert does not have there:\n  "
            + "\n  ".join([*odd[:_SHOWN_LAYERS], *more])
            + "\nThis release exports TaskExpert as it is defined; a variant with other layers would give other "
            "numbers."
        )
