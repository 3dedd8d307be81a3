"""Experts of one task graph become constants: their mean outputs, folded into gate and fusion.

    e = Concat(e_0, …, e_{K-1}) (B, K, D)      e' = Concat of the kept e_i
    z = flatten(e)·Wᵀ + b                      z = flatten(e')·W'ᵀ + b',   W' = W's columns of the kept experts,
                                                                         b' = b + Σ_j W's columns of j · m_j
    f = Σ_i w_i·e_i                            f = w·M + Σ_i w'_i·e'_i

for every layer z of the gate that reads the features, routing weights w (B, K), which stay whole, their kept columns
w', removed experts j with mean outputs m_j (D,), and M (K, D), whose rows are m_j, and 0 for kept experts. It is the
graph's own function wherever every removed expert answers its mean. Sums are taken in float64 and rounded once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from te_export.pruning.means_trial import Means
from te_export.pruning.mixture import Mixture, find_mixtures
from te_export.rewrite.edit import Edit, axes_of
from te_export.rewrite.linear import Linear, tensor_of

__all__ = ["PrunedModel", "prune_experts"]


@dataclass(frozen=True)
class PrunedModel:
    """A task graph without some of its experts.

    Attributes:
        sources: for each initializer that was made, the names of those whose place it took.
    """

    model: ir.Model
    sources: Mapping[str, tuple[str, ...]]


def prune_experts(captured: ir.Model, place: int, means: Means, *, task: str) -> PrunedModel | str:
    """Take experts out of a task graph.

    Args:
        captured: the task graph before any rewrite; it stays as it is.
        place: which of its mixtures, as MeansTrial.place.
        means: the experts to take out, with their mean outputs.
        task: its name, which the new initializers carry: other tasks may cut the same layers otherwise.

    Returns:
        The graph with the same inputs and outputs, or why it was left alone.
    """
    model = captured.clone()
    mixture = find_mixtures(model.graph)[place]
    kept = [expert for expert in range(mixture.count) if expert not in means]
    if not kept:
        return f"all {mixture.count} experts would go, and one must stay"
    layers = [_folded(layer, mixture, kept, means) for layer in mixture.gate]
    rows = _mean_rows(mixture, means)
    if not all(np.isfinite(values).all() for values in (rows, *(bias for _, bias in layers))):
        return "the mean outputs of the experts pass the largest float32"
    edit = Edit(model.graph)
    features = _keep_features(edit, mixture, kept)
    sources = _cut_gate(edit, mixture, features, layers, task)
    sources |= _cut_fusion(edit, mixture, features, kept, rows, task)
    edit.done()
    return PrunedModel(model, sources)


def _folded(
    layer: Linear, mixture: Mixture, kept: list[int], means: Means
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The columns of kept experts (out, K'·D), and the bias (out,) with the removed ones folded in."""
    columns = layer.weight_out_in().reshape(layer.width_out, mixture.count, mixture.width)
    bias = np.zeros(layer.width_out)
    if layer.bias is not None:
        bias += tensor_of(layer.bias).numpy()
    with np.errstate(over="ignore", invalid="ignore"):  # prune_experts looks for what is not finite
        for expert, mean in means.items():
            bias += columns[:, expert].astype(np.float64) @ mean
        return columns[:, kept].reshape(layer.width_out, -1), bias.astype(np.float32)


def _mean_rows(mixture: Mixture, means: Means) -> NDArray[np.float32]:
    """M: (K, D)."""
    rows = np.zeros((mixture.count, mixture.width))
    for expert, mean in means.items():
        rows[expert] = mean
    with np.errstate(over="ignore"):
        return rows.astype(np.float32)


def _keep_features(edit: Edit, mixture: Mixture, kept: list[int]) -> ir.Value:
    """The features of the kept experts: (B, K', D)."""
    rows = [mixture.rows[expert] for expert in kept]
    axes = (mixture.batch, len(kept), mixture.width)
    return edit.add("Concat", rows, axes, name=f"{mixture.features.name}.kept", axis=1)


def _cut_gate(
    edit: Edit,
    mixture: Mixture,
    features: ir.Value,
    layers: list[tuple[NDArray[np.float32], NDArray[np.float32]]],
    task: str,
) -> dict[str, tuple[str, ...]]:
    sources: dict[str, tuple[str, ...]] = {}
    if not layers:
        return sources
    batch, width = mixture.batch, layers[0][0].shape[1]
    size = edit.integers([-1, width], name=f"{features.name}.shape")
    flat = edit.add("Reshape", [features, size], (batch, width), name=f"{features.name}.flat")
    for layer, (columns, shift) in zip(mixture.gate, layers, strict=True):
        stored = np.ascontiguousarray(columns.T if layer.turned else columns)
        weight = edit.initializer(ir.tensor(stored), name=f"{layer.weight.name}.pruned-{task}")
        own = f"{layer.name}.bias" if layer.bias is None else str(layer.bias.name)
        bias = edit.initializer(ir.tensor(shift), name=f"{own}.pruned-{task}")
        sources[str(weight.name)] = (str(layer.weight.name),)
        sources[str(bias.name)] = () if layer.bias is None else (str(layer.bias.name),)
        inputs = [flat, weight, bias]
        name = f"{layer.name}.pruned"
        new = edit.add("Gemm", inputs, layer.axes, name=name, transB=int(not layer.turned))
        edit.replace(layer.y, new)
    return sources


def _cut_fusion(
    edit: Edit,
    mixture: Mixture,
    features: ir.Value,
    kept: list[int],
    mean_rows: NDArray[np.float32],
    task: str,
) -> dict[str, tuple[str, ...]]:
    """The Gemm adds what the kept experts give, so that one node holds all the rest."""
    batch, width, name = mixture.batch, mixture.width, f"{mixture.fused.name}.kept"
    places = edit.integers(kept, name=f"{name}.experts")
    weights = edit.add(
        "Gather", [mixture.weights, places], (batch, len(kept)), name=f"{name}.weights", axis=1
    )
    last, first = (edit.integers([axis], name=f"{name}.axis") for axis in (-1, 1))
    column = edit.add("Unsqueeze", [weights, last], (batch, len(kept), 1), name=f"{name}.column")
    product = edit.add("Mul", [column, features], (batch, len(kept), width), name=f"{name}.product")
    total = edit.add("ReduceSum", [product, first], (batch, width), name=name, keepdims=0)
    means = edit.initializer(ir.tensor(mean_rows), name=f"{name}.means.pruned-{task}")
    inputs = [mixture.weights, means, total]
    fused = edit.add("Gemm", inputs, (batch, width), name=f"{mixture.fused.name}.pruned")
    axes = axes_of(mixture.fused)
    if axes is not None and axes != (batch, width):
        size = edit.integers(
            [-1, *(axis for axis in axes[1:] if isinstance(axis, int))], name=f"{name}.shape"
        )
        fused = edit.add("Reshape", [fused, size], axes, name=f"{mixture.fused.name}.laid_out")
    edit.replace(mixture.fused, fused)
    return {str(means.name): ()}
