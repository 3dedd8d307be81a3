"""A graph that is added reads the tensors of the others, and takes no name of theirs for something else."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from te_export.pruning.shared_weights import SharedWeights, share_weights, shared_weights
from te_export.rewrite.stack import Part, stack_of, stack_tensors

SUFFIX = ".pruned-t"


def array(seed: int, shape: tuple[int, int] = (3, 4)) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def stack(name: str, parts: dict[str, np.ndarray]) -> ir.TensorProtocol:
    axes = [sum(len(part) for part in parts.values()), 4]
    return stack_tensors(name, [Part(key, ir.tensor(part)) for key, part in parts.items()], axes)


def graph_of(**tensors: ir.TensorProtocol) -> ir.Graph:
    graph = ir.Graph([], [], nodes=[], opset_imports={"": 18})
    for name, tensor in tensors.items():
        tensor.name = name
        graph.register_initializer(ir.Value(name=name, const_value=tensor))
    return graph


def model_of(graph: ir.Graph) -> ir.Model:
    return ir.Model(graph, ir_version=10)


def test_parts_are_numbered_with_gaps_between_stacks() -> None:
    first = graph_of(
        s=stack("s", {"a": array(0), "b": array(1)}), w=ir.tensor(array(2)), r=stack("r", {"c": array(3)})
    )
    second = graph_of(q=stack("q", {"b": array(1), "d": array(4)}))
    found = shared_weights([first, second])
    assert list(found.tensors) == ["a", "b", "w", "c", "d"]
    places = found.laid_out
    assert places["b"] == places["a"] + 1
    assert abs(places["c"] - places["b"]) > 1
    assert abs(places["d"] - places["b"]) > 1, "b lies in the first stack that holds it"
    assert "w" not in places


def test_what_is_alike_is_the_same_tensor() -> None:
    shared = shared_weights([graph_of(w=ir.tensor(array(0)), s=stack("s", {"a": array(1), "b": array(2)}))])
    model = model_of(graph_of(w=ir.tensor(array(0)), a=ir.tensor(array(1)), new=ir.tensor(array(5))))
    assert share_weights(model, shared, suffix=SUFFIX) == {}
    initializers = model.graph.initializers
    assert list(initializers) == ["w", "a", "new"]
    assert initializers["w"].const_value is shared.tensors["w"]
    assert initializers["a"].const_value is shared.tensors["a"]


@pytest.mark.parametrize("other", [array(7), array(0, (4, 3)), array(0).astype(np.float16)])
def test_another_tensor_gets_another_name(other: np.ndarray) -> None:
    shared = shared_weights([graph_of(w=ir.tensor(array(0)))])
    model = model_of(graph_of(w=ir.tensor(other)))
    assert share_weights(model, shared, suffix=SUFFIX) == {f"w{SUFFIX}": "w"}
    assert list(model.graph.initializers) == [f"w{SUFFIX}"]
    found = model.graph.initializers[f"w{SUFFIX}"].const_value
    assert found is not None
    assert np.array_equal(found.numpy(), other)


def test_a_stack_gets_a_name_of_its_own_and_shares_its_parts() -> None:
    shared = shared_weights([graph_of(s=stack("s", {"a": array(0), "b": array(1), "c": array(2)}))])
    model = model_of(graph_of(s=stack("s", {"a": array(0), "c": array(9)})))
    assert share_weights(model, shared, suffix=SUFFIX) == {f"s{SUFFIX}": "s"}
    found = stack_of(model.graph.initializers[f"s{SUFFIX}"].const_value)
    assert found is not None
    assert [part.name for part in found.parts] == ["a", f"c{SUFFIX}"], "c is another tensor here"
    assert found.parts[0].tensor is shared.tensors["a"]
    assert np.array_equal(np.asarray(found), np.concatenate([array(0), array(9)]))


@pytest.mark.parametrize("shares_plain", [False, True])
def test_a_weight_that_the_others_have_turned_is_turned(shares_plain: bool) -> None:
    weight = array(0)
    tensors: dict[str, ir.TensorProtocol] = {"w.turned": ir.tensor(np.ascontiguousarray(weight.T))}
    if shares_plain:
        tensors["w"] = ir.tensor(weight)
    graph = graph_of(w=ir.tensor(weight))
    x = ir.Value(name="x", shape=ir.Shape(["batch", 4]), type=ir.TensorType(ir.DataType.FLOAT))
    node = ir.Node("", "Gemm", [x, graph.initializers["w"]], attributes=[ir.AttrInt64("transB", 1)], name="n")
    node.outputs[0].name, node.outputs[0].shape = "y", ir.Shape(["batch", 3])
    graph.inputs.append(x)
    graph.append(node)
    graph.outputs.append(node.outputs[0])
    graph.initializers["w"].shape = ir.Shape([3, 4])
    made = share_weights(model_of(graph), SharedWeights(tensors, {}), suffix=SUFFIX)
    assert made == ({} if shares_plain else {"w.turned": "w"})
    assert list(graph.initializers) == (["w"] if shares_plain else ["w.turned"])
    assert graph.initializers[next(iter(graph.initializers))].const_value in tensors.values()
    assert node.attributes["transB"].as_int() == int(shares_plain)
