"""Reading the sizes of a TaskExpert's convolutional backbone off its tensors.

The projection after the convolutions tells how many values they leave of an image. Where no config gives input_shape,
the image is taken to be square, and its side follows from that number: the checkpoint alone is enough.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from te_export.checkpoint.contents import ConfigValue
from te_export.errors import CheckpointError
from te_export.models.config_values import image_shape_in
from te_export.models.size_votes import Axes, read_sizes, size_of

__all__ = ["ConvolutionSizes", "read_convolution_sizes"]

_AXES: dict[str, Axes] = {
    "backbone.convolutions.#.weight": (("channels after backbone.convolutions.#", 1), None, None, None),
    "backbone.convolutions.#.bias": (("channels after backbone.convolutions.#", 1),),
}
_INDEX = re.compile(r"backbone\.convolutions\.(\d{1,4})\.")
_LAYERS_PER_CONVOLUTION = 3


@dataclass(frozen=True)
class ConvolutionSizes:
    """The part of a ConvolutionalTaskExpertConfig that the backbone's tensors determine."""

    input_shape: tuple[int, ...]
    convolution_channels: tuple[int, ...]


def read_convolution_sizes(
    state: Mapping[str, Tensor], config: Mapping[str, ConfigValue], *, source: str | None
) -> ConvolutionSizes:
    """The sizes of the convolutions, and the shape of an image.

    Args:
        config: of the file; its input_shape is taken where it has one.
        source: where the config was found.

    Raises:
        CheckpointError: input_shape is no shape of an image; a convolution is missing; or the number of values that
            are left is that of no square image, and no config gives input_shape.
    """
    sizes = read_sizes(state, _AXES)
    count = len({found[1] for name in state if (found := _INDEX.match(name))})
    names = [f"backbone.convolutions.{_LAYERS_PER_CONVOLUTION * index}" for index in range(count)]
    channels = tuple(size_of(sizes, f"channels after {name}", told_by=f"{name}.*") for name in names)
    shape = image_shape_in(config, "input_shape", source=source)
    return ConvolutionSizes(shape or _square_shape(state, channels), channels)


def _square_shape(state: Mapping[str, Tensor], channels: tuple[int, ...]) -> tuple[int, ...]:
    first, projection = state.get("backbone.convolutions.0.weight"), state.get("backbone.projection.weight")
    if first is None or first.ndim != 4 or projection is None or projection.ndim != 2:
        raise CheckpointError(
            "nothing tells the shape of an image: expected backbone.convolutions.0.weight (out, channels, 3, 3) and "
            "backbone.projection.weight (out, in). Save the whole model.state_dict()."
        )
    area, rest = divmod(projection.shape[1], channels[-1])
    side = math.isqrt(area)
    if rest or side**2 != area:
        raise CheckpointError(
            f"backbone.projection.weight reads {projection.shape[1]} values, expected those of a square image in "
            f"{channels[-1]} channels. Where images are not square, save the config with input_shape beside the "
            "state dict."
        )
    halved = side * 2 ** len(channels)
    return (first.shape[1], halved, halved)
