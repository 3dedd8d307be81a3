"""Values of a checkpoint's config, each checked before it is used."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

from te_export.checkpoint.contents import ConfigValue
from te_export.errors import CheckpointError

__all__ = ["image_shape_in", "training_settings"]

_MAX_IMAGE_VALUES = 2**26


def image_shape_in(
    config: Mapping[str, ConfigValue], name: str, *, source: str | None
) -> tuple[int, ...] | None:
    """(C, H, W) under `name`, or None where the config says nothing.

    Raises:
        CheckpointError: it is no list of three integers from 1 on, or an image would have more than 2**26 values.
    """
    value = config.get(name)
    if value is None or value == ():
        return None
    sizes = tuple(each for each in value if isinstance(each, int)) if isinstance(value, tuple) else ()
    is_shape = isinstance(value, tuple) and len(value) == len(sizes) == 3 and min(sizes) >= 1
    if not is_shape or sizes[0] * sizes[1] * sizes[2] > _MAX_IMAGE_VALUES:
        raise CheckpointError(
            f"{name} in {source} is {list(value) if isinstance(value, tuple) else value!r}, expected channels, height "
            f"and width, at most {_MAX_IMAGE_VALUES} values in all. Save the checkpoint again with the shape it was "
            "trained on."
        )
    return sizes


def training_settings(config: Mapping[str, ConfigValue], names: Sequence[str]) -> dict[str, float]:
    """The settings among `names` that are usable numbers; no graph depends on them, so others are passed over."""
    settings = {}
    for name in names:
        value = config.get(name)
        if not isinstance(value, int | float) or isinstance(value, bool):
            continue
        if 0.0 <= value < sys.float_info.max:
            settings[name] = float(value)
    return settings
