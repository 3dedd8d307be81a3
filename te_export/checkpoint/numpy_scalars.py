"""Numbers that numpy pickled: `numpy.int64(20)` in a config means 20, and no numpy function is needed to say so."""

from __future__ import annotations

import struct
from typing import Final

from te_export.checkpoint.inert import Inert, Name

__all__ = ["read_numpy_scalar"]

_SCALAR: Final = {Name("numpy.core.multiarray", "scalar"), Name("numpy._core.multiarray", "scalar")}
_DTYPE: Final = Name("numpy", "dtype")
_FORMATS: Final = {
    **{f"i{size}": code for size, code in ((1, "b"), (2, "h"), (4, "i"), (8, "q"))},
    **{f"u{size}": code for size, code in ((1, "B"), (2, "H"), (4, "I"), (8, "Q"))},
    **{f"f{size}": code for size, code in ((2, "e"), (4, "f"), (8, "d"))},
    "b1": "?",
}


def read_numpy_scalar(record: Inert) -> bool | int | float | None:
    """The number in a record of numpy's `scalar(dtype, bytes)`; None where it is something else."""
    if record.name not in _SCALAR or len(record.arguments) != 2:
        return None
    dtype, data = record.arguments
    data = _as_bytes(data)
    if data is None or not isinstance(dtype, Inert) or dtype.name != _DTYPE or not dtype.arguments:
        return None
    code = _FORMATS.get(str(dtype.arguments[0]))
    byte_order = dtype.state[1] if isinstance(dtype.state, tuple) and len(dtype.state) > 1 else "<"
    if code is None or byte_order not in ("<", ">", "|", "=") or struct.calcsize(code) != len(data):
        return None
    number: bool | int | float = struct.unpack((">" if byte_order == ">" else "<") + code, data)[0]
    return number


def _as_bytes(data: object) -> bytes | None:
    """Bytes, or what protocol 2 writes for them: `_codecs.encode(text, "latin1")`."""
    if isinstance(data, bytes):
        return data
    if isinstance(data, Inert) and data.name == Name("_codecs", "encode") and len(data.arguments) == 2:
        text, encoding = data.arguments
        if isinstance(text, str) and encoding in ("latin1", "latin-1") and all(ord(c) < 256 for c in text):
            return text.encode("latin-1")
    return None
