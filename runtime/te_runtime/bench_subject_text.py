"""The lines of `te-runtime bench` on one bundle: what runs, what its cold start took, and its memory."""

from __future__ import annotations

from collections.abc import Iterator

from te_runtime.bench_memory import GpuMemory
from te_runtime.bench_page import Page, counted, shown_ms
from te_runtime.bench_subject import Subject
from te_runtime.describe import shown_bytes
from te_runtime.provider_text import choice_lines, shown_provider

__all__ = ["subject_lines"]


def subject_lines(page: Page, name: str, subject: Subject, *, is_second: bool) -> Iterator[str]:
    """What was loaded.

    Args:
        page: sets the lines.
        name: what the other lines call the bundle; empty where there is one.
        subject: the bundle.
        is_second: whether another one was loaded before it.
    """
    title = f"{subject.path}, {subject.precision} on {shown_provider(subject.choice)}"
    yield f"{name}: {title}" if name else title
    for line in choice_lines(subject.choice):
        yield from page.field("provider", line)
    graphs = counted(len(subject.plan.graphs), "graph")
    yield from page.field("mode", f"{subject.plan.mode}, {graphs}; {subject.plan.reason}")
    yield from page.field("threads", f"{subject.threads}")
    yield from page.field(
        "cold start",
        f"loaded in {shown_ms(subject.load_ns)} ms, first prediction in {shown_ms(subject.first_ns)} ms",
    )
    yield from page.field("memory", _memory(subject))
    if subject.gpu_memory is not None:
        yield from page.field("GPU memory", _gpu_memory(subject.gpu_memory))
    if is_second:
        yield from page.field(
            "", "loaded second: what onnxruntime sets up once for a process counts as the first one's"
        )


def _memory(subject: Subject) -> str:
    before, ready = subject.pss_before_bytes, subject.pss_ready_bytes
    if before is None or ready is None:
        return "not measured: only Linux tells a process's own share (PSS)"
    return (
        f"{shown_bytes(max(0, ready - before))} for the model, in main memory (PSS {shown_bytes(before)} before "
        f"loading, {shown_bytes(ready)} after the first prediction)"
    )


def _gpu_memory(found: GpuMemory) -> str:
    before, ready, more = found.before.used_bytes, found.ready.used_bytes, found.model_bytes
    if before is None or ready is None or more is None:
        return f"not measured: {found.problem}"
    return (
        f"{shown_bytes(max(0, more))} for the model (in use on the GPU, by whatever runs there: {shown_bytes(before)} "
        f"before loading, {shown_bytes(ready)} after the first prediction)"
    )
