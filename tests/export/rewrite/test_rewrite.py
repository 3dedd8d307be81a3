"""All rules together: on graphs of any module, on TaskExpert models of any shape, before and after the cut."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, Literal

import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from te_export.bundle.graph_file import standalone_bytes
from te_export.bundle.weights_file import plan_weights
from te_export.capture.joint_graph import JointGraph
from te_export.capture.opset import newest_opset
from te_export.capture.torch_capture import capture
from te_export.models.exportable import ExportableModel
from te_export.partition import GraphSet, partition
from te_export.rewrite import batching_policy
from te_export.rewrite.graph_cost import measure_cost
from te_export.rewrite.log import RewriteLog
from te_export.rewrite.rewrite import rewrite, rewrite_cut
from te_export.rewrite.stack import stack_of
from te_export.verify.structure import check_structure

Provider = Literal["cpu", "cuda"]
PROVIDERS: tuple[Provider, ...] = ("cpu", "cuda")


def rewritten(captured: JointGraph, provider: Provider) -> tuple[GraphSet, RewriteLog]:
    before = rewrite(captured, provider=provider, level="exact")
    return rewrite_cut(partition(before.graph), captured, before.log, provider=provider, level="exact")


def joint_of(graph: ir.Graph, tasks: int) -> JointGraph:
    """A graph of nets.py as a captured one: outputs renamed as capture names them."""
    for value in graph.outputs:
        name = str(value.name)
        if name[0] in "wy":
            value.name = f"task_{name[1:]}." + ("routing_weights" if name[0] == "w" else "prediction")
    names = tuple(f"task_{task}" for task in range(tasks))
    return JointGraph(model=ir.Model(graph, ir_version=10), tasks=names, opset=21)


def assert_all_same(nets: ModuleType, captured: JointGraph, graphs: GraphSet, *, tolerance: float) -> None:
    """Every graph against its cut of the captured graph, in float64."""
    expected = partition(captured)
    nets.assert_same(expected.joint.graph, graphs.joint.graph, tolerance=tolerance)
    nets.assert_same(expected.trunk.graph, graphs.trunk.graph, tolerance=tolerance)
    assert (graphs.joint_tails is None) == (len(captured.tasks) == 1)
    if graphs.joint_tails is not None:
        nets.assert_same(expected.joint_tails.graph, graphs.joint_tails.graph, tolerance=tolerance)
    for task in captured.tasks:
        nets.assert_same(expected.tasks[task].graph, graphs.tasks[task].graph, tolerance=tolerance)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("apart", [False, True])
def test_a_mixture_of_any_names_is_rewritten_whole(
    nets: ModuleType, provider: Provider, apart: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if apart:  # as if the layers were large
        monkeypatch.setattr(batching_policy, "SMALL_WEIGHTS", 0)
    captured = joint_of(nets.mixture(), 3)
    untouched = standalone_bytes(captured.model, "captured")

    graphs, log = rewritten(captured, provider)

    assert standalone_bytes(captured.model, "captured") == untouched
    rules = {entry.rule for entry in log.applied}
    assert {"fold_linears", "stack_linears", "assemble_experts", "fuse_experts", "block_gates"} <= rules
    assert ("batch_linears" in rules) == (provider == "cuda" or not apart)
    counts = nets.operators(graphs.joint.graph)
    assert counts["Softmax"] == 1
    if provider == "cuda":
        assert (counts["Gemm"], counts["MatMul"]) == (
            3,
            5,
        )  # a; experts; gates | experts, gates, fusion, heads
    assert_all_same(nets, captured, graphs, tolerance=nets.FOLDED)
    assert_same_tails(nets, graphs)


def assert_same_tails(nets: ModuleType, graphs: GraphSet) -> None:
    """The joint tails are what the joint graph does after the trunk, but for how the experts are laid out between."""
    views = {"Reshape", "Transpose", "Concat", "Split", "Squeeze", "Unsqueeze"}
    joint, trunk, tails = (
        {name: count for name, count in nets.operators(model.graph).items() if name not in views}
        for model in (graphs.joint, graphs.trunk, graphs.joint_tails)
    )
    assert tails == {name: left for name, count in joint.items() if (left := count - trunk.get(name, 0))}


@pytest.mark.parametrize("provider", PROVIDERS)
def test_rewriting_again_changes_nothing(captured: JointGraph, provider: Provider) -> None:
    once = rewrite(captured, provider=provider, level="exact")
    twice = rewrite(once.graph, provider=provider, level="exact")

    assert twice.log.applied == ()
    assert standalone_bytes(twice.graph.model, "joint") == standalone_bytes(once.graph.model, "joint")
    assert twice.graph.sources == once.graph.sources
    graphs, log = rewritten(captured, provider)
    joint = standalone_bytes(graphs.joint, "joint")
    again, more = rewrite_cut(graphs, captured, RewriteLog(), provider=provider, level="exact")
    assert more.applied == ()
    assert standalone_bytes(again.joint, "joint") == joint
    assert log.applied


@pytest.mark.parametrize("provider", PROVIDERS)
def test_the_same_capture_gives_the_same_bytes(captured: JointGraph, provider: Provider) -> None:
    one, other = (rewritten(captured, provider)[0] for _ in range(2))

    for first, second in zip(one.models, other.models, strict=True):
        assert standalone_bytes(first, "graph") == standalone_bytes(second, "graph")


def test_none_leaves_every_graph_as_captured(captured: JointGraph) -> None:
    before = rewrite(captured, provider="cpu", level="none")
    cut = partition(before.graph)
    graphs, log = rewrite_cut(cut, captured, before.log, provider="cpu", level="none")

    assert before.graph is captured
    assert graphs is cut
    assert log == RewriteLog()


@pytest.mark.parametrize("provider", PROVIDERS)
def test_sources_name_the_parameters_in_everything_that_was_made(
    captured: JointGraph, exportable: ExportableModel, provider: Provider
) -> None:
    graphs, _ = rewritten(captured, provider)

    floats = {
        name: value.const_value
        for model in graphs.models
        for name, value in model.graph.initializers.items()
        if value.const_value is not None and not value.const_value.dtype.is_integer()
    }
    for name, tensor in floats.items():
        assert name in exportable.used_parameters or set(graphs.sources[name]) <= exportable.used_parameters
        stack = stack_of(tensor)
        if stack is not None:
            parts = [graphs.sources.get(part.name, (part.name,)) for part in stack.parts]
            assert set(graphs.sources[name]) == {source for part in parts for source in part}


@pytest.mark.parametrize("provider", PROVIDERS)
def test_no_weight_is_stored_twice(
    provider: Provider, make_model: Callable[..., Any], load: Callable[..., ExportableModel]
) -> None:
    sizes = {"backbone_dim": 64, "expert_dim": 32, "num_experts": 4, "task_output_dims": (16,) * 17}
    model = load(make_model(**sizes).state_dict())
    graphs, _ = rewritten(capture(model, newest_opset()), provider)

    layout = plan_weights([graph.graph for graph in graphs.models])
    padding = 4096 * len(layout.written)

    folded = 64 * 64 * 4  # the backbone's last weight is gone
    assert sum(tensor.nbytes for _, tensor in layout.written) <= model.parameter_bytes - folded
    assert layout.size_bytes <= model.parameter_bytes + padding


def test_the_log_says_what_was_gained(captured: JointGraph) -> None:
    graphs, log = rewritten(captured, "cpu")

    joint, task = log.costs
    assert (joint.graph, task.graph) == ("joint", "task-task_0")
    assert joint.after == measure_cost(graphs.joint.graph)
    assert joint.before == measure_cost(captured.model.graph)
    for costs in log.costs:
        assert costs.after.node_count < costs.before.node_count
        assert costs.after.multiply_adds < costs.before.multiply_adds
        assert costs.after.weight_bytes < costs.before.weight_bytes
    done = {(entry.rule, entry.where) for entry in log.applied}
    assert not done & {(entry.rule, entry.where) for entry in log.declined}


def test_costs_grow_linearly_with_the_tasks(nets: ModuleType) -> None:
    def cost(tasks: int, provider: Provider) -> tuple[int, int]:
        graphs, log = rewritten(joint_of(nets.mixture(tasks=tasks, outputs=(2,) * tasks), tasks), provider)
        assert graphs.joint is not None
        return log.costs[0].after.multiply_adds, log.costs[0].after.weight_bytes

    for provider in PROVIDERS:
        two, four, eight = (cost(tasks, provider) for tasks in (2, 4, 8))
        for index in range(2):
            assert eight[index] - four[index] == 2 * (four[index] - two[index])


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    tasks=st.integers(1, 4),
    count=st.integers(1, 4),
    outputs=st.lists(st.integers(1, 3), min_size=4, max_size=4),
    seed=st.integers(0, 1000),
    provider=st.sampled_from(PROVIDERS),
)
def test_any_shape_gives_the_same(
    nets: ModuleType, tasks: int, count: int, outputs: list[int], seed: int, provider: Provider
) -> None:
    captured = joint_of(nets.mixture(tasks=tasks, count=count, outputs=outputs, seed=seed), tasks)

    graphs, _ = rewritten(captured, provider)

    assert_all_same(nets, captured, graphs, tolerance=nets.FOLDED)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"final_relu": True},
        {"num_experts": 1, "task_output_dims": (1,)},
        {"task_output_dims": (2,) * 5, "num_experts": 2},
    ],
    ids=str,
)
def test_a_task_expert_keeps_gates_fusions_and_every_parameter(
    provider: Provider,
    sizes: dict[str, Any],
    make_model: Callable[..., Any],
    load: Callable[..., ExportableModel],
    nets: ModuleType,
) -> None:
    config = {"final_relu": True} if sizes.get("final_relu") else None
    model = load(make_model(**sizes).state_dict(), config=config)
    captured = capture(model, newest_opset())

    graphs, log = rewritten(captured, provider)

    check_structure(graphs, model, captured)
    assert any(entry.rule == "fold_linears" for entry in log.applied) != bool(config)
    assert_all_same(nets, captured, graphs, tolerance=nets.FOLDED)
