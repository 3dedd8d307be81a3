"""A bundle appears whole or not at all, whatever fails on the way, and nothing that stood there is lost."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest

import te_export
from te_export.bundle import exchange, staging
from te_export.bundle.staging import StagedBundle, check_target, leftovers
from te_export.errors import OutputError
from te_runtime.manifest import seal_manifest

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
BROKEN = OSError(errno.EIO, os.strerror(errno.EIO))

as_root = pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0,
    reason="permissions do not bind root; run as another user on Linux or macOS",
)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def old(target: Path, exported: te_export.ExportResult) -> dict[str, bytes]:
    """A whole bundle stands at the target; its files."""
    shutil.copytree(exported.bundle, target)
    return contents(target)


# Writing and publishing


def test_files_are_remembered_with_size_and_sha256(target: Path) -> None:
    with StagedBundle(target, force=False) as staged:
        entry = staged.write("b/c.bin", [b"abc", memoryview(b"defg")])
        staged.write("a.txt", [])

        assert entry.size_bytes == 7
        assert entry.sha256 == hashlib.sha256(b"abcdefg").hexdigest()
        assert [file.path for file in staged.files] == ["a.txt", "b/c.bin"]
        assert not target.exists()
        staged.publish()

    assert contents(target) == {"a.txt": b"", "b/c.bin": b"abcdefg"}


def test_what_is_not_published_is_removed(target: Path, hidden_siblings: Callable[[Path], list[str]]) -> None:
    with StagedBundle(target, force=False) as staged:
        staged.write("a", [b"1"])
        assert len(hidden_siblings(target)) == 1

    assert list(target.parent.iterdir()) == []


def test_a_file_is_not_written_twice(target: Path) -> None:
    with StagedBundle(target, force=False) as staged:
        staged.write("a", [b"1"])
        with pytest.raises(OutputError, match="File exists"):
            staged.write("a", [b"2"])
        assert (staged.root / "a").read_bytes() == b"1"


def test_everything_is_flushed_to_disk_before_the_bundle_appears(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[str] = []
    fsync, rename = os.fsync, Path.rename
    monkeypatch.setattr(
        os, "fsync", lambda fd: flushed.append(str(Path(f"/proc/self/fd/{fd}").readlink())) or fsync(fd)
    )
    monkeypatch.setattr(Path, "rename", lambda self, to: flushed.append("rename") or rename(self, to))
    if not sys.platform.startswith("linux"):
        pytest.skip("reads names from /proc: needs Linux")

    with StagedBundle(target, force=False) as staged:
        staged.write("a/b", [b"1"])
        root = str(staged.root)
        staged.publish()

    assert flushed == [f"{root}/a/b", root, f"{root}/a", "rename", str(target.parent)]


def test_two_exports_at_once_do_not_meet(target: Path) -> None:
    with StagedBundle(target, force=False) as first, StagedBundle(target, force=False) as second:
        first.write("a", [b"1"])
        second.write("a", [b"2"])
        first.publish()
        with pytest.raises(OutputError, match="exists already"):
            second.publish()

    assert contents(target) == {"a": b"1"}
    assert list(target.parent.iterdir()) == [target]


# Whatever fails


Patch = Callable[[pytest.MonkeyPatch, BaseException], None]


def when_opening(patch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fail(self: Path, mode: str = "r", *rest: object) -> object:
        raise error

    patch.setattr(Path, "open", fail)


def when_syncing(patch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fail(descriptor: int) -> None:
        raise error

    patch.setattr(os, "fsync", fail)


def when_making_folders(patch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fail(self: Path, *rest: object, **options: object) -> None:
        raise error

    patch.setattr(Path, "mkdir", fail)


def when_moving(patch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fail(self: Path, to: Path) -> Path:
        raise error

    patch.setattr(Path, "rename", fail)
    patch.setattr(exchange, "_exchange_at_once", lambda first, second: False)


def write_and_publish(staged: StagedBundle, *, chunks: list[bytes]) -> None:
    staged.write("fp32/weights.bin", chunks)
    staged.write("manifest.json", [b"{}"])
    staged.publish()


@pytest.mark.parametrize("error", [FULL, BROKEN, KeyboardInterrupt(), MemoryError()], ids=repr)
@pytest.mark.parametrize("where", [when_opening, when_syncing, when_making_folders, when_moving])
@pytest.mark.parametrize("replacing", [False, True])
def test_a_failure_at_any_step_leaves_the_target_as_it_was(
    replacing: bool,
    where: Patch,
    error: BaseException,
    target: Path,
    exported: te_export.ExportResult,
) -> None:
    if replacing:
        shutil.copytree(exported.bundle, target)
    before = contents(target)
    expected = OutputError if isinstance(error, OSError) else type(error)

    with StagedBundle(target, force=replacing) as staged, pytest.MonkeyPatch.context() as patch:
        where(patch, error)
        with pytest.raises(expected) as caught:
            write_and_publish(staged, chunks=[b"x"])

    if isinstance(error, OSError):
        assert str(target) in str(caught.value)
        assert error.strerror in str(caught.value)
        assert ("Free some space" in str(caught.value)) is (error is FULL)
    assert contents(target) == before
    assert list(target.parent.iterdir()) == ([target] if replacing else [])


def test_a_failure_in_the_middle_of_a_file_leaves_nothing(target: Path) -> None:
    def chunks() -> object:
        yield b"1" * 5000
        raise FULL

    with (
        pytest.raises(OutputError, match="No space left on device"),
        StagedBundle(target, force=False) as staged,
    ):
        staged.write("a", chunks())  # type: ignore[arg-type]

    assert list(target.parent.iterdir()) == []


# What is only tried


@pytest.mark.parametrize("error", [None, FULL, PermissionError(13, "denied"), ValueError("a defect")])
def test_a_scratch_folder_is_gone_however_its_use_ends(
    error: Exception | None, staged_bundle: StagedBundle, target: Path
) -> None:
    expected = OutputError if isinstance(error, OSError) else ValueError
    with (
        pytest.raises(expected) if error else contextlib.nullcontext() as caught,
        staged_bundle.scratch() as folder,
    ):
        (folder / "deeper").mkdir()
        (folder / "deeper/weights.bin").write_bytes(b"1" * 5000)
        if error:
            raise error

    if isinstance(error, OSError):
        assert caught is not None
        assert error.strerror in str(caught.value)
    assert list(staged_bundle.root.iterdir()) == []
    assert staged_bundle.files == ()


def test_a_scratch_folder_can_be_had_again(staged_bundle: StagedBundle) -> None:
    for _ in range(2):
        with staged_bundle.scratch() as folder:
            assert list(folder.iterdir()) == []
            (folder / "file").write_bytes(b"1")


def test_what_is_discarded_is_neither_there_nor_listed(staged_bundle: StagedBundle) -> None:
    for path in ("fp32/weights.bin", "int8/weights.bin", "int8/joint.onnx"):
        staged_bundle.write(path, [b"1"])

    staged_bundle.discard("int8")
    staged_bundle.discard("fp16")

    assert [entry.path for entry in staged_bundle.files] == ["fp32/weights.bin"]
    assert [path.name for path in staged_bundle.root.iterdir()] == ["fp32"]


def test_too_little_room_is_refused_with_both_figures(
    staged_bundle: StagedBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 2_500_000, 2_500_000))

    staged_bundle.check_room(2_500_000)
    with pytest.raises(OutputError, match=r"needs 3\.0 MB, 2\.5 MB are free"):
        staged_bundle.check_room(3_000_000)


# Targets


def test_a_target_that_exists_is_refused_with_the_way_out(target: Path, old: dict[str, bytes]) -> None:
    with pytest.raises(OutputError, match=r"exists already.*--force"):
        check_target(target, force=False)

    assert contents(target) == old


@pytest.mark.parametrize("force", [False, True])
def test_a_file_is_never_replaced(target: Path, force: bool) -> None:
    target.write_text("mine")

    with pytest.raises(OutputError, match="exists and is not a folder"):
        check_target(target, force=force)

    assert target.read_text() == "mine"


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("kind", ["to a bundle", "dangling"])
def test_a_symlink_is_never_replaced(
    target: Path, force: bool, kind: str, exported: te_export.ExportResult
) -> None:
    target.symlink_to(exported.bundle if kind == "to a bundle" else target.parent / "nowhere")

    with pytest.raises(OutputError, match="is a symbolic link"):
        check_target(target, force=force)

    assert target.is_symlink()


def test_force_replaces_a_bundle(target: Path, old: dict[str, bytes]) -> None:
    check_target(target, force=True)
    with StagedBundle(target, force=True) as staged:
        staged.write("a", [b"1"])
        staged.publish()

    assert contents(target) == {"a": b"1"}
    assert list(target.parent.iterdir()) == [target]


def test_force_takes_an_empty_folder(target: Path) -> None:
    target.mkdir()

    check_target(target, force=True)


@pytest.mark.parametrize("name", ["notes.txt", "fp32/mine.onnx", "fp32/deep/er.bin", ".hidden"])
def test_force_never_loses_a_file_that_is_not_the_bundles(
    name: str, target: Path, old: dict[str, bytes]
) -> None:
    (target / name).parent.mkdir(exist_ok=True)
    (target / name).write_text("mine")

    with pytest.raises(OutputError) as caught:
        check_target(target, force=True)

    assert f"holds 1 files that are not the bundle's ({name})" in str(caught.value)
    assert (target / name).read_text() == "mine"


def test_force_never_loses_a_symlink_in_the_bundle(target: Path, old: dict[str, bytes]) -> None:
    elsewhere = target.parent / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious").write_text("mine")
    (target / "link").symlink_to(elsewhere)

    with pytest.raises(OutputError, match=r"not the bundle's \(link\)"):
        check_target(target, force=True)

    assert (elsewhere / "precious").read_text() == "mine"


@pytest.mark.parametrize(
    "manifest", [None, "", "{}", '{"format": "te-export-bundle", "version": 99}', "x" * 99]
)
def test_force_does_not_replace_a_folder_that_is_no_bundle(target: Path, manifest: str | None) -> None:
    target.mkdir()
    (target / "photo.jpg").write_text("mine")
    if manifest is not None:
        (target / "manifest.json").write_text(manifest)

    with pytest.raises(OutputError, match="holds files but is not a te-export bundle"):
        check_target(target, force=True)

    assert (target / "photo.jpg").read_text() == "mine"


def as_another_version_writes(data: bytes, version: int) -> bytes:
    """A manifest with a key less and one more, sealed."""
    manifest = json.loads(data)
    del manifest["golden"]
    manifest |= {"version": version, "checksum": "0" * 64, "novelty": 1}
    return seal_manifest(json.dumps(manifest).encode())


@pytest.mark.parametrize("version", [1, 2])
def test_force_replaces_a_bundle_of_another_version(
    target: Path, old: dict[str, bytes], version: int
) -> None:
    """Who has a new te-export need not remove by hand what the last one wrote."""
    (target / "manifest.json").write_bytes(as_another_version_writes(old["manifest.json"], version))
    check_target(target, force=True)

    (target / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"not the bundle's \(notes.txt\)"):
        check_target(target, force=True)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: data.replace(b'"novelty": 1', b'"novelty": 2'),
        lambda data: seal_manifest(data.replace(b'"te-export-bundle"', b'"somebody-elses"')),
        lambda data: seal_manifest(data.replace(b'"files"', b'"flies"')),
        lambda data: seal_manifest(data.replace(b'"path"', b'"bath"')),
        lambda data: seal_manifest(data[:-1]),
        lambda data: seal_manifest(data[:-1] + b', "deep": ' + b"[" * 200_000),
    ],
)
def test_force_does_not_replace_what_only_looks_like_another_versions_bundle(
    target: Path, old: dict[str, bytes], spoil: Callable[[bytes], bytes]
) -> None:
    data = as_another_version_writes(old["manifest.json"], 2)
    assert spoil(data) not in (data, b"")
    (target / "manifest.json").write_bytes(spoil(data))

    with pytest.raises(OutputError, match="is not a te-export bundle"):
        check_target(target, force=True)


def test_force_does_not_walk_through_a_folder_that_is_no_bundle(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--force -o ~ would take minutes."""
    target.mkdir()
    (target / "photo.jpg").write_text("mine")
    monkeypatch.setattr(Path, "rglob", lambda self, pattern: pytest.fail("walked the folder"))

    with pytest.raises(OutputError, match="is not a te-export bundle"):
        check_target(target, force=True)


