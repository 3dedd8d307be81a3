"""The safetensors format, read by its own library; the header's metadata may carry the config and task names.

__metadata__: {"config": "{\\"expert_dim\\": 128, …}", "task_names": "[\\"a\\", \\"b\\"]" or "a,b"}
"""

from __future__ import annotations

import json
from typing import Final

from safetensors import SafetensorError, safe_open

from te_export.checkpoint.opened_file import OpenedFile
from te_export.checkpoint.shown import shown
from te_export.checkpoint.storages import DTYPES
from te_export.errors import CheckpointError

__all__ = ["read_safetensors"]

_MAX_METADATA_CHARACTERS: Final = 1 << 20


def read_safetensors(file: OpenedFile) -> dict[str, object]:
    """Read tensors and metadata as the dict that torch.save would have been given.

    Returns:
        {"state_dict": name → tensor, mapped from the file; "config", "task_names": where given}

    Raises:
        CheckpointError: the header or a tensor is malformed, the file is cut short, or a dtype is not read.
    """
    try:
        with safe_open(file.path, framework="pt", device="cpu") as opened:
            metadata = opened.metadata() or {}
            state = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"is no readable safetensors file: {error!s:.200}; copy or download it again"
        ) from error
    for name, tensor in state.items():
        if tensor.dtype not in DTYPES.values():
            raise CheckpointError(
                f"parameter {shown(name)} has dtype {tensor.dtype}, expected one of {', '.join(DTYPES)}; "
                "convert it and save again"
            )
    return {"state_dict": state, **_from_metadata(metadata)}


def _from_metadata(metadata: dict[str, str]) -> dict[str, object]:
    """What the metadata says of the model; text that is no JSON is kept as text."""
    found: dict[str, object] = {}
    for key in ("config", "model_config", "task_names"):
        text = metadata.get(key)
        if text is None:
            continue
        if len(text) > _MAX_METADATA_CHARACTERS:
            raise CheckpointError(
                f"has {len(text)} characters of {key} in its metadata, expected at most 1048576"
            )
        try:
            found[key] = json.loads(text)
        except RecursionError as error:
            raise CheckpointError(
                f"its metadata nests {key} too deep, expected a flat JSON object"
            ) from error
        except ValueError as error:
            if key != "task_names":
                raise CheckpointError(
                    f"its metadata has a {key} that is no JSON: {error}; write json.dumps(config)"
                ) from error
            found[key] = text
    return found
