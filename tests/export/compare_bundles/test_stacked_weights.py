"""Taking stacks apart: which layer each piece is of, and where nothing is said rather than something wrong."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper

from te_export.compare_bundles.graph_file import GraphFile
from te_export.compare_bundles.stacked_weights import take_apart
from te_export.compare_bundles.stored_tensor import StoredTensor


def tensor(*shape: int) -> StoredTensor:
    values = np.arange(np.prod(shape, dtype=int), dtype=np.float32)
    return StoredTensor("FLOAT", shape, inside=values.tobytes())


def graph(
    weights: dict[str, StoredTensor],
    nodes: list[onnx.NodeProto] | None = None,
    constants: dict[str, tuple[int, ...]] | None = None,
) -> GraphFile:
    return GraphFile("fp32/trunk.onnx", weights, constants or {}, {}, tuple(nodes or ()), "")


def names(*graphs: GraphFile, unused: tuple[str, ...] = ()) -> dict[str, list[str]]:
    return {key: [name for name, _ in pieces] for key, pieces in take_apart(graphs, unused).items()}


def test_a_weight_alone_keeps_its_name() -> None:
    found = names(graph({"backbone.0.weight": tensor(4, 3), "experts.0.bias#2": tensor(4)}))

    assert found == {"backbone.0.weight": ["backbone.0.weight"], "experts.0.bias#2": ["experts.0.bias"]}


def test_the_first_axis_of_a_cube_counts_layers() -> None:
    stack = tensor(3, 2, 4)

    ((found),) = take_apart([graph({"experts.0.fc.3.weight.turned+2": stack})]).values()

    assert [name for name, _ in found] == [f"experts.{index}.fc.3.weight" for index in range(3)]
    assert [piece.layer_shape for _, piece in found] == [(4, 2)] * 3
    assert found[1][1].inside == np.arange(8, 16, dtype=np.float32).tobytes()


@pytest.mark.parametrize(
    ("cut", "constants"),
    [
        (["Split", "s", "sizes"], {"sizes": (2, 2, 2)}),
        (["Reshape", "s", "shape"], {"shape": (-1, 3, 2)}),
    ],
)
@pytest.mark.parametrize("activation", [True, False])
def test_rows_are_cut_where_the_graph_cuts_them(
    cut: list[str], constants: dict[str, tuple[int, ...]], activation: bool
) -> None:
    nodes = [helper.make_node("Gemm", ["h", "experts.0.w+2", "experts.0.b+2"], ["g"], transB=1)]
    nodes += [helper.make_node("Relu", ["g"], ["s"])] if activation else []
    if not activation:
        cut = [cut[0], "g", cut[2]]
    nodes.append(helper.make_node(cut[0], cut[1:], ["a", "b", "c"] if cut[0] == "Split" else ["a"]))
    weights = {"experts.0.w+2": tensor(6, 5), "experts.0.b+2": tensor(6)}

    found = names(graph(weights, nodes, constants))

    assert found["experts.0.w+2"] == ["experts.0.w", "experts.1.w", "experts.2.w"]
    assert found["experts.0.b+2"] == ["experts.0.b", "experts.1.b", "experts.2.b"]


def test_rows_of_unequal_layers_stay_together() -> None:
    nodes = [
        helper.make_node("Gemm", ["h", "experts.0.w+2"], ["s"], transB=1),
        helper.make_node("Split", ["s", "sizes"], ["a", "b", "c"], axis=1),
    ]

    found = names(graph({"experts.0.w+2": tensor(6, 5)}, nodes, {"sizes": (1, 2, 3)}))

    assert found == {"experts.0.w+2": ["experts.0.w+2"]}


@pytest.mark.parametrize(
    ("weights", "unused"),
    [
        ({"experts.0.w+1": 2, "experts.1.w": 1}, ()),  # the second of the stack is not expert 1
        ({"experts.0.w+1": 2, "experts.1.w+1": 2}, ()),
        ({"experts.2.w+2": 3}, ()),  # in another order, or not all
        ({"experts.0.w+1": 2}, ("experts.1.w",)),
        ({"layers.0.w+1": 2}, ()),
    ],
)
def test_names_that_do_not_follow_are_not_guessed(weights: dict[str, int], unused: tuple[str, ...]) -> None:
    shapes = {key: tensor(count, 2, 2) if count > 1 else tensor(2, 2) for key, count in weights.items()}

    found = names(graph(shapes), unused=unused)

    key = next(iter(weights))
    first, more = key.split("+")
    assert found[key] == [f"{first}+{more}[{index}]" for index in range(int(more) + 1)]


def test_stacks_beside_one_another_are_counted_through() -> None:
    shapes = {"experts.0.w+1": tensor(2, 2, 2), "experts.2.w+1": tensor(2, 2, 2), "experts.4.w": tensor(2, 2)}

    found = names(graph(shapes))

    assert found["experts.0.w+1"] == ["experts.0.w", "experts.1.w"]
    assert found["experts.2.w+1"] == ["experts.2.w", "experts.3.w"]


def test_the_number_that_counts_is_found_among_two() -> None:
    of_tasks = {f"experts_task.{task}.0.w+1": tensor(2, 2, 2) for task in range(3)}

    found = names(graph(of_tasks))

    assert found["experts_task.1.0.w+1"] == ["experts_task.1.0.w", "experts_task.1.1.w"]