def test_a_bundle_that_cannot_be_looked_through_is_refused(
    target: Path, old: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Path, pattern: str) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "rglob", fail)

    with pytest.raises(OutputError, match="Permission denied"):
        check_target(target, force=True)


def test_a_missing_parent_is_named_and_not_made(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"no such folder to write 'out' into"):
        check_target(tmp_path / "missing" / "out", force=False)

    assert list(tmp_path.iterdir()) == []


def test_a_parent_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")

    with pytest.raises(OutputError, match="no such folder"):
        check_target(tmp_path / "file" / "out", force=False)


@as_root
def test_a_parent_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(OutputError, match="not writable"):
            check_target(tmp_path / "out", force=False)
    finally:
        tmp_path.chmod(0o700)


def test_a_name_that_is_too_long_is_an_output_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="File name too long"):
        StagedBundle(tmp_path / ("x" * 300), force=False)


def test_a_target_that_appears_meanwhile_is_not_lost(target: Path) -> None:
    with StagedBundle(target, force=False) as staged:
        staged.write("a", [b"1"])
        target.mkdir()
        (target / "theirs").write_text("x")
        with pytest.raises(OutputError, match="exists already"):
            staged.publish()

    assert contents(target) == {"theirs": b"x"}
    assert list(target.parent.iterdir()) == [target]


