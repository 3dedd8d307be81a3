"""What a model answers for one task."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from te_runtime.providers import Provider

__all__ = ["Prediction"]


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
