"""te_runtime runs without torch, onnx and te_export: by what its source imports, and by what a process ends up with."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import te_runtime

PACKAGE = Path(te_runtime.__file__).parent
FORBIDDEN = {"torch", "onnx", "onnx_ir", "onnxscript", "te_export", "ml_dtypes"}
ALLOWED = {"numpy", "click", "te_runtime"} | sys.stdlib_module_names
ALLOWED_IN = {"scheduling/prometheus.py": {"prometheus_client"}}  # an extra, imported by this file alone


def imported(path: Path) -> Iterator[tuple[str, int]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name.partition(".")[0], node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} is a relative import"
            yield (node.module or "").partition(".")[0], node.lineno


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.name)
def test_sources_import_numpy_click_and_the_standard_library_only(path: Path) -> None:
    allowed = ALLOWED | ALLOWED_IN.get(path.relative_to(PACKAGE).as_posix(), set())
    for name, line in imported(path):
        assert name in allowed, f"{path.name}:{line} imports {name}"
        assert name != "click" or path.stem.startswith("cli"), f"{path.name}:{line} imports click"


def modules_after(code: str) -> set[str]:
    program = f"{code}\nimport sys\nprint('\\n'.join(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return {name.partition(".")[0] for name in done.stdout.split()}


def test_import_loads_neither_onnxruntime_nor_click() -> None:
    loaded = modules_after("import te_runtime")
    assert not loaded & (FORBIDDEN | {"onnxruntime", "click"})


def test_the_doctor_s_help_and_the_cpu_ask_no_machine(pristine: Path) -> None:
    loaded = modules_after("from te_runtime.cli import main\nmain(['doctor', '-h'], standalone_mode=False)")
    assert not loaded & (FORBIDDEN | {"onnxruntime", "numpy"})
    program = f"import sys, te_runtime\nte_runtime.load({str(pristine)!r}).close()\n"
    modules_after(program + "assert not {'te_runtime.machine', 'te_runtime.cuda_check'} & set(sys.modules)")


def test_help_loads_no_onnxruntime() -> None:
    loaded = modules_after("from te_runtime.cli import main\nmain(['--help'], standalone_mode=False)")
    assert not loaded & (FORBIDDEN | {"onnxruntime"})


def test_predicting_and_verifying_load_no_torch(pristine: Path) -> None:
    loaded = modules_after(
        "import numpy, te_runtime\n"
        f"with te_runtime.load({str(pristine)!r}) as model:\n"
        "    model.predict(numpy.zeros((2, 6)))\n"
        "    assert model.verify().ok\n"
    )
    assert "onnxruntime" in loaded
    assert not loaded & FORBIDDEN


def test_the_public_names() -> None:
    assert te_runtime.__all__ == [
        "BundleError",
        "ClosedError",
        "CudaOptions",
        "DeadlineError",
        "InputError",
        "Mode",
        "Model",
        "Plan",
        "Prediction",
        "ProviderChoice",
        "ProviderError",
        "QueueFullError",
        "Scheduler",
        "SchedulerError",
        "SchedulerMetrics",
        "StallError",
        "TeRuntimeError",
        "Utilization",
        "load",
    ]
    for name in te_runtime.__all__:
        assert hasattr(te_runtime, name)


def test_bench_is_loaded_by_its_command_alone(pristine: Path) -> None:
    program = f"import sys, te_runtime\nte_runtime.load({str(pristine)!r}).close()\nfrom te_runtime.cli import main\n"
    modules_after(
        program + "assert not [name for name in sys.modules if name.startswith('te_runtime.bench')]"
    )
    loaded = modules_after("from te_runtime.cli import main\nmain(['bench', '-h'], standalone_mode=False)")
    assert not loaded & (FORBIDDEN | {"onnxruntime", "numpy"})