def test_foreign_files_that_appear_meanwhile_are_not_lost(target: Path, old: dict[str, bytes]) -> None:
    with StagedBundle(target, force=True) as staged:
        staged.write("a", [b"1"])
        (target / "theirs").write_text("x")
        with pytest.raises(OutputError, match="not the bundle's"):
            staged.publish()

    assert contents(target) == {**old, "theirs": b"x"}


# What killed exports leave


def test_leftovers_of_a_killed_export_are_found(target: Path) -> None:
    left = StagedBundle(target, force=False).root

    assert leftovers(target) == [left]
    assert leftovers(target.with_name("other")) == []


@pytest.mark.parametrize("name", ["out[1]", "*", "a?c"])
def test_leftovers_are_those_of_the_target_whatever_its_name(name: str, tmp_path: Path) -> None:
    StagedBundle(tmp_path / "abc", force=False)
    left = StagedBundle(tmp_path / name, force=False).root

    assert leftovers(tmp_path / name) == [left]


# Cleaning up


def test_a_second_interrupt_while_cleaning_up_leaves_nothing(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import signal

    rmtree = shutil.rmtree

    def interrupted(path: Path, **options: object) -> None:
        signal.raise_signal(signal.SIGINT)
        rmtree(path, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(staging.shutil, "rmtree", interrupted)
    staged = StagedBundle(target, force=False)
    staged.write("a", [b"1"])
    with pytest.raises(KeyboardInterrupt):
        staged.__exit__(None, None, None)

    assert list(target.parent.iterdir()) == []


def test_a_parent_that_cannot_be_synced_does_not_undo_the_publishing(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync = staging._sync_folder

    def fail_for_parent(folder: Path) -> None:
        if folder == target.parent:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        sync(folder)

    with StagedBundle(target, force=False) as staged:
        staged.write("a", [b"1"])
        monkeypatch.setattr(staging, "_sync_folder", fail_for_parent)
        staged.publish()

    assert contents(target) == {"a": b"1"}
