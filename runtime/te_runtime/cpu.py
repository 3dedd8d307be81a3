"""The CPU: its model, the instructions that ONNX Runtime's kernels are written for, and how much of it is ours."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Cpu", "parse_cpuinfo"]

# What to look for → the names that /proc/cpuinfo gives it (x86 `flags`, Arm `Features`).
_X86_FEATURES = {
    "avx2": ("avx2",),
    "avx512f": ("avx512f",),
    "avx512_vnni": ("avx512_vnni", "avx_vnni"),
    "amx": ("amx_tile",),
}
_ARM_FEATURES = {
    "neon": ("asimd", "neon"),
    "fp16": ("asimdhp",),
    "dotprod": ("asimddp",),
    "i8mm": ("i8mm",),
    "sve": ("sve",),
}


@dataclass(frozen=True)
class Cpu:
    """The CPU of a machine.

    Attributes:
        model: its name, or the architecture's where the system tells no name.
        architecture: for example `x86_64`, `aarch64`.
        features: instruction set → whether it is there; empty where this was not looked at.
        usable: how many CPUs this process may use.
        total: how many the machine has.
    """

    model: str
    architecture: str
    features: dict[str, bool]
    usable: int
    total: int


def parse_cpuinfo(text: str, *, architecture: str, usable: int, total: int) -> Cpu:
    """Read the text of /proc/cpuinfo.

    Args:
        text: the file, or nothing where the system has none.
        architecture: as platform.machine() names it.
        usable: CPUs that this process may use.
        total: CPUs of the machine.
    """
    fields: dict[str, str] = {}
    for line in text.splitlines():
        key, separator, value = line.partition(":")
        if separator:
            fields.setdefault(key.strip().lower(), value.strip())
    model = fields.get("model name") or fields.get("hardware") or architecture
    known = _ARM_FEATURES if architecture.lower() in ("aarch64", "arm64", "armv7l") else _X86_FEATURES
    found = set((fields.get("flags") or fields.get("features") or "").split())
    features = {name: not found.isdisjoint(names) for name, names in known.items()} if found else {}
    return Cpu(model, architecture, features, usable, total)
