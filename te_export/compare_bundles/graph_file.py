"""One .onnx file of a bundle, read as far as a comparison needs: its weights, its operators, and who reads what.

A weight is an initializer of floating point, or one that lies in weights.bin. Whole numbers inside a graph are
shapes and indices: they belong to its structure.
"""

from __future__ import annotations

import hashlib
import posixpath
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from onnx import numpy_helper

from te_export.compare_bundles.stored_tensor import StoredTensor
from te_runtime.bundle import Bundle
from te_runtime.bundle_files import ADVICE, chunks, open_regular
from te_runtime.errors import BundleError

__all__ = ["GraphFile", "read_graph"]

_FLOATS = (
    onnx.TensorProto.FLOAT,
    onnx.TensorProto.FLOAT16,
    onnx.TensorProto.DOUBLE,
    onnx.TensorProto.BFLOAT16,
)
_ALL_KINDS = frozenset(onnx.TensorProto.DataType.values())
_VALUE_FIELDS = (
    "raw_data",
    "float_data",
    "int32_data",
    "int64_data",
    "double_data",
    "uint64_data",
    "string_data",
    "external_data",
    "data_location",
)


@dataclass(frozen=True)
class GraphFile:
    """A graph without the numbers of its weights.

    Attributes:
        path: in the bundle.
        weights: by name, in the graph's order.
        constants: shapes and other whole numbers inside the graph, by name.
        operators: how many nodes there are of each kind.
        nodes: as the graph has them.
        structure_sha256: of the graph without its name, and without the numbers of its weights and where they lie.
    """

    path: str
    weights: Mapping[str, StoredTensor]
    constants: Mapping[str, tuple[int, ...]]
    operators: Mapping[str, int]
    nodes: tuple[onnx.NodeProto, ...]
    structure_sha256: str

    @property
    def node_count(self) -> int:
        return sum(self.operators.values())


def read_graph(bundle: Bundle, path: str, weights_path: str) -> GraphFile:
    """Read a graph file of an opened bundle.

    Args:
        bundle: opened, every checksum compared.
        path: the graph's, in the bundle.
        weights_path: the only file that its weights may lie in.

    Raises:
        BundleError: it is no ONNX graph, or a weight lies elsewhere or outside of its file.
    """
    model = _parse(bundle, path)
    weights: dict[str, StoredTensor] = {}
    constants: dict[str, tuple[int, ...]] = {}
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.data_type in _FLOATS:
            weights[tensor.name] = _stored(bundle, path, weights_path, tensor)
            for field in _VALUE_FIELDS:
                tensor.ClearField(field)
        elif tensor.data_type == onnx.TensorProto.INT64 and len(tensor.dims) <= 1:
            constants[tensor.name] = tuple(int(value) for value in _array(bundle, path, tensor).reshape(-1))
    model.graph.ClearField("name")  # it names the task
    structure = model.SerializeToString(deterministic=True)
    return GraphFile(
        path=path,
        weights=weights,
        constants=constants,
        operators=dict(Counter(node.op_type for node in model.graph.node)),
        nodes=tuple(model.graph.node),
        structure_sha256=hashlib.sha256(structure).hexdigest(),
    )


def _parse(bundle: Bundle, path: str) -> onnx.ModelProto:
    with open_regular(bundle.folder, path) as (descriptor, size_bytes):
        data = b"".join(chunks(descriptor, size_bytes))
    try:
        model: onnx.ModelProto = onnx.ModelProto.FromString(data)
        return model
    except DecodeError as error:
        raise BundleError(f"{bundle.path(path)}: is no ONNX graph ({error}). {ADVICE}") from error


def _stored(bundle: Bundle, path: str, weights_path: str, tensor: onnx.TensorProto) -> StoredTensor:
    shape = tuple(tensor.dims)
    if tensor.data_type not in _ALL_KINDS or min(shape, default=1) < 0:
        raise _wrong(bundle, path, tensor, f"data type {tensor.data_type} and shape {shape}")
    kind = onnx.TensorProto.DataType.Name(tensor.data_type)
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        inside = _array(bundle, path, tensor)
        return StoredTensor(kind, shape, inside=inside.tobytes())
    told = {pair.key: pair.value for pair in tensor.external_data}
    place = posixpath.normpath(posixpath.join(posixpath.dirname(path), told.get("location", "")))
    try:
        offset, length = int(told.get("offset", "0")), int(told["length"])
    except (KeyError, ValueError):
        raise _wrong(bundle, path, tensor, f"external data {told!s:.160}") from None
    entry = bundle.manifest.file(weights_path)
    stored = StoredTensor(
        kind,
        shape,
        folder=bundle.folder,
        file=weights_path,
        file_sha256=entry.sha256,
        offset=offset,
        length=length,
    )
    expected = stored.size * stored.dtype.itemsize if stored.is_measurable else length
    fits = offset >= 0 and length == expected and length >= 0 and offset + length <= entry.size_bytes
    if place != weights_path or not fits:
        raise _wrong(bundle, path, tensor, f"external data {told!s:.160} for {kind} {shape}")
    return stored


def _array(bundle: Bundle, path: str, tensor: onnx.TensorProto) -> NDArray[np.generic]:
    try:
        array: NDArray[np.generic] = numpy_helper.to_array(tensor)
        return array
    except (ValueError, TypeError, KeyError) as error:
        raise _wrong(bundle, path, tensor, f"values that cannot be read ({error})") from error


def _wrong(bundle: Bundle, path: str, tensor: onnx.TensorProto, found: str) -> BundleError:
    return BundleError(
        f"{bundle.path(path)}: initializer {tensor.name!a:.120} has {found}, expected values inside the graph "
        f"or a range of the weights file beside it. {ADVICE}"
    )
