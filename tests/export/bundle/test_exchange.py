"""Two folders change places, in one call or in two renames; whatever fails, none is lost."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from te_export.bundle import exchange
from te_export.bundle.exchange import exchange_folders

Folders = tuple[Path, Path]


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    """A new and an old folder, each with a file that says which it is."""
    new, old = tmp_path / ".old.te-export-1", tmp_path / "old"
    for folder, text in ((new, "new"), (old, "old")):
        folder.mkdir()
        (folder / "which").write_text(text)
    return new, old


def which(folder: Path) -> str | None:
    return (folder / "which").read_text() if folder.exists() else None


def in_two_renames(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "_exchange_at_once", lambda first, second: False)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux's renameat2")
def test_linux_exchanges_at_once(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    new, old = folders
    monkeypatch.setattr(Path, "rename", lambda self, target: pytest.fail("took a rename"))

    exchange_folders(new, old)

    assert (which(old), which(new)) == ("new", "old")


def test_elsewhere_two_renames_do_the_same(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    new, old = folders
    in_two_renames(monkeypatch)

    exchange_folders(new, old)

    assert which(old) == "new"
    assert which(new) in ("old", None)
    assert len(list(old.parent.iterdir())) <= 2


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), PermissionError(13, "denied")])
@pytest.mark.parametrize("failing", [1, 2])
def test_a_rename_that_fails_leaves_both_as_they_were(
    failing: int, error: OSError, folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    new, old = folders
    in_two_renames(monkeypatch)
    rename, calls = Path.rename, []

    def fail_once(self: Path, target: Path) -> Path:
        calls.append(self)
        if len(calls) == failing:
            raise error
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_once)
    with pytest.raises(OSError, match=error.strerror):
        exchange_folders(new, old)

    assert (which(old), which(new)) == ("old", "new")
    assert len(list(old.parent.iterdir())) == 2


def test_an_interrupt_between_the_renames_brings_the_old_folder_back(
    folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    new, old = folders
    in_two_renames(monkeypatch)
    rename, calls = Path.rename, []

    def interrupted(self: Path, target: Path) -> Path:
        calls.append(self)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        exchange_folders(new, old)

    assert which(old) == "old"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux's renameat2")
def test_names_that_the_file_system_stores_as_bytes_are_exchanged(tmp_path: Path) -> None:
    new, old = (tmp_path / os.fsdecode(name) for name in (b"new-\xff", "старый".encode()))
    new.mkdir()
    old.mkdir()
    (new / "which").write_text("new")

    exchange_folders(new, old)

    assert which(old) == "new"


INTERRUPTED = """
    import os, signal, sys, threading, time
    from pathlib import Path
    from te_export.bundle import exchange
    from te_export.bundle.staging import StagedBundle

    exchange._exchange_at_once = lambda first, second: False
    rename = Path.rename

    def rename_and_interrupt(self, target):
        done = rename(self, target)
        os.kill(os.getpid(), signal.SIGINT)  # to the process: any thread may be the one that gets it
        time.sleep(0.05)
        return done

    # A thread that does not hold signals back, as torch's and onnxruntime's do not.
    threading.Thread(target=time.sleep, args=(5,), daemon=True).start()
    target = Path(sys.argv[1])
    try:
        with StagedBundle(target, force=True) as staged:
            staged.write("which", [b"new"])
            Path.rename = rename_and_interrupt
            staged.publish()
    except KeyboardInterrupt:
        pass
"""


@pytest.mark.skipif(not hasattr(__import__("signal"), "pthread_sigmask"), reason="needs POSIX signals")
def test_an_interrupt_between_the_renames_of_a_program_with_threads(tmp_path: Path) -> None:
    target = tmp_path / "old"
    target.mkdir()

    subprocess.run([sys.executable, "-c", textwrap.dedent(INTERRUPTED), str(target)], timeout=60, check=True)

    assert target.is_dir()
