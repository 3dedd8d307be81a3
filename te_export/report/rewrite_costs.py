"""What rewriting gained, in rows for a table; the terminal and report.md show the same."""

from __future__ import annotations

from collections.abc import Iterator

from te_export.rewrite.log import GraphCost, GraphCosts

__all__ = ["COST_HEADINGS", "cost_rows", "node_list"]

COST_HEADINGS = ("nodes", "multiply-adds per row", "weight bytes")


def cost_rows(costs: GraphCosts) -> Iterator[tuple[str, ...]]:
    """The graph as captured, as written, and the second over the first."""
    before, after = _figures(costs.before), _figures(costs.after)
    yield (costs.graph, "captured", *(f"{figure:,}" for figure in before))
    yield (costs.graph, "written", *(f"{figure:,}" for figure in after))
    ratios = (f"{new / old:.2f}x" if old else "-" for old, new in zip(before, after, strict=True))
    yield (costs.graph, "ratio", *ratios)


def node_list(cost: GraphCost) -> str:
    """`30 Gemm, 17 Relu, …`, the most frequent first."""
    return ", ".join(f"{count} {op_type}" for op_type, count in cost.nodes.items())


def _figures(cost: GraphCost) -> tuple[int, int, int]:
    return cost.node_count, cost.multiply_adds, cost.weight_bytes
