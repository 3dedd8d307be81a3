"""Running the staged graphs, as they will be shipped, over the probe rows at every batch size."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from te_export.verify.batches import plan_batches
from te_runtime.manifest import GraphSpec
from te_runtime.session import open_session
from te_runtime.session_types import Session
from te_runtime.threads import default_threads

__all__ = ["GraphRun", "open_staged", "run_graph", "run_tail"]


@dataclass(frozen=True)
class GraphRun:
    """Outputs of one graph over the rows `indices`; a row run at several batch sizes stands there several
    times.

    Attributes:
        outputs: by output name, (len(indices), …), in the graph's own dtype.
    """

    graph: str
    indices: NDArray[np.int64]
    outputs: Mapping[str, NDArray[np.generic]]


def open_staged(root: Path, spec: GraphSpec) -> Session:
    """Open a graph of a staged bundle the way te_runtime will."""
    return open_session(root / spec.path, spec, provider="cpu", threads=default_threads())


def run_graph(root: Path, spec: GraphSpec, x: NDArray[np.float32]) -> GraphRun:
    """Run a graph whose one input is the model's input x (N, …)."""
    (name,) = (tensor.name for tensor in spec.inputs)
    planned = plan_batches(len(x))
    return _collect(open_staged(root, spec), planned, ({name: x[rows]} for rows in planned))


def run_tail(root: Path, spec: GraphSpec, trunk: GraphRun) -> GraphRun:
    """Run a tail on what the trunk graph put out, batch by batch, as te_runtime composes them."""
    planned = plan_batches(int(trunk.indices.max()) + 1)
    ends = np.cumsum([len(rows) for rows in planned])[:-1]
    parts = {tensor.name: np.split(trunk.outputs[tensor.name], ends) for tensor in spec.inputs}
    feeds = ({name: values[index] for name, values in parts.items()} for index in range(len(planned)))
    return _collect(open_staged(root, spec), planned, feeds)


def _collect(
    session: Session, planned: list[NDArray[np.int64]], feeds: Iterator[dict[str, NDArray[np.generic]]]
) -> GraphRun:
    results = [session.run(feed) for feed in feeds]
    columns = [np.concatenate(parts) for parts in zip(*results, strict=True)]
    names = [tensor.name for tensor in session.spec.outputs]
    return GraphRun(
        graph=session.spec.path,
        indices=np.concatenate(planned),
        outputs=dict(zip(names, columns, strict=True)),
    )
