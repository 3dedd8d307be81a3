"""The transformation, in float64: a pruned graph is the task graph whose removed experts answer their means."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

from te_export.capture.joint_graph import EXPERT_FEATURES, JointGraph
from te_export.capture.opset import newest_opset
from te_export.capture.torch_capture import capture
from te_export.errors import StructureError
from te_export.models.exportable import ExportableModel
from te_export.partition import PREDICTION, ROUTING_WEIGHTS, cut_task, partition
from te_export.pruning.means_trial import Means
from te_export.pruning.mixture import Mixture, find_mixtures
from te_export.pruning.prune_experts import PrunedModel, prune_experts
from te_export.rewrite.rewrite import rewrite_alone
from te_export.verify.structure import check_pruned_structure
from te_runtime.manifest import OptimizeLevel, TargetProvider

TASK = "task_0"
ROUNDED_ONCE = 64 * 2.0**-24
"""Means, one bias and, once rewritten, folded weights are rounded to float32 once each (2^-24), and at most 64
terms of size 1 are summed."""

MakeCaptured = Callable[..., JointGraph]


@pytest.fixture(scope="module")
def model_of(make_model: Callable[..., object], load: Callable[..., ExportableModel]) -> MakeCaptured:
    """`model_of(num_experts)`: a model and its capture, made once for each count."""
    made: dict[int, tuple[ExportableModel, JointGraph]] = {}

    def captured(count: int) -> tuple[ExportableModel, JointGraph]:
        if count not in made:
            exportable = load(make_model(seed=count, num_experts=count).state_dict())  # type: ignore[attr-defined]
            made[count] = (exportable, capture(exportable, newest_opset()))
        return made[count]

    return captured  # type: ignore[return-value]


def evaluate(model: ir.Model, feeds: dict[str, NDArray[np.float64]]) -> list[NDArray[np.float64]]:
    """Every operator in float64 on the float32 weights."""
    proto: onnx.ModelProto = ir.to_proto(model)
    for tensor in proto.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT:
            exact = numpy_helper.to_array(tensor).astype(np.float64)
            tensor.CopyFrom(numpy_helper.from_array(exact, tensor.name))
    return ReferenceEvaluator(proto).run(None, feeds)


def rows(batch: int, seed: int = 3) -> dict[str, NDArray[np.float64]]:
    return {"x": np.random.default_rng(seed).standard_normal((batch, 20))}


def some_means(experts: Sequence[int], width: int = 8) -> Means:
    rng = np.random.default_rng(9)
    return {expert: rng.standard_normal(width) for expert in experts}


def expected(captured: JointGraph, means: Means, batch: int) -> list[NDArray[np.float64]]:
    """Trunk and tail as captured, with the means put between them."""
    graphs = partition(captured)
    (features,) = evaluate(graphs.trunk, rows(batch))
    return evaluate(graphs.tails[TASK], {EXPERT_FEATURES: with_means(features, means)})


def with_means(features: NDArray[np.float64], means: Means) -> NDArray[np.float64]:
    replaced = features.copy()
    for expert, mean in means.items():
        replaced[:, expert] = mean
    return replaced


def mixture_of(graph: ir.Graph) -> Mixture:
    (found,) = find_mixtures(graph)
    return found


def pruned_of(captured: JointGraph, means: Means) -> PrunedModel:
    found = prune_experts(cut_task(captured, TASK), 0, means, task=TASK)
    assert isinstance(found, PrunedModel)
    return found


def as_joint(captured: JointGraph, pruned: PrunedModel) -> JointGraph:
    sources = {**captured.sources, **pruned.sources}
    return JointGraph(model=pruned.model, tasks=(TASK,), opset=captured.opset, sources=sources)


def assert_near(found: Sequence[NDArray[np.float64]], exact: Sequence[NDArray[np.float64]]) -> None:
    for values, wanted in zip(found, exact, strict=True):
        assert values.shape == wanted.shape
        assert np.abs(values - wanted).max() <= ROUNDED_ONCE * max(1.0, np.abs(wanted).max())


@pytest.mark.parametrize(
    ("count", "removed"),
    [
        (2, (0,)),
        (2, (1,)),
        (3, (1,)),
        (5, (0, 4)),
        (5, (1, 2)),
        (5, (0, 1, 2, 4)),
        (8, (2, 5)),
        (8, (0, 1, 6, 7)),
    ],
)
@pytest.mark.parametrize("level", ["none", "exact"])
def test_it_is_the_function_with_the_means_in_place(
    model_of: MakeCaptured, count: int, removed: tuple[int, ...], level: OptimizeLevel
) -> None:
    model, captured = model_of(count)
    means = some_means(removed)
    graph = as_joint(captured, pruned_of(captured, means))
    found = rewrite_alone(graph, provider="cpu", level=level, laid_out={})
    check_pruned_structure(found, removed, model, captured)
    for batch in (1, 2, 7):
        assert_near(evaluate(found.model, rows(batch)), expected(captured, means, batch))


@pytest.mark.parametrize("provider", ["cpu", "cuda"])
def test_rewrites_shape_it_for_either_provider(model_of: MakeCaptured, provider: TargetProvider) -> None:
    model, captured = model_of(8)
    means = some_means((2, 5))
    found = rewrite_alone(
        as_joint(captured, pruned_of(captured, means)), provider=provider, level="exact", laid_out={}
    )
    check_pruned_structure(found, (2, 5), model, captured)
    assert_near(evaluate(found.model, rows(7)), expected(captured, means, 7))
    assert len(found.model.graph) < len(pruned_of(captured, means).model.graph)


def test_the_task_graph_stays_as_it_was(model_of: MakeCaptured) -> None:
    _, captured = model_of(5)
    cut = cut_task(captured, TASK)
    before = ir.to_proto(cut).SerializeToString(deterministic=True)
    assert isinstance(prune_experts(cut, 0, some_means((1,)), task=TASK), PrunedModel)
    assert ir.to_proto(cut).SerializeToString(deterministic=True) == before


def test_kept_weights_are_the_same_tensors_and_removed_ones_are_gone(model_of: MakeCaptured) -> None:
    _, captured = model_of(5)
    initializers = pruned_of(captured, some_means((1, 3))).model.graph.initializers
    for expert in range(5):
        name = f"experts.{expert}.network.0.weight"
        assert (name in initializers) == (expert not in (1, 3))
    kept = initializers["experts.4.network.0.weight"].const_value
    assert kept is captured.model.graph.initializers["experts.4.network.0.weight"].const_value
    assert "gating_networks.0.gate.0.weight" not in initializers
    assert initializers[f"gating_networks.0.gate.0.weight.pruned-{TASK}"].const_value.shape.numpy() == (8, 24)


def test_outputs_keep_name_and_shape(model_of: MakeCaptured) -> None:
    _, captured = model_of(5)
    outputs = pruned_of(captured, some_means((0, 1, 2, 3))).model.graph.outputs
    assert [(value.name, list(value.shape)[1]) for value in outputs] == [
        (PREDICTION, 4),
        (ROUTING_WEIGHTS, 5),
    ]


def test_two_layers_that_read_the_features_are_both_cut(model_of: MakeCaptured) -> None:
    """A gate whose logits are the sum of two layers: both fold the means."""
    _, captured = model_of(3)
    cut = cut_task(captured, TASK)
    mixture = mixture_of(cut.graph)
    (first,) = mixture.gate
    twin = ir.Node("", "Gemm", [first.x, first.weight], attributes=[ir.AttrInt64("transB", 1)], name="twin")
    both = ir.Node("", "Add", [first.y, twin.outputs[0]], name="both")
    for node in (twin, both):
        node.outputs[0].name = f"{node.name}:0"
        node.outputs[0].shape, node.outputs[0].type = first.y.shape, first.y.type
    readers = [use.node for use in first.y.uses() if use.node is not both]
    cut.graph.insert_after(first.node, [twin, both])
    for reader in readers:
        reader.replace_input_with(0, both.outputs[0])
    means = some_means((1,))
    found = prune_experts(cut, 0, means, task=TASK)
    assert isinstance(found, PrunedModel)
    (features,) = evaluate(partition(captured).trunk, rows(5))
    tail = ir.Model(
        ir.convenience.extract(cut.graph, [str(mixture.features.name)], [PREDICTION, ROUTING_WEIGHTS]),
        ir_version=cut.ir_version,
    )
    wanted = evaluate(tail, {str(mixture.features.name): with_means(features, means)})
    assert_near(evaluate(found.model, rows(5)), wanted)


def test_all_experts_may_not_go(model_of: MakeCaptured) -> None:
    _, captured = model_of(2)
    found = prune_experts(cut_task(captured, TASK), 0, some_means((0, 1)), task=TASK)
    assert found == "all 2 experts would go, and one must stay"


def test_means_that_float32_cannot_hold_are_declined(model_of: MakeCaptured) -> None:
    _, captured = model_of(3)
    for value in (1e39, np.nan, np.inf):
        found = prune_experts(cut_task(captured, TASK), 0, {0: np.full(8, value)}, task=TASK)
        assert found == "the mean outputs of the experts pass the largest float32"


def no_fusion(captured: JointGraph) -> ir.Graph:
    return partition(captured).trunk.graph


def features_read_elsewhere(captured: JointGraph) -> ir.Graph:
    graph = cut_task(captured, TASK).graph
    mixture = mixture_of(graph)
    relu = ir.Node("", "Relu", [mixture.features], name="other")
    relu.outputs[0].name = "other"
    graph.append(relu)
    graph.outputs.append(relu.outputs[0])
    return graph


def gate_without_constant(captured: JointGraph) -> ir.Graph:
    graph = cut_task(captured, TASK).graph
    mixture = mixture_of(graph)
    mixture.gate[0].node.attributes["alpha"] = ir.AttrFloat32("alpha", 2.0)
    return graph


def other_weights(captured: JointGraph) -> ir.Graph:
    graph = cut_task(captured, TASK).graph
    graph.outputs[1].name = "something"
    return graph


@pytest.mark.parametrize("make", [no_fusion, features_read_elsewhere, gate_without_constant, other_weights])
def test_another_structure_is_declined(
    model_of: MakeCaptured, make: Callable[[JointGraph], ir.Graph]
) -> None:
    _, captured = model_of(3)
    assert find_mixtures(make(captured)) == ()


def test_an_expert_that_is_still_read_is_found(model_of: MakeCaptured) -> None:
    model, captured = model_of(5)
    graph = as_joint(captured, pruned_of(captured, some_means((1,))))
    with pytest.raises(
        StructureError, match=r"6 parameters of experts that are gone are still read: experts\.3"
    ):
        check_pruned_structure(graph, (1, 3), model, captured)


def test_an_expert_that_was_lost_is_found(model_of: MakeCaptured) -> None:
    model, captured = model_of(5)
    graph = as_joint(captured, pruned_of(captured, some_means((1, 3))))
    with pytest.raises(StructureError, match=r"6 of \d+ parameters do not reach the prediction of task_0"):
        check_pruned_structure(graph, (1,), model, captured)
