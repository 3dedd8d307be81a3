from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from te_runtime.bundle import open_bundle
from te_runtime.errors import BundleError, InputError


def test_a_whole_bundle_opens(bundle: Path) -> None:
    opened = open_bundle(bundle)
    assert opened.root == bundle.resolve()
    assert opened.check == "full"
    assert opened.manifest_sha256 == hashlib.sha256((bundle / "manifest.json").read_bytes()).hexdigest()
    assert Path(opened.path("fp32/weights.bin")).is_file()


def test_a_bundle_opens_by_text_and_through_a_link_to_its_folder(bundle: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(bundle, target_is_directory=True)
    assert open_bundle(str(link)).root == bundle.resolve()


def test_files_that_are_not_listed_are_ignored(bundle: Path) -> None:
    (bundle / "report.md").write_text("hello")
    (bundle / "fp32" / "more.bin").write_bytes(b"\0")
    open_bundle(bundle)


def test_the_quick_check_compares_sizes_only(bundle: Path) -> None:
    path = bundle / "fp32" / "weights.bin"
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data)
    assert open_bundle(bundle, check="size").check == "size"
    with pytest.raises(BundleError, match="sha256"):
        open_bundle(bundle)
    path.write_bytes(data[:-1])
    with pytest.raises(BundleError, match=f"{len(data) - 1} bytes, expected {len(data)}"):
        open_bundle(bundle, check="size")


def test_sizes_are_compared_before_any_checksum(bundle: Path) -> None:
    (bundle / "golden.npz").write_bytes(b"\0" * (bundle / "golden.npz").stat().st_size)
    (bundle / "fp32" / "weights.bin").write_bytes(b"")
    with pytest.raises(BundleError, match=r"weights\.bin: 0 bytes"):
        open_bundle(bundle)


def test_a_path_that_is_no_bundle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"nothing: no such folder\. Pass the folder"):
        open_bundle(tmp_path / "nothing")
    (tmp_path / "model.pt").write_bytes(b"")
    with pytest.raises(BundleError, match="is a file, expected a bundle"):
        open_bundle(tmp_path / "model.pt")
    with pytest.raises(BundleError, match=r"holds no manifest\.json, so it is no bundle"):
        open_bundle(tmp_path)
    with pytest.raises(BundleError, match="cannot be opened"):
        open_bundle("a\0b")
    with pytest.raises(BundleError, match="cannot be opened"):
        open_bundle("x" * 5000)


def test_an_unknown_check_is_refused(bundle: Path) -> None:
    with pytest.raises(InputError, match="expected 'full' or 'size'"):
        open_bundle(bundle, check="none")
