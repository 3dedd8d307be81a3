from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from te_runtime.errors import InputError
from te_runtime.npz import ArraySpec, read_npy, read_npz


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, array, allow_pickle=True)
    return file.getvalue()


def header(shape: tuple[int, ...], descr: str = "<f4") -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
    return file.getvalue()


@given(
    shape=st.lists(st.integers(0, 4), max_size=3),
    dtype=st.sampled_from(["<f4", ">f8", "<i8", "|b1", "<f2", "<U3", "<c8"]),
    order=st.sampled_from("CF"),
)
@settings(max_examples=60, deadline=None)
def test_what_numpy_writes_is_read(
    tmp_path_factory: pytest.TempPathFactory, shape: list[int], dtype: str, order: str
) -> None:
    array = np.arange(int(np.prod(shape))).reshape(shape).astype(dtype, order=order)
    folder = tmp_path_factory.getbasetemp()
    np.save(folder / "a.npy", array)
    np.savez(folder / "a.npz", a=array)
    np.savez_compressed(folder / "b.npz", a=array)
    for found in (
        read_npy(folder / "a.npy"),
        read_npz(folder / "a.npz")["a"],
        read_npz(folder / "b.npz")["a"],
    ):
        assert found.dtype == array.dtype
        np.testing.assert_array_equal(found, array)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "cannot be read"),
        (b"\x93NUMPY\x09\x00", "expected 1.0 or 2.0"),
        (header((2, 2)), "do not fit an array of shape (2, 2)"),
        (header((10**18,)), "do not fit an array"),
        (header((-1,)), "do not fit an array"),
        (header((2,)) + b"\0" * 9, "do not fit an array"),
        (header((1,), "|O"), "pickled Python objects"),
        (header((10**9,), "|S0"), "expected plain numbers"),
        (header((0, 10**30)), "cannot be read"),
        (npy(np.array([{"a": 1}])), "pickled Python objects"),
        (npy(np.zeros(2, dtype=[("a", "f4")])), "expected plain numbers"),
        (npy(np.zeros(3))[:-1], "do not fit an array"),
        (npy(np.zeros(3))[:40], "cannot be read"),
        (b"\x93NUMPY\x01\x00\x10\x27" + b"(" * 10_000, "cannot be read"),
    ],
)
def test_a_damaged_array_is_refused(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "a.npy").write_bytes(data)
    with pytest.raises(InputError) as caught:
        read_npy(tmp_path / "a.npy")
    assert message in str(caught.value)
    assert "a.npy" in str(caught.value)
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("a.npy", data)
    with pytest.raises(InputError, match=r"a\.npz: cannot be read: .*'a'|a\.npz: cannot be read"):
        read_npz(tmp_path / "a.npz")


def test_a_pickle_is_never_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (tmp_path / "owned",))

    np.savez(tmp_path / "a.npz", a=np.array([Evil()], dtype=object))
    with pytest.raises(InputError, match="pickled"):
        read_npz(tmp_path / "a.npz")
    assert not (tmp_path / "owned").exists()


def test_other_members_and_wrong_archives_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("run.sh", b"")
    with pytest.raises(InputError, match=r"holds 'run\.sh', expected arrays"):
        read_npz(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.npy", npy(np.zeros(1)))
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("a.npy", npy(np.ones(1)))
    with pytest.raises(InputError, match="holds array 'a' twice"):
        read_npz(path)
    path.write_bytes(b"PK\x03\x04 not an archive")
    with pytest.raises(InputError, match="not a zip file"):
        read_npz(path)
    with pytest.raises(InputError, match="No such file"):
        read_npz(tmp_path / "missing.npz")
    with pytest.raises(InputError, match="Is a directory"):
        read_npz(tmp_path)


def test_a_zip_bomb_is_refused_by_its_header(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.npy", header((1,)) + b"\0" * 50_000_000)
    assert (tmp_path / "a.npz").stat().st_size < 100_000
    with pytest.raises(InputError, match="do not fit an array"):
        read_npz(tmp_path / "a.npz", {"a": ArraySpec((1,), "float32")})
    with pytest.raises(InputError, match="expected at most 1000"):
        read_npz(tmp_path / "a.npz", limit_bytes=1000)


def test_a_member_that_lies_about_its_size_is_refused(tmp_path: Path) -> None:
    """The directory promises what the header needs; the data is shorter, so the checksum cannot hold either."""
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("a.npy", header((100,)))
    data = bytearray((tmp_path / "a.npz").read_bytes())
    start = data.rindex(b"PK\x01\x02")
    data[start + 24 : start + 28] = (len(header((100,))) + 400).to_bytes(4, "little")
    (tmp_path / "a.npz").write_bytes(data)
    with pytest.raises(InputError, match="cannot be read"):
        read_npz(tmp_path / "a.npz")


def test_a_flipped_byte_is_noticed(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", a=np.arange(100.0))
    data = bytearray((tmp_path / "a.npz").read_bytes())
    data[400] ^= 1
    (tmp_path / "a.npz").write_bytes(data)
    with pytest.raises(InputError, match="CRC"):
        read_npz(tmp_path / "a.npz")


def test_wanted_arrays_may_leave_an_axis_open(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", a=np.zeros((2, 3)), b=np.zeros(1))
    assert list(read_npz(tmp_path / "a.npz", {"a": ArraySpec((2, None), "float64")})) == ["a"]
    with pytest.raises(InputError, match=r"float64 \(2, 3\), expected float64 \(any, 4\)"):
        read_npz(tmp_path / "a.npz", {"a": ArraySpec((None, 4), "float64")})
    with pytest.raises(InputError, match="array 'c' is missing; it holds a, b"):
        read_npz(tmp_path / "a.npz", {"c": ArraySpec((1,), "float64")})
