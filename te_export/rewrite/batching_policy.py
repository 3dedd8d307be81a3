"""When one batched MatMul is faster than the linear layers it stands for, by provider.

CUDA: always; a kernel launch costs more than any of these layers.

CPU: onnxruntime prepacks the weight of a Gemm and not that of a batched MatMul, so large layers stay apart.
Measured on tails alone (K = 8, D = 128, one thread, 2 MiB of second-level cache), time over that of tails
left apart, at 1 / 8 / 64 rows:

    tasks  gates batched, heads apart   gates and heads batched     gates and heads block-diagonal
    5      0.88 / 0.90 / 0.98           0.89 / 0.96 / 0.98          0.89 / 1.00 / 1.03
    20     0.77 / 0.81 / 0.93           0.73 / 0.83 / 0.89          2.81 / 1.95 / 1.74
    100    0.80 / 0.86 / 0.95           0.74 / 0.83 / 0.89          not tried, 100 times the weights

A second gate layer has 1,024 weights and a first head layer 8,192; batching the second and third layers of 8
experts (32,768 and 16,384) took 1.15 to 1.2 times as long at 8 rows. Block-diagonal weights grow with the
square of the number of tasks and gain nothing at 5, so there are none.
"""

from __future__ import annotations

from te_runtime.manifest import TargetProvider

__all__ = ["worth_batching"]

SMALL_WEIGHTS = 2048
MANY_LAYERS = 16
MEDIUM_WEIGHTS = 16_383


def worth_batching(count: int, weights: int, provider: TargetProvider) -> bool:
    """Whether `count` linear layers of `weights` weights each should be one batched MatMul."""
    if provider == "cuda" or weights <= SMALL_WEIGHTS:
        return count > 1
    return count >= MANY_LAYERS and weights <= MEDIUM_WEIGHTS
