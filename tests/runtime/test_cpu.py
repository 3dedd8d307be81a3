from __future__ import annotations

from te_runtime.cpu import parse_cpuinfo

X86 = "processor\t: 0\nmodel name\t: AMD EPYC\nflags\t\t: fpu sse2 avx2 avx512f avx_vnni\n\nmodel name\t: second\n"
ARM = "processor\t: 0\nBogoMIPS\t: 50.00\nFeatures\t: fp asimd asimddp\nHardware\t: Board X\n"


def test_an_x86_cpu() -> None:
    cpu = parse_cpuinfo(X86, architecture="x86_64", usable=1, total=2)
    assert (cpu.model, cpu.usable, cpu.total) == ("AMD EPYC", 1, 2)
    assert cpu.features == {"avx2": True, "avx512f": True, "avx512_vnni": True, "amx": False}


def test_an_arm_cpu() -> None:
    cpu = parse_cpuinfo(ARM, architecture="aarch64", usable=4, total=4)
    assert cpu.model == "Board X"
    assert cpu.features["neon"]
    assert cpu.features["dotprod"]
    assert not cpu.features["sve"]


def test_a_system_without_cpuinfo_claims_nothing() -> None:
    cpu = parse_cpuinfo("", architecture="arm64", usable=8, total=8)
    assert (cpu.model, cpu.features) == ("arm64", {})
