"""Graph files point into weights.bin by plain external data, or stand alone; the graph in memory is not touched."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx.external_data_helper import uses_external_data

from te_export.bundle.graph_file import WEIGHTS_NAME, linked_bytes, standalone_bytes, tensor_specs
from te_export.bundle.weights_file import SMALL_BYTES, WeightsLayout, plan_weights
from te_export.errors import OutputError
from te_export.partition import GraphSet


@pytest.fixture
def layout(graphs: GraphSet) -> WeightsLayout:
    return plan_weights([model.graph for model in graphs.models])


def external(data: bytes) -> dict[str, dict[str, str]]:
    proto = onnx.load_from_string(data)
    return {
        tensor.name: {entry.key: entry.value for entry in tensor.external_data}
        for tensor in proto.graph.initializer
        if uses_external_data(tensor)
    }


def test_large_initializers_are_references_in_the_graphs_own_folder(
    graphs: GraphSet, layout: WeightsLayout
) -> None:
    for model in graphs.models:
        found = external(linked_bytes(model, layout))

        expected = {name for name in model.graph.initializers if name in layout.places}
        assert found.keys() == expected
        for name, reference in found.items():
            offset, length = layout.places[name]
            assert reference == {"location": WEIGHTS_NAME, "offset": str(offset), "length": str(length)}


def test_small_initializers_stay_inside(graphs: GraphSet, layout: WeightsLayout) -> None:
    proto = onnx.load_from_string(linked_bytes(graphs.joint, layout))

    inside = [tensor for tensor in proto.graph.initializer if not uses_external_data(tensor)]
    assert inside
    for tensor in inside:
        assert onnx.numpy_helper.to_array(tensor).nbytes < SMALL_BYTES


def test_writing_leaves_the_graph_in_memory_as_it_was(graphs: GraphSet, layout: WeightsLayout) -> None:
    before = {name: value.const_value for name, value in graphs.joint.graph.initializers.items()}

    first = linked_bytes(graphs.joint, layout)

    after = graphs.joint.graph.initializers
    assert list(after) == list(before)
    for name, tensor in before.items():
        assert after[name].const_value is tensor
    assert linked_bytes(graphs.joint, layout) == first


def test_an_error_while_writing_leaves_the_graph_in_memory_as_it_was(
    graphs: GraphSet, layout: WeightsLayout, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {name: value.const_value for name, value in graphs.joint.graph.initializers.items()}

    def fail(model: ir.Model) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ir, "to_proto", fail)
    with pytest.raises(KeyboardInterrupt):
        linked_bytes(graphs.joint, layout)

    for name, tensor in before.items():
        assert graphs.joint.graph.initializers[name].const_value is tensor


def test_a_standalone_graph_has_every_value_inside(graphs: GraphSet) -> None:
    graph = graphs.tasks["task_0"]
    data = standalone_bytes(graph, "task_0")

    assert external(data) == {}
    proto = onnx.load_from_string(data)
    values = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    assert values.keys() == graph.graph.initializers.keys()
    for name, value in graph.graph.initializers.items():
        assert value.const_value is not None
        assert np.array_equal(values[name], value.const_value.numpy())


class HugeTensor(ir.Tensor):
    """A tensor that says it is 2 GiB large."""

    @property
    def nbytes(self) -> int:
        return 2**31 - 1


def test_a_standalone_graph_of_two_gib_is_refused_with_its_size(graphs: GraphSet) -> None:
    graph = graphs.tasks["task_0"].graph
    graph.initializers["backbone.network.0.weight"].const_value = HugeTensor(np.zeros((48, 20), np.float32))

    with pytest.raises(OutputError, match=r"--standalone: fp32/standalone-a\.onnx has 2\.00 GiB"):
        standalone_bytes(graphs.tasks["task_0"], "fp32/standalone-a.onnx")


def test_specs_keep_names_and_symbolic_shapes(graphs: GraphSet) -> None:
    (spec, *_) = tensor_specs(list(graphs.joint.graph.outputs))

    assert (spec.name, spec.dtype, spec.shape) == ("task_0.prediction", "float32", ("batch", 4))
