from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

STOPPED_WHILE_WRITING = """
import os, signal, sys, time
import numpy
from te_runtime import entry
real, name = numpy.savez, sys.argv.pop()
def savez(*arguments, **options):
    real(*arguments, **options)
    os.kill(os.getpid(), getattr(signal, name))
    time.sleep(10)
numpy.savez = savez
entry.main()
"""

STOPPED_WHILE_IMPORTING = """
import os, signal, sys
from te_runtime import entry
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "te_runtime.cli":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder())
entry.main()
"""


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="needs POSIX signals, as on Linux and macOS")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT"])
def test_a_signal_leaves_no_file_behind(pristine: Path, tmp_path: Path, name: str) -> None:
    np.save(tmp_path / "x.npy", np.zeros((2, 6), dtype=np.float32))
    arguments = ["run", str(pristine), str(tmp_path / "x.npy"), name]
    done = subprocess.run(
        [sys.executable, "-c", STOPPED_WHILE_WRITING, *arguments], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 130, done.stderr
    assert "error: interrupted; no file was left half written" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["x.npy"]


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals, as on Linux and macOS")
def test_an_interrupt_while_importing_shows_no_traceback() -> None:
    done = subprocess.run(
        [sys.executable, "-c", STOPPED_WHILE_IMPORTING], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (130, "")
