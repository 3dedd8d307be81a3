"""What a trace computes twice is computed once.

A module that is asked task by task computes its trunk for each of them.

    a = op(x, w);  b = op(x, w)          b is a
"""

from __future__ import annotations

import torch
from torch.fx import Node

__all__ = ["merge_same_nodes"]


def merge_same_nodes(graph: torch.fx.Graph) -> int:
    """Merge nodes of equal operator and arguments, in place; how many went. Every operator must be functional."""
    seen: dict[object, Node] = {}
    merged = 0
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        key = (node.target, _key(node.args), _key(node.kwargs))
        first = seen.setdefault(key, node)
        if first is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)
            merged += 1
    return merged


def _key(value: object) -> object:
    """Something hashable that is equal exactly where the arguments are; 1, 1.0 and True are not."""
    if isinstance(value, list | tuple):
        return ("list", *map(_key, value))
    if isinstance(value, dict):
        return ("dict", *((name, _key(part)) for name, part in sorted(value.items())))
    if isinstance(value, Node):
        return value
    return (type(value), repr(value))
