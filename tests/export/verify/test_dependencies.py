"""Regions are followed exactly through the operators that rewrites write, and never too little through others."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from te_export.rewrite.stack import Part, stack_tensors
from te_export.verify.dependencies import Region, dependencies_of


def value(name: str, *axes: int | str) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(axes), type=ir.TensorType(ir.DataType.FLOAT))


def op(
    op_type: str, inputs: list[ir.Value], *shapes: tuple[int | str, ...], **kept: object
) -> list[ir.Value]:
    attributes = ir.convenience.convert_attributes(kept)  # type: ignore[arg-type]
    node = ir.Node("", op_type, inputs, attributes=attributes, num_outputs=len(shapes))
    for index, (output, axes) in enumerate(zip(node.outputs, shapes, strict=True)):
        output.name = f"{op_type}:{index}"
        output.shape = ir.Shape(axes)
    return list(node.outputs)


def regions(output: ir.Value, region: Region, of: ir.Value) -> set[Region]:
    return set(dependencies_of(output, region).needed.get(of, ()))


X = ("batch", 6)


@pytest.mark.parametrize(
    ("op_type", "axes", "kept", "region", "expected"),
    [
        ("Relu", X, {}, (None, (2, 3)), (None, (2, 3))),
        ("Softmax", X, {"axis": -1}, (None, (2, 3)), (None, None)),
        ("Transpose", (6, "batch"), {"perm": [1, 0]}, ((1, 4), None), (None, (1, 4))),
        ("Reshape", ("batch", 2, 3), {}, (None, (1, 2), None), (None, (3, 6))),
        ("Reshape", ("batch", 2, 3), {}, (None, (1, 2), (0, 1)), (None, (3, 4))),
        ("Reshape", ("batch", 3, 2), {}, (None, None, (0, 1)), (None, (0, 5))),
        ("Reshape", ("batch", 1, 6), {}, (None, (0, 1), (2, 3)), (None, (2, 3))),
        ("Unsqueeze", ("batch", 6, 1), {}, (None, (2, 3), None), (None, (2, 3))),
        ("Reshape", ("rows",), {}, ((0, 3),), (None, None)),
        ("Nobody", X, {}, (None, (2, 3)), (None, None)),
    ],
)
def test_a_region_of_the_output_needs_this_of_the_input(
    op_type: str, axes: tuple[int | str, ...], kept: dict[str, object], region: Region, expected: Region
) -> None:
    x = value("x", *X)
    (output,) = op(op_type, [x], axes, **kept)

    assert regions(output, region, x) == {expected}


def test_a_reshape_joins_axes_too() -> None:
    x = value("x", "batch", 2, 3)
    (flat,) = op("Reshape", [x], X)

    assert regions(flat, (None, (3, 6)), x) == {(None, (1, 2), None)}
    assert regions(flat, (None, (4, 5)), x) == {(None, (1, 2), (1, 2))}
    assert regions(flat, (None, (2, 4)), x) == {(None, None, None)}


def test_a_piece_of_a_split_is_a_span_of_the_whole() -> None:
    x = value("x", *X)
    first, second = op("Split", [x], ("batch", 2), ("batch", 4), axis=1)

    assert regions(first, None, x) == {(None, (0, 2))}
    assert regions(second, (None, (1, 3)), x) == {(None, (3, 5))}


def test_a_span_of_a_concat_needs_the_inputs_it_meets() -> None:
    one, two, three = (value(name, "batch", 2) for name in "abc")
    (whole,) = op("Concat", [one, two, three], X, axis=1)

    assert regions(whole, (None, (1, 3)), one) == {(None, (1, 2))}
    assert regions(whole, (None, (1, 3)), two) == {(None, (0, 1))}
    assert regions(whole, (None, (1, 3)), three) == set()


def test_outputs_of_a_gemm_need_rows_of_its_weight() -> None:
    x, bias = value("x", *X), value("b", 4)
    for turned, axes, expected in ((1, (4, 6), ((1, 2), None)), (0, (6, 4), (None, (1, 2)))):
        w = value("w", *axes)
        (y,) = op("Gemm", [x, w, bias], ("batch", 4), transB=turned)

        assert regions(y, (None, (1, 2)), w) == {expected}
        assert regions(y, (None, (1, 2)), bias) == {((1, 2),)}
        assert regions(y, (None, (1, 2)), x) == {(None, None)}


def test_one_matrix_of_a_batched_product_needs_its_own_factors() -> None:
    x, w = value("x", 3, "batch", 4), value("w", 3, 4, 5)
    (y,) = op("MatMul", [x, w], (3, "batch", 5))
    bias = value("b", 3, 1, 5)
    (z,) = op("Add", [y, bias], (3, "batch", 5))

    assert regions(z, ((1, 2), None, None), x) == {((1, 2), None, None)}
    assert regions(z, ((1, 2), None, None), w) == {((1, 2), None, None)}
    assert regions(z, ((1, 2), None, (0, 2)), bias) == {((1, 2), None, (0, 2))}


def test_only_the_parts_of_a_stack_that_are_met_count() -> None:
    tensors = [ir.tensor([[float(index)] * 6] * rows) for index, rows in enumerate((1, 2, 1))]
    parts = [Part(f"w{index}", tensor) for index, tensor in enumerate(tensors)]
    w = ir.Value(name="stack", const_value=stack_tensors("stack", parts, [4, 6]), shape=ir.Shape([4, 6]))
    x = value("x", *X)
    (y,) = op("Gemm", [x, w], ("batch", 4), transB=1)

    found = {
        span: dependencies_of(y, (None, span)).parameters({"w1": ("p", "q")})
        for span in ((0, 1), (1, 3), (2, 4), None)
    }

    assert found == {
        (0, 1): {"w0"},
        (1, 3): {"p", "q"},
        (2, 4): {"p", "q", "w2"},
        None: {"w0", "p", "q", "w2"},
    }
