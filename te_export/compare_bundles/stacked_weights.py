"""Taking stacks apart: `experts.0.layer.weight+2` is the weights of three experts, one after another.

    experts.0.layer.weight.turned+2 (3, 16, 8)  →  experts.{0,1,2}.layer.weight (8, 16), each stored turned

A graph names a stack by its first layer. Where one number of the names counts experts from 0 without gap or overlap,
the names of the others follow from it; where not, a piece keeps the name of the stack and its place in it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace

from te_export.compare_bundles.graph_file import GraphFile
from te_export.compare_bundles.stored_tensor import StoredTensor

__all__ = ["take_apart"]

_STACK = re.compile(r"(?P<first>.+)\+(?P<more>\d{1,6})(?:#\d+)?")
_AGAIN = re.compile(r"#\d+$")
_TURNED = ".turned"
_EXPERT_NUMBERS = re.compile(r"(?:expert|component)[a-z_]*((?:[._]?\d+)+)", re.IGNORECASE)
_MANY = 1024


@dataclass(frozen=True)
class _Stack:
    """Some layers' weights in one tensor; one layer's own where `count` is 1."""

    key: str
    first: str
    count: int
    tensor: StoredTensor


@dataclass(frozen=True)
class _Numbered:
    """A name around one of its numbers."""

    before: str
    number: int
    after: str

    def at(self, step: int) -> str:
        return f"{self.before}{self.number + step}{self.after}"


def take_apart(
    graphs: Iterable[GraphFile], unused: Collection[str] = ()
) -> dict[str, tuple[tuple[str, StoredTensor], ...]]:
    """Name and tensor of each layer's own weight, for every weight of some graphs.

    Args:
        graphs: those that hold the whole model together.
        unused: parameters that no graph has, whose numbers are taken all the same.

    Returns:
        By the weight's name in the graphs.
    """
    stacks: dict[str, _Stack] = {}
    for graph in graphs:
        for key, tensor in graph.weights.items():
            if key not in stacks:
                stacks[key] = _read(graph, key, tensor)
    valid = _countable(stacks.values(), unused)
    return {key: tuple(_pieces(stack, valid)) for key, stack in stacks.items()}


def _read(graph: GraphFile, key: str, tensor: StoredTensor) -> _Stack:
    found = _STACK.fullmatch(key)
    count = int(found["more"]) + 1 if found else 1
    if found is None or not 1 < count <= _MANY or not _is_equal_split(graph, key, tensor, count):
        return _Stack(key, _AGAIN.sub("", key), 1, tensor)
    return _Stack(key, found["first"], count, tensor)


def _is_equal_split(graph: GraphFile, key: str, tensor: StoredTensor, count: int) -> bool:
    """Whether the first axis counts the layers, or what the layer gives is cut into `count` equal pieces."""
    if not tensor.shape or tensor.shape[0] % count:
        return False
    if len(tensor.shape) == 3:
        return tensor.shape[0] == count
    width = tensor.shape[0] // count
    readers = [node for node in graph.nodes if node.op_type == "Gemm" and key in node.input[1:]]
    return len(readers) == 1 and _cut_after(graph, readers[0].output[0]) == (width,) * count


def _cut_after(graph: GraphFile, value: str) -> tuple[int, ...]:
    """The widths that a value, or its activation, is cut into; empty if it is not."""
    for _ in range(3):
        readers = [node for node in graph.nodes if value in node.input]
        if len(readers) != 1:
            return ()
        (node,) = readers
        sizes = graph.constants.get(node.input[1], ()) if len(node.input) > 1 else ()
        if node.op_type == "Split":
            return sizes
        if node.op_type == "Reshape":
            return (sizes[2],) * sizes[1] if len(sizes) == 3 and 0 < sizes[1] <= _MANY else ()
        if len(node.input) != 1 or len(node.output) != 1:
            return ()
        value = node.output[0]
    return ()


def _countable(stacks: Iterable[_Stack], unused: Collection[str]) -> set[tuple[str, str]]:
    """The names around a number that counts from 0 without gap or overlap."""
    ranges: dict[tuple[str, str], set[tuple[int, int]]] = {}
    for first, count in (*((s.first, s.count) for s in stacks), *((name, 1) for name in unused)):
        for place in _numbered(first):
            ranges.setdefault((place.before, place.after), set()).add((place.number, count))
    return {key for key, found in ranges.items() if _tiles(found)}


def _tiles(ranges: Iterable[tuple[int, int]]) -> bool:
    end = 0
    for start, count in sorted(ranges):
        if start != end:
            return False
        end += count
    return True


def _numbered(name: str) -> Iterator[_Numbered]:
    """The name around each number that may tell which expert it is of, outermost first."""
    found = _EXPERT_NUMBERS.search(name)
    if found is None:
        return
    for number in re.finditer(r"\d+", found[1]):
        start, stop = found.start(1) + number.start(), found.start(1) + number.end()
        yield _Numbered(name[:start], int(number[0]), name[stop:])


def _pieces(stack: _Stack, valid: Collection[tuple[str, str]]) -> Iterator[tuple[str, StoredTensor]]:
    if stack.count == 1:
        yield _plain(stack.first, stack.tensor)
        return
    place = next((found for found in _numbered(stack.first) if (found.before, found.after) in valid), None)
    for index in range(stack.count):
        piece = stack.tensor.slice(index, stack.count)
        name, tensor = _plain(stack.first if place is None else place.at(index), piece)
        yield (name if place is not None else f"{name}+{stack.count - 1}[{index}]"), tensor


def _plain(name: str, tensor: StoredTensor) -> tuple[str, StoredTensor]:
    """The name without what says that it is stored turned."""
    if name.endswith(_TURNED) and len(tensor.shape) == 2:
        return name.removesuffix(_TURNED), replace(tensor, turned=True)
    return name, tensor
