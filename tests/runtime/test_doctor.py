from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
from click.testing import CliRunner

from te_runtime.cli import main
from te_runtime.doctor import Doctor, examine
from te_runtime.doctor_text import doctor_json, doctor_text


def told(doctor: Doctor) -> str:
    json.dumps(doctor_json(doctor), allow_nan=False)  # whatever the machine, it can be written
    return "\n".join(doctor_text(doctor))


def test_a_machine_with_everything(fake: ModuleType, tmp_path: Path) -> None:
    doctor = examine(fake.FakeMachine(folders=(tmp_path,)))
    assert doctor.works == ("cuda", "cpu")
    assert doctor.findings == ()
    text = told(doctor)
    for part in (
        "ok       CPU                Test CPU, x86_64, 2 of 4 CPUs usable",
        "ok       CPU features       avx2 yes, avx512f yes, avx512_vnni yes, amx no",
        "ok       onnxruntime        onnxruntime-gpu 1.31.1",
        "ok       NVIDIA driver      runs CUDA up to 13.0, onnxruntime is built for CUDA 13.0",
        "ok       GPU 0              NVIDIA Test GPU, 24.0 GB, capability 9.0",
        "ok       cuDNN              libcudnn.so.9, found by the loader",
        "ok       CUDA run           a graph ran",
        str(tmp_path),
        "provider cuda  works here",
        "provider auto  takes cuda",
    ):
        assert part in text
    assert "problem" not in text


def test_no_gpu(fake: ModuleType) -> None:
    doctor = examine(fake.FakeMachine(driver_found=fake.NO_DRIVER, kernel=None))
    assert doctor.works == ("cpu",)
    assert doctor.can_run
    text = told(doctor)
    assert "missing  NVIDIA driver      libcuda.so.1 does not load" in text
    assert "provider cuda  does not work here" in text
    assert "problem: no NVIDIA driver" in text
    assert "    fix: On a machine with an NVIDIA GPU install its driver" in text


def test_a_gpu_with_cudnn_missing(fake: ModuleType) -> None:
    linked = (*fake.NEEDS, "libcudnn.so.9")
    text = told(examine(fake.FakeMachine(needs=linked, on_loader_path=frozenset(fake.NEEDS))))
    assert "missing  cuDNN              libcudnn.so.9" in text
    assert "    fix: Run: pip install 'onnxruntime-gpu[cuda,cudnn]==1.31.1'" in text
    lazy = told(examine(fake.FakeMachine(on_loader_path=frozenset(fake.NEEDS))))
    assert "—        cuDNN              libcudnn.so.9 is not there" in lazy
    assert "provider cuda  works here" in lazy


def test_a_driver_too_old(fake: ModuleType) -> None:
    old = type(fake.DRIVER)((12, 4), (fake.GPU,), None)
    text = told(examine(fake.FakeMachine(driver_found=old)))
    assert "runs CUDA up to 12.4, onnxruntime is built for CUDA 13.0" in text
    assert "    fix: Update the driver to 580 or newer" in text


def test_both_flavours_at_once(fake: ModuleType) -> None:
    machine = fake.FakeMachine(installed={"onnxruntime": "1.30.0", "onnxruntime-gpu": "1.31.1"})
    doctor = examine(machine)
    assert not doctor.can_run
    text = told(doctor)
    assert (
        "broken   onnxruntime        installed together: onnxruntime 1.30.0, onnxruntime-gpu 1.31.1" in text
    )
    assert "    fix: Run: pip uninstall -y" in text
    assert machine.asked == []


def test_no_onnxruntime(fake: ModuleType) -> None:
    doctor = examine(fake.FakeMachine(installed={}))
    assert not doctor.can_run
    assert doctor.cuda is None
    text = told(doctor)
    assert "missing  onnxruntime        not installed" in text
    assert "provider cpu   does not work here" in text
    assert "provider auto" not in text


def test_a_cpu_on_which_nothing_runs(fake: ModuleType) -> None:
    problems = {"CPUExecutionProvider": "illegal", "CUDAExecutionProvider": "failure 35"}
    doctor = examine(fake.FakeMachine(problems=problems))
    assert doctor.works == ()
    text = told(doctor)
    assert "broken   CPU run            illegal" in text
    assert "pip install --force-reinstall onnxruntime-gpu" in text


def test_a_build_without_cuda(fake: ModuleType) -> None:
    machine = fake.FakeMachine(installed={"onnxruntime": "1.31.1"}, built_in=("CPUExecutionProvider",))
    text = told(examine(machine))
    assert "—        CUDA provider      onnxruntime was built without it" in text
    assert "provider auto  takes cpu" in text


@pytest.mark.parametrize(
    ("system", "part"), [("Windows", "which CUDA libraries"), ("Darwin", "CPU features")]
)
def test_other_systems_say_what_is_not_looked_at(fake: ModuleType, system: str, part: str) -> None:
    text = told(examine(fake.FakeMachine(system=system, needs=())))
    assert f"—        not looked at      {part}" in text


def test_the_command_on_this_machine() -> None:
    result = CliRunner().invoke(main, ["doctor"])
    assert result.exit_code == 0
    assert "provider cpu   works here" in result.stdout
    found = json.loads(CliRunner().invoke(main, ["doctor", "--json"]).stdout)
    assert found["can_run"] is True
    assert "cpu" in found["works"]


def test_the_command_exits_with_3_where_nothing_works(
    fake: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = examine(fake.FakeMachine(installed={}))
    monkeypatch.setattr("te_runtime.doctor.examine", lambda: broken)
    assert CliRunner().invoke(main, ["doctor"]).exit_code == 3
    result = CliRunner().invoke(main, ["doctor", "--json"])
    assert result.exit_code == 3
    assert json.loads(result.stdout)["works"] == []
