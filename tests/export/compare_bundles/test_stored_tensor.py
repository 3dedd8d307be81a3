"""Blocks of tensors: every element once, in an order that how a tensor is stored does not change."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from te_export.compare_bundles import stored_tensor
from te_export.compare_bundles.stored_tensor import StoredTensor
from te_export.compare_bundles.value_change import measure_change
from te_runtime.errors import BundleError

quick = settings(
    max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)  # fmt: skip


def in_file(folder: Path, array: np.ndarray, *, name: str = "w.bin", before: int = 0) -> StoredTensor:
    """The array in a file, `before` bytes after its beginning."""
    (folder / name).write_bytes(b"\7" * before + array.tobytes() + b"\7" * 5)
    return StoredTensor(
        "FLOAT", array.shape, folder=str(folder), file=name, file_sha256=name, offset=before, length=array.nbytes
    )  # fmt: skip


def turned(tensor: StoredTensor) -> StoredTensor:
    return StoredTensor(**{**vars(tensor), "turned": True})


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks so small that small tensors have many."""
    monkeypatch.setattr(stored_tensor, "_TILE", 3)
    monkeypatch.setattr(stored_tensor, "_FLAT_BLOCK", 9)


@quick
@given(rows=st.integers(1, 11), columns=st.integers(1, 11), before=st.integers(0, 9), seed=st.integers(0, 9))
def test_a_turned_matrix_gives_the_blocks_of_the_plain_one(
    rows: int, columns: int, before: int, seed: int, small_tiles: None, tmp_path: Path
) -> None:
    array = np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)

    plain = in_file(tmp_path, array, before=before)
    other = turned(in_file(tmp_path, np.ascontiguousarray(array.T), name="t.bin", before=3))
    inside = StoredTensor("FLOAT", array.shape, inside=array.tobytes())

    blocks = [np.concatenate(list(tensor.blocks())) for tensor in (plain, other, inside)]
    assert sorted(blocks[0].tolist()) == sorted(array.reshape(-1).tolist())
    for block in blocks[1:]:
        np.testing.assert_array_equal(block, blocks[0])
    assert plain.sha256() == other.sha256() == inside.sha256()
    assert measure_change(plain, other) is None
    assert measure_change(inside, plain) is None


@quick
@given(shape=st.lists(st.integers(1, 5), min_size=0, max_size=4), seed=st.integers(0, 9))
def test_figures_are_those_of_whole_arrays(
    shape: list[int], seed: int, small_tiles: None, tmp_path: Path
) -> None:
    rng = np.random.default_rng(seed)
    old = rng.standard_normal(shape).astype(np.float32)
    new = np.where(rng.random(shape) < 0.5, old, rng.standard_normal(shape)).astype(np.float32)

    found = measure_change(in_file(tmp_path, old), in_file(tmp_path, new, name="n.bin"))

    count = int((old != new).sum())
    if not count:
        assert found is None
        return
    assert found is not None
    assert (found.elements, found.changed) == (old.size, count)
    moved = new.astype(np.float64) - old
    assert found.max_abs_difference == np.abs(moved).max()
    for figure, values in (
        (found.rms_difference, moved),
        (found.rms_before, old.astype(np.float64)),
        (found.rms_after, new.astype(np.float64)),
    ):
        # sums of at most 625 float64 terms in another order
        assert figure == pytest.approx(float(np.sqrt(np.mean(values**2))), rel=1e-13)
    assert found.relative_rms == pytest.approx(found.rms_difference / found.rms_before)


def test_a_sign_of_zero_is_a_change_and_a_nan_that_stays_is_none(tmp_path: Path) -> None:
    old = np.array([0.0, np.nan, 1.0], np.float32)
    same = StoredTensor("FLOAT", (3,), inside=old.tobytes())
    zero = StoredTensor("FLOAT", (3,), inside=np.array([-0.0, np.nan, 1.0], np.float32).tobytes())

    assert measure_change(same, in_file(tmp_path, old)) is None
    found = measure_change(same, zero)
    assert found is not None
    assert found.changed == 1
    assert (found.max_abs_difference, found.rms_difference, found.relative_rms) == (None, None, None)


def test_numbers_whose_squares_pass_float64_have_no_figures() -> None:
    old = StoredTensor("DOUBLE", (2,), inside=np.array([1e300, 1.0]).tobytes())
    new = StoredTensor("DOUBLE", (2,), inside=np.array([-1e300, 1.0]).tobytes())

    found = measure_change(old, new)

    assert found is not None
    assert (found.changed, found.max_abs_difference) == (1, None)


def test_a_data_type_without_numbers_is_compared_by_bytes() -> None:
    old = StoredTensor("BFLOAT16", (2,), inside=b"\0\1\2\3")
    new = StoredTensor("BFLOAT16", (2,), inside=b"\0\1\2\4")

    assert measure_change(old, StoredTensor("BFLOAT16", (2,), inside=b"\0\1\2\3")) is None
    found = measure_change(old, new)
    assert found is not None
    assert found.rms_difference is None


def test_the_same_range_of_the_same_file_is_not_read() -> None:
    tensor = StoredTensor("FLOAT", (2,), folder="/nowhere", file="w.bin", file_sha256="a", offset=8, length=8)

    assert measure_change(tensor, tensor) is None


def test_a_file_that_ends_early_is_refused(tmp_path: Path) -> None:
    tensor = in_file(tmp_path, np.zeros(8, np.float32))
    (tmp_path / "w.bin").write_bytes(b"\0" * 20)

    with pytest.raises(BundleError, match=r"w\.bin: ends before byte 32, .*changed while it was read"):
        list(tensor.blocks())


def test_pieces_of_a_stack_are_ranges_of_it(tmp_path: Path) -> None:
    array = np.arange(24, dtype=np.float32).reshape(3, 2, 4)
    stored = in_file(tmp_path, array, before=4)

    for tensor in (stored, StoredTensor("FLOAT", array.shape, inside=array.tobytes())):
        for index in range(3):
            piece = tensor.slice(index, 3)
            assert piece.shape == (2, 4)
            np.testing.assert_array_equal(np.concatenate(list(piece.blocks())), array[index].reshape(-1))
    rows = StoredTensor("FLOAT", (6, 4), inside=array.tobytes()).slice(2, 3)
    assert rows.shape == (2, 4)
