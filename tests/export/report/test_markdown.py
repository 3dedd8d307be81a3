"""report.md: latency, layers and variants that are left out; Markdown of the kind that a hostile name cannot leave."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

import te_export
from te_export.options import FailedVariant
from te_export.report.markdown import render_report
from te_runtime.manifest import GraphLatency, Latency, LayerAccuracy, LayerLoss, Manifest, TaskAccuracy

REASON = "int8 is left out: dynamic: task_0 loses 4.00 points, allowed 0.5; keeping layers did not mend it"


@pytest.fixture
def manifest(exported: te_export.ExportResult) -> Manifest:
    return exported.manifest


def lower(manifest: Manifest, layers: tuple[LayerAccuracy, ...]) -> Manifest:
    """The same with its variant as an int8 one beside it."""
    (fp32,) = manifest.variants
    accuracy = tuple(
        TaskAccuracy(name, "probe rows", 320, "relative error", 0.1, 10.0, None, None, None, 1e-3, None, None)
        for name in manifest.task_names
    )
    int8 = fp32._replace(precision="int8", form="dynamic", accuracy=accuracy, layers=layers)
    return manifest._replace(variants=(fp32, int8))


def rendered(manifest: Manifest, exported: te_export.ExportResult, *left_out: FailedVariant) -> str:
    return render_report(manifest, (), exported.rewrites, left_out=left_out)


def test_what_was_not_measured_is_said_and_how_to_measure_it(exported: te_export.ExportResult) -> None:
    text = rendered(exported.manifest, exported)
    assert "## Latency\n\nNot measured; `te-export --measure-latency` does.\n" in text
    assert "left out" not in text
    assert "what each layer costs" not in text


def test_latency(manifest: Manifest, exported: te_export.ExportResult) -> None:
    (variant,) = manifest.variants
    paths = [variant.joint.path, *(graphs.graph.path for graphs in variant.tasks)]
    graphs = tuple(
        GraphLatency(path, batch, 100.0 + batch, 90.0, 400.0, 7, 1.0)
        for path in paths
        for batch in (1, 8, 64)
    )
    measured = manifest._replace(latency=Latency("A | CPU <b>", "1.31.1", "cpu", 1, graphs))

    text = rendered(measured, exported)

    assert "Measured on A \\| CPU &lt;b>, onnxruntime 1.31.1 on cpu, one thread." in text
    assert "| all tasks | fp32 | 8 | 108 µs | 1.00x | 90.0 µs to 400 µs | 7 |" in text
    for task in manifest.task_names:
        assert f"| {task} | fp32 | 64 | 164 µs | 1.00x | 90.0 µs to 400 µs | 7 |" in text


def test_layers(manifest: Manifest, exported: te_export.ExportResult) -> None:
    task = manifest.task_names[1]
    shared = LayerAccuracy(
        ("a.0.w", "a.1.w"), 4_096, None, "converted", LayerLoss(task, 0.5, 0.25, 0.005, 0.0025)
    )
    own = LayerAccuracy(("head.w",), 128, (task,), "converted", None)

    text = rendered(lower(manifest, (shared, own)), exported)

    assert "### int8: what each layer costs" in text
    assert f"| a.{{0…1}}.w | 8 bits | 0.250 | 0.500 | {task} | 4,096 |" in text
    assert f"| head.w | 8 bits | not measured | - | - | {task} | 128 |" in text
    assert "1 of 2 rows were not measured" in text
    assert "<details>" not in text


def test_many_layers_are_folded(manifest: Manifest, exported: te_export.ExportResult) -> None:
    layers = tuple(LayerAccuracy((f"w{place}x",), 1, None, "converted", None) for place in range(60))

    text = rendered(lower(manifest, layers), exported)

    assert "<details><summary>int8, layers that every task reads (60 rows)</summary>\n\n| weights |" in text
    assert text.count("<details>") == text.count("</details>") == 1
    assert "| w59x |" in text


def test_variants_that_are_left_out(manifest: Manifest, exported: te_export.ExportResult) -> None:
    text = rendered(
        manifest, exported, FailedVariant("int8", REASON), FailedVariant("fp16", "fp16: a\nb <i>c")
    )

    assert "## Variants that were asked for and are left out" in text
    assert f"\n- int8: {REASON.removeprefix('int8 is left out: ')}\n" in text
    assert "\n- fp16: a b &lt;i>c\n" in text


@pytest.mark.parametrize("name", ["</summary><script>", "a|b\nc", "# h\n\n# i", "`x`\n- y"])
def test_no_name_of_a_weight_leaves_its_cell(
    name: str, manifest: Manifest, exported: te_export.ExportResult
) -> None:
    def shape(text: str) -> list[str]:
        return [re.sub(r"[^|#<>-].*", "", line) for line in text.splitlines()]

    layer = LayerAccuracy(("plain",), 1, None, "converted", None)
    plain = rendered(lower(manifest, (layer,)), exported, FailedVariant("int4", "plain"))

    hostile = rendered(
        lower(manifest, (layer._replace(weights=(name,)),)), exported, FailedVariant("int4", name)
    )

    assert shape(hostile) == shape(plain)
    assert "<script" not in hostile
    assert [line.replace("\\|", "").count("|") for line in hostile.splitlines()] == [
        line.count("|") for line in plain.splitlines()
    ]


def test_the_same_bundle_gives_the_same_report(exported: te_export.ExportResult) -> None:
    failed = FailedVariant("int8", REASON)
    assert rendered(exported.manifest, exported, failed) == rendered(
        exported.manifest, exported, replace(failed)
    )
