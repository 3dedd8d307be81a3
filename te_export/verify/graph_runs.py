"""Running the staged graphs, as they will be shipped, over the probe rows at every batch size."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from te_export.models.input_rows import InputRows
from te_export.verify.batches import plan_batches
from te_runtime.manifest import GraphSpec
from te_runtime.session import open_session
from te_runtime.session_types import Session
from te_runtime.threads import default_threads

__all__ = ["GraphRun", "collect_run", "open_staged", "run_graph", "run_tail"]


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


def run_graph(root: Path, spec: GraphSpec, rows: InputRows) -> GraphRun:
    """Run a graph that reads inputs of the model."""
    names = [tensor.name for tensor in spec.inputs]
    planned = plan_batches(len(rows))
    return collect_run(open_staged(root, spec), planned, (rows[batch].feeds(names) for batch in planned))


def run_tail(root: Path, spec: GraphSpec, trunk: GraphRun, rows: InputRows) -> GraphRun:
    """Run a tail on what the trunk graph put out, and on the model's inputs where it reads any, batch by batch, as
    te_runtime composes them."""
    planned = plan_batches(len(rows))
    ends = np.cumsum([len(batch) for batch in planned])[:-1]
    made = {
        tensor.name: np.split(trunk.outputs[tensor.name], ends)
        for tensor in spec.inputs
        if tensor.name in trunk.outputs
    }
    own = [tensor.name for tensor in spec.inputs if tensor.name not in made]
    feeds = (
        {name: values[index] for name, values in made.items()} | rows[batch].feeds(own)
        for index, batch in enumerate(planned)
    )
    return collect_run(open_staged(root, spec), planned, feeds)


def collect_run(
    session: Session, planned: Sequence[NDArray[np.int64]], feeds: Iterable[dict[str, NDArray[np.generic]]]
) -> GraphRun:
    """Run a graph on feeds for the rows `planned`."""
    results = [session.run(feed) for feed in feeds]
    columns = [np.concatenate(parts) for parts in zip(*results, strict=True)]
    names = [tensor.name for tensor in session.spec.outputs]
    return GraphRun(
        graph=session.spec.path,
        indices=np.concatenate(planned),
        outputs=dict(zip(names, columns, strict=True)),
    )
