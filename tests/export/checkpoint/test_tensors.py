"""Tensor records: kinds and dtypes that are refused, and every bound of a view."""

from __future__ import annotations

import pytest
import torch

from te_export.checkpoint import read_checkpoint
from te_export.checkpoint.inert import Inert, Name
from te_export.checkpoint.storages import StorageRef, parse_storage_id
from te_export.checkpoint.tensors import build_tensor, describe_tensor
from te_export.errors import CheckpointError

FLOATS = StorageRef("0", "FloatStorage", 6, 0, 6)


class SixFloats:
    """Storages of six float32."""

    def bytes_of(self, ref: StorageRef) -> torch.Tensor:
        return torch.arange(6.0).view(torch.uint8)


def record(*arguments: object, function: str = "_rebuild_tensor_v2") -> Inert:
    return Inert(
        Name("torch._utils", function), (*arguments, False, Inert(Name("collections", "OrderedDict"), ()))
    )


def build(*arguments: object, storage: StorageRef = FLOATS) -> torch.Tensor:
    return build_tensor(describe_tensor(record(storage, *arguments)), SixFloats())


def test_a_view_within_the_storage():
    assert torch.equal(build(1, (2, 2), (2, 1)), torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    assert build(0, (0, 1 << 20), (1, 1)).shape == (0, 1 << 20)
    assert build(6, (0,), (1,)).shape == (0,)


def test_the_part_of_an_old_view():
    part = StorageRef("0", "FloatStorage", 6, 2, 3)
    assert torch.equal(build(1, (2,), (1,), storage=part), torch.tensor([3.0, 4.0]))
    with pytest.raises(CheckpointError, match="more than the 3 elements"):
        build(2, (2,), (1,), storage=part)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, (7,), (1,)), "more than the 6 elements"),
        ((5, (2,), (1,)), "more than the 6 elements"),
        ((0, (2, 2), (5, 1)), "more than the 6 elements"),
        ((0, (1 << 20,), (0,)), "more than the 6 elements"),
        ((0, (2, 3), (1,)), "2 sizes and 1 strides"),
        ((-1, (2,), (1,)), "has -1 in its offset"),
        ((0, (-2,), (1,)), "has -2 in its size"),
        ((0, (2,), (-1,)), "has -1 in its stride"),
        ((0, (True,), (1,)), "has True in its size"),
        ((0, (2.0,), (1,)), "has 2.0 in its size"),
        ((0, (1 << 62,), (1,)), "in its size"),
        ((0, (0, 1 << 40, 1 << 40), (1, 1, 1)), "more than any storage holds"),
        ((0, (1,) * 65, (1,) * 65), "at most 64 numbers"),
        ((0, 3, (1,)), "numbers for its size"),
    ],
)
def test_bounds_of_a_view(arguments, message):
    with pytest.raises(CheckpointError) as caught:
        build(*arguments)
    assert message in str(caught.value)


def test_malformed_records():
    with pytest.raises(CheckpointError, match="malformed"):
        describe_tensor(Inert(Name("torch._utils", "_rebuild_tensor_v2"), (FLOATS, 0)))
    with pytest.raises(CheckpointError, match="malformed"):
        describe_tensor(record("no storage", 0, (1,), (1,)))
    with pytest.raises(CheckpointError, match="without a tensor"):
        describe_tensor(Inert(Name("torch._utils", "_rebuild_parameter"), (3, True, None)))
    looped = Inert(Name("torch._utils", "_rebuild_parameter"), ())
    looped.arguments = (looped,)
    with pytest.raises(CheckpointError, match="without a tensor"):
        describe_tensor(looped)


@pytest.mark.parametrize(
    "persistent_id",
    [
        None,
        "storage",
        ("storage",),
        ("module", Name("torch", "FloatStorage"), "0", "cpu", 1),
        ("storage", "FloatStorage", "0", "cpu", 1),
        ("storage", Name("torch", "NoStorage"), "0", "cpu", 1),
        ("storage", Name("torch", "FloatStorage"), 0, "cpu", 1),
        ("storage", Name("torch", "FloatStorage"), "0", "cpu", -1),
        ("storage", Name("torch", "FloatStorage"), "0", "cpu", 1 << 60),
        ("storage", Name("torch", "FloatStorage"), "0", "cpu", 4, ("1", 2, 3)),
        ("storage", Name("torch", "FloatStorage"), "0", "cpu", 4, 3),
    ],
)
def test_malformed_storage_ids(persistent_id):
    with pytest.raises(CheckpointError):
        parse_storage_id(persistent_id)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.ones(2, dtype=torch.complex64), "lies in a ComplexFloatStorage, expected one of float16"),
        (torch.ones(2, dtype=torch.uint16), "has dtype uint16, expected one of"),
        (torch.ones(2).to(torch.float8_e4m3fn), "has dtype float8_e4m3fn"),
        (torch.eye(2).to_sparse(), "is made by torch._utils._rebuild_sparse_tensor, expected a dense tensor"),
        (torch.ones(2, device="meta"), "is made by torch._utils._rebuild_meta_tensor_no_storage"),
        (torch.ones(1).expand(5), "needs more than the 1 elements of storage '0'; if it was expanded"),
    ],
)
def test_kinds_of_tensors_that_are_not_read(save, tensor, message):
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(save({"w": tensor, "b": torch.ones(1)}))
    assert "parameter 'w': " in str(caught.value)
    assert message in str(caught.value)


def test_parameters_and_subclasses(save):
    class Marked(torch.nn.Parameter):
        pass

    parameter = torch.nn.Parameter(torch.arange(3.0))
    parameter.note = "kept by torch"  # type: ignore[attr-defined]
    found = read_checkpoint(save({"w": parameter, "b": torch.nn.Buffer(torch.ones(1))}))
    assert torch.equal(found.state["w"], torch.arange(3.0))


def test_booleans_that_are_none(save):
    path = save({"w": torch.tensor([True, False])}, _use_new_zipfile_serialization=False)
    data = bytearray(path.read_bytes())
    data[-1] = 7
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="bytes other than 0 and 1"):
        read_checkpoint(path)


def test_a_thousand_names_for_one_storage(save):
    big = torch.zeros(1000)
    with pytest.raises(CheckpointError, match="1000 parameters of 4000000 bytes lie in 4000 bytes"):
        read_checkpoint(save({f"w{index}": big.view(-1) for index in range(1000)}))
