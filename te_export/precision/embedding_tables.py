"""Embedding tables as integers: only the rows that are looked up become float32 again.

    y = Gather(w (V, D) float32, ids (…))  (…, D) float32

    8 bits:  y = Cast(Gather(q (V, D) int8, ids)) · Gather(scales (V, 1) float32, ids)
    4 bits:  y = GatherBlockQuantized(q (V, D/2) uint8, ids, scales (V, ceil(D/32)) float32)     com.microsoft

8 bits are symmetric around zero with a scale for each row, in standard operators; 4 bits are laid out as MatMulNBits
reads them, where D is even. Tables are converted for their size: a lookup takes about a microsecond more.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from te_export.precision.integer_weights import (
    CONTRIB_DOMAIN,
    Bits,
    QuantizedWeight,
    quantize_blocks,
    quantize_rows,
)
from te_export.rewrite.edit import Axes, Edit, axes_of
from te_export.rewrite.linear import is_float_constant, tensor_of
from te_export.rewrite.stack import stack_of

__all__ = ["EmbeddingTable", "TableWeights", "embedding_tables"]

_BLOCK = 32
_LARGEST = 127
_SMALLEST_TABLE = 65_536
"""Numbers. A lookup in integers takes 1 us longer for one row, 2.5 us for 64: too much for what a smaller table saves."""
_NARROWEST = 4
"""Numbers in a row: a scale for each takes as much as four integers."""


@dataclass(frozen=True)
class EmbeddingTable:
    """A lookup of rows of a constant.

    Attributes:
        weight: (V, D) float32.
        indices: (…) integers.
        axes: of what is looked up, (…, D).
    """

    node: ir.Node
    weight: ir.Value
    indices: ir.Value
    axes: Axes

    @property
    def name(self) -> str:
        """The weight's name: the same in every graph."""
        return str(self.weight.name)

    @property
    def width(self) -> int:
        """D."""
        return int(tensor_of(self.weight).shape.numpy()[1])


def embedding_tables(graph: ir.Graph) -> Iterator[EmbeddingTable]:
    """The lookups in constant float32 tables of at least _SMALLEST_TABLE numbers, in the order of the graph."""
    for node in graph:
        if node.op_type != "Gather" or node.domain not in ("", "ai.onnx"):
            continue
        axis = node.attributes.get("axis")
        weight, indices = node.inputs
        axes = axes_of(node.outputs[0])
        if weight is None or indices is None or axes is None or (axis is not None and axis.as_int() != 0):
            continue
        if not is_float_constant(weight, rank=2) or stack_of(weight.const_value) is not None:
            continue
        table = EmbeddingTable(node, weight, indices, axes)
        if table.width >= _NARROWEST and tensor_of(weight).size >= _SMALLEST_TABLE:
            yield table


class TableWeights:
    """Converts the tables of one variant, each once however many graphs read it."""

    def __init__(self, bits: Bits) -> None:
        self._bits: Bits = bits
        self._made: dict[tuple[str, Bits], QuantizedWeight] = {}

    def convert(self, model: ir.Model, kept: frozenset[str]) -> tuple[str, ...]:
        """Convert the tables of a graph in place.

        Args:
            kept: names of tables that stay float32; in 4 bits, that take 8.

        Returns:
            The names of those that were converted.
        """
        edit = Edit(model.graph)
        there: dict[str, tuple[ir.Value, ir.Value]] = {}
        converted: list[str] = []
        for table in list(embedding_tables(model.graph)):
            if table.name in kept and self._bits == 8:
                continue
            bits: Bits = 8 if table.name in kept or table.width % 2 else self._bits
            if table.name not in there:
                found = self._of(table, bits)
                values, scales = (
                    edit.initializer(tensor, name=str(tensor.name)) for tensor in (found.values, found.scales)
                )
                there[table.name] = values, scales
            look_up = _look_up_rows if bits == 8 else _look_up_blocks
            edit.replace(table.node.outputs[0], look_up(edit, table, *there[table.name]))
            if bits == 4:
                model.opset_imports[CONTRIB_DOMAIN] = 1
            converted.append(table.name)
        edit.done()
        return tuple(dict.fromkeys(converted))

    def _of(self, table: EmbeddingTable, bits: Bits) -> QuantizedWeight:
        key = (table.name, bits)
        if key not in self._made:
            weight = np.asarray(tensor_of(table.weight).numpy(), np.float32)
            name = f"{table.name}.rows8" if bits == 8 else f"{table.name}.rows4"
            if bits == 8:
                values, scales = quantize_rows(weight, largest=_LARGEST)
            else:
                blocks, scales = quantize_blocks(weight, bits=4, block=_BLOCK)
                values = blocks.reshape(len(weight), -1)[:, : table.width // 2]
            self._made[key] = QuantizedWeight(
                ir.tensor(np.ascontiguousarray(values), name=name),
                ir.tensor(scales.reshape(len(weight), -1), name=f"{name}.scales"),
            )
        return self._made[key]


def _look_up_rows(edit: Edit, table: EmbeddingTable, values: ir.Value, scales: ir.Value) -> ir.Value:
    name, axes = str(table.node.name), table.axes
    steps = edit.add(
        "Gather", [values, table.indices], axes, name=f"{name}.steps", dtype=ir.DataType.INT8, axis=0
    )
    floats = edit.add("Cast", [steps], axes, name=f"{name}.floats", to=int(ir.DataType.FLOAT))
    own = edit.add("Gather", [scales, table.indices], (*axes[:-1], 1), name=f"{name}.scales", axis=0)
    return edit.add("Mul", [floats, own], axes, name=f"{name}.rows")


def _look_up_blocks(edit: Edit, table: EmbeddingTable, values: ir.Value, scales: ir.Value) -> ir.Value:
    return edit.add(
        "GatherBlockQuantized",
        [values, table.indices, scales],
        table.axes,
        name=f"{table.node.name}.blocks",
        domain=CONTRIB_DOMAIN,
        bits=4,
        block_size=_BLOCK,
        gather_axis=0,
        quantize_axis=1,
    )
