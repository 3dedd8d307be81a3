"""What reports say of layers: names in short and without loss, costs, and what was not measured."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from te_export.report.layer_figures import (
    LAYER_NUMBERS,
    costliest_layers,
    layer_meaning,
    layer_tables,
    weights_text,
)
from te_runtime.manifest import (
    AccuracyMetric,
    GraphSpec,
    LayerAccuracy,
    LayerLoss,
    Precision,
    TaskAccuracy,
    TensorSpec,
    Variant,
)

SPEC = TensorSpec("x", "float32", ("batch", 4))
EXPERTS = tuple(f"experts.{place}.fc.weight" for place in range(3))
SHARED = LayerAccuracy(EXPERTS, 3_072, None, "converted", LayerLoss("b", 0.75, 0.5, 0.02, 0.01))
KEPT = LayerAccuracy(("gates.1.weight",), 1_024, ("b",), "kept", LayerLoss("b", 0.75, 0.1, 0.02, 0.001))
UNMEASURED = LayerAccuracy(("gates.0.weight",), 1_024, ("a",), "converted", None)
PLAIN = LayerAccuracy(("odd.weight",), 20_000, None, "float32", None)


def variant(
    *layers: LayerAccuracy, precision: Precision = "int8", metric: AccuracyMetric = "accuracy"
) -> Variant:
    accuracy = TaskAccuracy(
        "b", "calibration data", 400, metric, 0.1, 0.5, None, None, None, 0.01, None, None
    )
    graph = GraphSpec(f"{precision}/joint.onnx", (SPEC,), (SPEC,))
    return Variant(
        precision=precision,
        form="dynamic",
        optimized="exact",
        target_provider="cpu",
        weights=f"{precision}/weights.bin",
        joint=graph,
        trunk=None,
        joint_tails=None,
        tasks=(),
        kept_weights=(),
        accuracy=(accuracy,),
        parity=(),
        layers=layers,
    )


def test_shared_layers_stand_apart_from_those_of_some_tasks() -> None:
    shared, own = layer_tables(variant(SHARED, UNMEASURED, KEPT, PLAIN))

    assert shared.title == "layers that every task reads"
    assert [dict(zip(shared.headings, row, strict=True)) for row in shared.rows] == [
        {
            "weights": "experts.{0…2}.fc.weight",
            "held in": "8 bits",
            "costs, points": "0.250",
            "of": "0.750",
            "task it costs most": "b",
            "costs, % of variance": "1.000",
            "parameters": "3,072",
        },
        {
            "weights": "odd.weight",
            "held in": "float32",
            "costs, points": "-",
            "of": "-",
            "task it costs most": "-",
            "costs, % of variance": "-",
            "parameters": "20,000",
        },
    ]
    assert own.title == "layers that some tasks read"
    first, second = (dict(zip(own.headings, row, strict=True)) for row in own.rows)
    assert (first["read by"], first["costs, points"], first["of"]) == ("a", "not measured", "-")
    assert (second["read by"], second["held in"]) == ("b", "float32, kept")
    assert set(LAYER_NUMBERS) <= set(own.headings)


def test_a_variant_without_layers_has_no_table() -> None:
    assert layer_tables(variant()) == ()
    (only,) = layer_tables(variant(KEPT))
    assert only.title == "layers that some tasks read"


def test_points_that_are_shares_of_variance_are_not_told_twice() -> None:
    (table,) = layer_tables(variant(SHARED, metric="relative error"))
    assert "costs, % of variance" not in table.headings
    assert "One row" not in layer_meaning(variant(SHARED, metric="relative error"))


@pytest.mark.parametrize(
    ("precision", "converted", "kept"),
    [
        ("int8", "8 bits", "float32, kept"),
        ("int4", "4 bits", "8 bits, kept"),
        ("fp16", "float16", "float32, kept"),
    ],
)
def test_in_what_layers_are_held(precision: Precision, converted: str, kept: str) -> None:
    layers = [SHARED, KEPT._replace(tasks=None)]
    (table,) = layer_tables(variant(*layers, precision=precision))
    assert [row[1] for row in table.rows] == [converted, kept]
    assert f"with these layers in {kept.removesuffix(', kept')} and" in layer_meaning(
        variant(*layers, precision=precision)
    )


def test_what_was_not_measured_is_told_with_the_reason() -> None:
    told = layer_meaning(variant(SHARED, UNMEASURED, PLAIN))
    assert "1 of 2 rows were not measured: the trials are bounded" in told
    assert "One row of 400 is worth 0.25 points." in told
    assert "not measured" not in layer_meaning(variant(SHARED, PLAIN))


@pytest.mark.parametrize(
    ("whole", "spared", "cost", "of"),
    [
        (None, 0.25, "infinite", "infinite"),
        (None, None, "0.000", "infinite"),
        (0.5, None, "0.000", "0.500"),
        (0.5, 0.50001, "0.000", "0.500"),
        (0.25, 0.5, "-0.250", "0.250"),
    ],
)
def test_costs_that_are_no_common_numbers(
    whole: float | None, spared: float | None, cost: str, of: str
) -> None:
    layer = SHARED._replace(loss=LayerLoss("b", whole, spared, 0.0, 0.0))
    (table,) = layer_tables(variant(layer))
    assert table.rows[0][2:4] == (cost, of)


def test_the_costliest_layers_come_first_and_those_without_cost_not_at_all() -> None:
    losses = [
        ("a", 0.3, 0.2),
        ("b", None, 0.2),
        ("c", 0.3, 0.3),
        ("d", 0.9, 0.1),
        ("e", 0.3, 0.25),
        ("f", 0.3, 0.9),
    ]
    layers = [
        LayerAccuracy((f"{name}.weight",), 1, None, "converted", LayerLoss("t", whole, spared, 0.0, 0.0))
        for name, whole, spared in losses
    ]
    assert costliest_layers(variant(*layers, UNMEASURED)) == (
        "b.weight infinite (t); d.weight 0.800 (t); a.weight 0.100 (t)"
    )
    assert costliest_layers(variant(layers[2], layers[5], UNMEASURED)) == ""


def test_many_tasks_are_counted() -> None:
    tasks = tuple(f"t{place}" for place in range(9))
    (table,) = layer_tables(variant(KEPT._replace(tasks=tasks)))
    assert "t0, t1, t2, t3, t4, t5 and 3 more" in table.rows[0]


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (("a.0.b",), "a.0.b"),
        (("a.0.b", "a.1.b"), "a.{0…1}.b"),
        (("a.9", "a.11", "a.10"), "a.{9…11}"),
        (("a.0.b", "a.2.b"), "a.0.b, a.2.b"),
        (("a.0.0", "a.1.1"), "a.0.0, a.1.1"),
        (("a.0.b", "a.1.c"), "a.0.b, a.1.c"),
        (("a.0", "a.1.b"), "a.0, a.1.b"),
        (("a.00", "a.01"), "a.00, a.01"),
        (("a.x", "a.y"), "a.x, a.y"),
        (("a.\u0660", "a.\u0661"), "a.\u0660, a.\u0661"),
        (("", "."), ", ."),
        (("a." + "9" * 5000, "a." + "8" * 5000), "a." + "9" * 5000 + ", a." + "8" * 5000),
    ],
)
def test_names_in_short(names: tuple[str, ...], text: str) -> None:
    assert weights_text(names) == text


def test_many_names_are_cut_and_counted() -> None:
    names = tuple(f"w{2 * place}" for place in range(20))
    assert weights_text(names) == ", ".join(names[:12]) + " and 8 more"


@given(
    st.lists(
        st.lists(st.sampled_from(["a", "b", "0", "1", "2", "10"]), min_size=1, max_size=3).map(".".join),
        min_size=1,
        max_size=6,
        unique=True,
    )
)
def test_short_names_stand_for_exactly_the_names(names: list[str]) -> None:
    text = weights_text(names)
    found = re.fullmatch(r"(.*)\{(\d+)…(\d+)\}(.*)", text)
    spelled = (
        text.split(", ")
        if found is None
        else [f"{found[1]}{number}{found[4]}" for number in range(int(found[2]), int(found[3]) + 1)]
    )
    assert sorted(spelled) == sorted(names)
