"""golden.npz: a few probe rows with the oracle's outputs, for checks on the device that will run the
bundle.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from te_export.verify.references import References
from te_runtime.manifest import RowGroup

__all__ = ["GOLDEN_NAME", "golden_file"]

GOLDEN_NAME = "golden.npz"
_ROWS_PER_GROUP = {"ordinary": 8}
_OTHER_ROWS = 4


def golden_file(references: References, input_names: Sequence[str]) -> tuple[bytes, tuple[RowGroup, ...]]:
    """The bytes of golden.npz and the groups its rows fall into.

    Arrays: `input.<name>` (rows, …) in its dtype; `<task>.prediction` (rows, out) and `<task>.routing_weights`
        (rows, K) float64.
    """
    chosen: list[int] = []
    groups: list[RowGroup] = []
    for name, start, stop in references.rows.groups:
        count = min(stop - start, _ROWS_PER_GROUP.get(name, _OTHER_ROWS))
        chosen += np.linspace(start, stop - 1, count).astype(int).tolist()
        groups.append(RowGroup(name=name, rows=count))
    inputs = references.rows.x[chosen].feeds(input_names)
    arrays: dict[str, NDArray[np.generic]] = {f"input.{name}": array for name, array in inputs.items()}
    for task, reference in references.tasks.items():
        for output, values in reference.outputs.items():
            arrays[f"{task}.{output}"] = values.oracle[chosen]
    return _npz(arrays), tuple(groups)


def _npz(arrays: dict[str, NDArray[np.generic]]) -> bytes:
    """An uncompressed .npz whose entries carry no time of day, so that the same arrays give the same
    bytes.
    """
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            entry = io.BytesIO()
            np.lib.format.write_array(entry, np.ascontiguousarray(array), allow_pickle=False)
            info = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            info.create_system = 3  # Unix, whatever this system is
            archive.writestr(info, entry.getvalue())
    return buffer.getvalue()
