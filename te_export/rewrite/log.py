"""What was rewritten, what was left alone and why, and what a graph costs before and after."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["Applied", "Declined", "Findings", "GraphCost", "GraphCosts", "RewriteLog"]


@dataclass(frozen=True)
class Applied:
    """One rewrite that was made.

    Attributes:
        rule: the rule's name, that of its file.
        where: the first node of what was rewritten, by the name it had.
        what: what became of it.
    """

    rule: str
    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.rule} at {self.where}: {self.what}"


@dataclass(frozen=True)
class Declined:
    """One place whose pattern fits a rule and whose check did not pass."""

    rule: str
    where: str
    reason: str

    def __str__(self) -> str:
        return f"{self.rule} left {self.where}: {self.reason}"


@dataclass(frozen=True)
class Findings:
    """What one rule did to one graph.

    Attributes:
        sources: for each initializer the rule made, the names of the initializers whose place it took.
    """

    applied: tuple[Applied, ...] = ()
    declined: tuple[Declined, ...] = ()
    sources: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class GraphCost:
    """What one row costs in a graph.

    Attributes:
        nodes: how many nodes there are of each operator, most frequent first.
        multiply_adds: of one row, by every Gemm, MatMul, Conv and elementwise product.
        weight_bytes: of the graph's float initializers.
    """

    nodes: Mapping[str, int]
    multiply_adds: int
    weight_bytes: int

    @property
    def node_count(self) -> int:
        return sum(self.nodes.values())


@dataclass(frozen=True)
class GraphCosts:
    """The cost of one graph as captured and as rewritten."""

    graph: str
    before: GraphCost
    after: GraphCost


@dataclass(frozen=True)
class RewriteLog:
    """Everything the stage did, in order, and what it gained."""

    applied: tuple[Applied, ...] = ()
    declined: tuple[Declined, ...] = ()
    costs: tuple[GraphCosts, ...] = ()
