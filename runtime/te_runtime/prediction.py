"""What a model answers for one task."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import repeat
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from te_runtime.providers import Provider

__all__ = ["Prediction", "make_predictions"]

_NEW_TUPLE = tuple.__new__  # what Prediction(...) calls, without the frame of Python around it


class Prediction(NamedTuple):
    """One task's answer for a batch of rows. A tuple, since a frozen dataclass takes twice as long to make.

    Attributes:
        output: (B, out) float32; what the task's head gave.
        routing_weights: (B, K) float32, each row adding up to one: how much each expert took part in
            `output`; None where the model has no gate.
        provider: where it was computed.
    """

    output: NDArray[np.generic]
    routing_weights: NDArray[np.generic] | None
    provider: Provider


def make_predictions(
    outputs: Iterable[NDArray[np.generic]],
    routing_weights: Iterable[NDArray[np.generic] | None],
    provider: Provider,
) -> Iterator[Prediction]:
    """A Prediction for each of some outputs; made by functions written in C, in half the time of calling the class.

    Args:
        outputs: as Prediction.output.
        routing_weights: as Prediction.routing_weights, one for each output.
        provider: of all of them.
    """
    return map(_NEW_TUPLE, repeat(Prediction), zip(outputs, routing_weights, repeat(provider)))
