"""Checking the layers of a pickled TaskExpert module, where the file names them.

A state dict holds tensors only; a pickled module also says which layers stand between them. Where it does,
an activation other than the family's would change every number, so it is refused rather than overlooked.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from te_export.errors import CheckpointError

__all__ = ["final_relu_of"]

_MLP = re.compile(r"(backbone|experts\.\d+)\.network\.(\d+)")
_GATE = re.compile(r"gating_networks\.\d+\.gate\.(\d+)")
_HEAD = re.compile(r"task_heads\.\d+\.head\.(\d+)")
_INERT = {"Dropout", "Identity"}

_MLP_LAYERS = {
    0: {"Linear"},
    1: {"ReLU"},
    2: _INERT,
    3: {"Linear"},
    4: {"ReLU"},
    5: _INERT,
    6: {"Linear"},
    7: {"ReLU"},
}
_GATE_LAYERS = {0: {"Linear"}, 1: {"ReLU"}, 2: {"Linear"}, 3: {"Softmax"}}
_HEAD_LAYERS = {0: {"Linear"}, 1: {"ReLU"}, 2: _INERT, 3: {"Linear"}}


def final_relu_of(layer_types: Mapping[str, str], in_config: bool | None) -> bool:
    """Whether ReLU follows the last layer of backbone and experts, from the layers where known, else from
    the config, else not.

    Args:
        layer_types: module path to class name; empty where the file holds tensors only.
        in_config: `final_relu` of the config in the file, None where it has none.

    Raises:
        CheckpointError: a layer is not the one TaskExpert has there, or layers and config disagree.
    """
    odd = [
        f"{path} is {kind}, expected {' or '.join(sorted(allowed))}"
        for path, kind, allowed in _odd_layers(layer_types)
    ]
    if odd:
        raise CheckpointError(
            "the pickled module has layers that TaskExpert does not have there:\n  " + "\n  ".join(odd) + "\n"
            "This release exports TaskExpert as it is defined; a variant with other layers would give "
            "other numbers."
        )
    ends = {path for path in layer_types if (found := _MLP.fullmatch(path)) and found[2] == "6"}
    relus = {path for path in layer_types if (found := _MLP.fullmatch(path)) and found[2] == "7"}
    if not ends:
        return bool(in_config)
    if relus and len(relus) != len(ends):
        raise CheckpointError(
            f"{len(relus)} of {len(ends)} backbone and expert networks end with ReLU, expected all of them "
            f"or none: {', '.join(sorted(relus)[:4])}"
        )
    if in_config is not None and in_config != bool(relus):
        raise CheckpointError(
            f"final_relu is {in_config} in the config, but the pickled networks "
            f"{'end' if relus else 'do not end'} with ReLU. "
            "Save model.state_dict() with the config that is right."
        )
    return bool(relus)


def _odd_layers(layer_types: Mapping[str, str]) -> list[tuple[str, str, set[str]]]:
    odd = []
    for path, kind in layer_types.items():
        for pattern, group, layers in (
            (_MLP, 2, _MLP_LAYERS),
            (_GATE, 1, _GATE_LAYERS),
            (_HEAD, 1, _HEAD_LAYERS),
        ):
            found = pattern.fullmatch(path)
            if found is None:
                continue
            allowed = layers.get(int(found[group]), {"no layer"})
            if kind not in allowed:
                odd.append((path, kind, allowed))
    return odd
