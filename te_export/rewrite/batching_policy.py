"""When one batched MatMul is faster than the linear layers it stands for, by provider.

CUDA: always; a kernel launch costs more than any of these layers.

CPU: onnxruntime prepacks the weight of a Gemm and not that of a batched MatMul, so large layers stay apart.
Tails alone (K = 8, D = 128, one thread, one run on a busy machine: a few hundredths are noise), time over that
of tails left apart, at 1 / 8 / 64 rows:

    tasks  gates batched, heads apart   gates and first head layers batched   all block-diagonal
    5      0.89 / 0.91 / 0.97           0.89 / 0.96 / 0.98                    0.89 / 1.00 / 1.03
    20     0.78 / 0.81 / 0.93           0.73 / 0.84 / 0.95                    2.81 / 1.95 / 1.74
    100    0.80 / 0.87 / 0.90           0.75 / 0.87 / 0.89                    not tried

A second gate layer has 1,024 weights and a first head layer 8,192. From 20 heads on, batching them gains at one
row and gains or loses little at more; at 5 it gains nothing, and MANY_LAYERS lies between. With the second and
third layers of 8 experts (32,768 and 16,384 weights) batched, a whole task graph took 1.16 to 1.22 times as long
at 8 rows. Block-diagonal weights grow with the square of the number of tasks and gain nothing at 5, so there are
none.
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
