"""The graphs of one variant as written, not yet published: the dataclass between writing and verifying."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from te_runtime.manifest import GraphSpec, TaskGraphs

__all__ = ["StagedGraphs"]


@dataclass(frozen=True)
class StagedGraphs:
    """Where the graphs are and what they read and give.

    Attributes:
        root: the staged bundle; the paths of the graphs are relative to it.
        trunk: what every task shares; None where tasks share nothing.
        joint_tails: the tails of all tasks as one graph; None without a trunk, and where there is one task.
        task_size_bytes: by task, what its task graph takes alone: the file and the weights it points to.
        pruned: by task that has one, its graph without some experts.
    """

    root: Path
    joint: GraphSpec
    trunk: GraphSpec | None
    joint_tails: GraphSpec | None
    tasks: tuple[TaskGraphs, ...]
    task_size_bytes: Mapping[str, int]
    pruned: Mapping[str, GraphSpec] = field(default_factory=dict)

    @property
    def files(self) -> tuple[Path, ...]:
        """Every graph file but those of pruned graphs, the joint graph's first."""
        tasks = [graph for task in self.tasks for graph in (task.graph, task.tail)]
        graphs = (self.joint, self.trunk, self.joint_tails, *tasks)
        return tuple(self.root / graph.path for graph in graphs if graph is not None)
