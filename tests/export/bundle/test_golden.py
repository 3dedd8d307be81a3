"""golden.npz: the same references give the same bytes, and numpy reads them back."""

from __future__ import annotations

import dataclasses
import io
import zipfile

import numpy as np

from te_export.bundle.golden import golden_file
from te_export.verify.probe_rows import ProbeRows
from te_export.verify.references import References


def test_the_same_references_give_the_same_bytes(references: References) -> None:
    assert golden_file(references, ["x"]) == golden_file(references, ["x"])


def test_no_entry_carries_a_time_a_comment_or_compression(references: References) -> None:
    data, _ = golden_file(references, ["x"])

    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert archive.comment == b""
        for entry in archive.infolist():
            assert entry.date_time == (1980, 1, 1, 0, 0, 0)
            assert entry.compress_type == zipfile.ZIP_STORED
            assert (entry.comment, entry.extra) == (b"", b"")


def test_rows_are_probe_rows_of_every_group_with_the_oracles_outputs(references: References) -> None:
    data, groups = golden_file(references, ["x"])
    arrays = dict(np.load(io.BytesIO(data), allow_pickle=False))

    rows = references.rows
    assert [group.name for group in groups] == [name for name, _, _ in rows.groups]
    count = sum(group.rows for group in groups)
    x = arrays.pop("input.x")
    assert x.shape == (count, 20)
    assert x.dtype == np.float32
    assert len(np.unique(x, axis=0)) == count
    index = [int(np.flatnonzero((rows.x.arrays["x"] == row).all(axis=1))[0]) for row in x]
    assert index == sorted(index)
    start = 0
    for group, (_, first, after) in zip(groups, rows.groups, strict=True):
        assert all(first <= i < after for i in index[start : start + group.rows])
        start += group.rows
    assert arrays.keys() == {f"{t}.{o}" for t in references.tasks for o in ("prediction", "routing_weights")}
    for task, reference in references.tasks.items():
        assert arrays[f"{task}.prediction"].dtype == np.float64
        assert np.array_equal(arrays[f"{task}.prediction"], reference.prediction.oracle[index])
        assert np.array_equal(arrays[f"{task}.routing_weights"], reference.routing_weights.oracle[index])


def test_groups_of_few_rows_give_all_they_have(references: References) -> None:
    few = np.arange(6)
    cut = dataclasses.replace(
        references,
        rows=ProbeRows(x=references.rows.x[few], groups=(("ordinary", 0, 5), ("large", 5, 6))),
    )

    data, groups = golden_file(cut, ["x"])

    assert [(group.name, group.rows) for group in groups] == [("ordinary", 5), ("large", 1)]
    assert len(np.load(io.BytesIO(data))["input.x"]) == 6
