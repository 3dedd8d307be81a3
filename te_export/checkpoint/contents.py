"""What a checkpoint file held, whatever its container: the dataclass between reading and model detection."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

__all__ = ["Checkpoint", "ConfigValue", "Container"]

Container = Literal["torch-zip", "torch-legacy", "safetensors", "trusted-pickle"]
ConfigValue = bool | int | float | str | tuple[int, ...] | tuple[str, ...] | None


@dataclass(frozen=True)
class Checkpoint:
    """A state dict on the CPU, with what the file says of the model around it.

    Attributes:
        path: the file that was read.
        sha256: of the whole file, hexadecimal.
        size_bytes: of the whole file.
        container: how the file was packed.
        state: parameter name to tensor, prefixes of wrappers removed, dtypes as stored, on the CPU. Where the
            container allows, tensors are mapped from the file and take no memory of their own.
        config: the config found in the file (dict or dataclass), scalars and flat lists only; None where
            there was none.
        config_source: where the config was found, for messages, such as "'config' (a TaskExpertConfig)"; None
            where there was none.
        task_names: names the file gives to the tasks (key `task_names` beside the state dict or in the
            config); None where it gives none.
        layer_types: module path to class name (`experts.0.network.1` → `ReLU`; the root is the empty path),
            known only where a whole module was pickled; else empty.
        notes: what was done on the way that a person may want to know (prefix removed, entry ignored).
    """

    path: Path
    sha256: str
    size_bytes: int
    container: Container
    state: Mapping[str, torch.Tensor]
    config: Mapping[str, ConfigValue] | None
    config_source: str | None
    task_names: tuple[str, ...] | None
    layer_types: Mapping[str, str]
    notes: tuple[str, ...]
