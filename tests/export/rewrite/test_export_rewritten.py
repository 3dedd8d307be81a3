"""Whole exports at both levels and for both providers: the same answers, said so in manifest and reports."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import pytest
import torch

import te_export
import te_runtime
from te_export.errors import UsageError
from te_export.report.machine import result_object
from te_export.report.terminal import result_lines
from te_runtime.manifest import parse_manifest

LEVELS = [("none", "cpu"), ("exact", "cpu"), ("exact", "cuda")]
Results = dict[tuple[str, str], te_export.ExportResult]


@pytest.fixture(scope="module")
def results(make_model: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Results:
    """One checkpoint exported in every way, at the oldest opset as well as the newest."""
    folder = tmp_path_factory.mktemp("levels")
    torch.save(make_model(seed=3).state_dict(), folder / "model.pt")
    return {
        (level, provider): te_export.export(
            folder / "model.pt",
            folder / f"{level}-{provider}",
            te_export.ExportOptions(
                optimize=level,  # type: ignore[arg-type]
                provider=provider,  # type: ignore[arg-type]
                opset=18 if provider == "cuda" else None,
                standalone=True,
            ),
        )
        for level, provider in LEVELS
    }


def test_every_way_gives_the_same_answers_within_parity(results: Results) -> None:
    """Each graph is within its bound of the oracle, so two are within the sum of theirs of one another."""
    x = np.random.default_rng(0).standard_normal((16, 20)).astype(np.float32)
    answers = {}
    for way, result in results.items():
        with te_runtime.load(result.bundle) as model:
            answers[way] = model.predict(x)
    for way, result in results.items():
        for index, task in enumerate(result.manifest.tasks):
            for output, name in (("prediction", "output"), ("routing_weights", "routing_weights")):
                bounds = [
                    getattr(results[one].manifest.variants[0].parity[index], output).groups[0].bound
                    for one in (way, ("none", "cpu"))
                ]
                found, captured = (getattr(answers[one][task.name], name) for one in (way, ("none", "cpu")))
                np.testing.assert_allclose(found, captured, rtol=0, atol=sum(bounds))


@pytest.mark.parametrize("way", LEVELS, ids="-".join)
def test_the_manifest_says_how_it_was_rewritten(way: tuple[str, str], results: Results) -> None:
    bundle = results[way].bundle
    (variant,) = parse_manifest((bundle / "manifest.json").read_bytes(), "manifest.json").variants

    assert (variant.optimized, variant.target_provider) == way


def test_the_graphs_are_those_of_the_level_and_the_provider(results: Results) -> None:
    counts = {}
    for way, result in results.items():
        graph = onnx.load(result.bundle / "fp32/joint.onnx", load_external_data=False).graph
        counts[way] = [node.op_type for node in graph.node]

    assert counts["none", "cpu"].count("Softmax") == 3
    assert counts["exact", "cpu"].count("Softmax") == counts["exact", "cuda"].count("Softmax") == 1
    # Backbone 2, experts, gates, and the last layers of heads of 4, 1 and 4 outputs.
    assert counts["exact", "cuda"].count("Gemm") == 7
    assert len(counts["exact", "cuda"]) <= len(counts["exact", "cpu"]) < len(counts["none", "cpu"])


def test_reports_have_the_table_of_what_was_gained(results: Results) -> None:
    result = results["exact", "cpu"]
    joint = result.rewrites.costs[0]
    report = (result.bundle / "report.md").read_text()
    plain = "\n".join(result_lines(result, verbose=False))
    wordy = "\n".join(result_lines(result, verbose=True))

    for text in (report, plain):
        for figure in (joint.before.multiply_adds, joint.after.multiply_adds, joint.after.weight_bytes):
            assert f"{figure:,}" in text
    assert "Exact rewrites, for cpu" in report
    assert "fold_linears at backbone.network.6: folded into the 3 layers" in report
    assert "rewritten: fold_linears at backbone.network.6" in wordy
    assert "rewritten:" not in plain
    untouched = results["none", "cpu"]
    assert untouched.rewrites.costs == ()
    assert "Exact rewrites" not in (untouched.bundle / "report.md").read_text()
    assert "multiply-adds" not in "\n".join(result_lines(untouched, verbose=True))


def test_what_was_left_alone_is_said_with_the_reason(results: Results) -> None:
    result = dataclasses.replace(results["exact", "cpu"])
    told: Any = json.loads(json.dumps(result_object(result)))
    wordy = "\n".join(result_lines(result, verbose=True))

    declined = told["rewrites"]["declined"]
    assert {entry["rule"] for entry in declined} == {"batch_linears", "turn_heads"}
    for entry in declined:
        assert f"left alone: {entry['rule']} left {entry['where']}: {entry['reason']}" in wordy
    assert {entry["rule"] for entry in told["rewrites"]["applied"]} >= {"fold_linears", "block_gates"}
    assert told["rewrites"]["costs"][0]["graph"] == "joint"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimize": "fast"}, "optimize: got 'fast', expected one of none, exact"),
        ({"provider": "tpu"}, "provider: got 'tpu', expected one of cpu, cuda"),
    ],
)
def test_other_levels_and_providers_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        te_export.ExportOptions(**changes)


@pytest.mark.parametrize("option", [("--optimize", "none"), ("--provider", "cuda")])
def test_the_command_takes_them(
    option: tuple[str, str], results: Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from click.testing import CliRunner

    from te_export.cli import command

    checkpoint = results["none", "cpu"].bundle.parent / "model.pt"
    called = CliRunner().invoke(command, [str(checkpoint), "-o", str(tmp_path / "out"), "-q", *option])

    assert called.exit_code == 0, called.output
    (variant,) = parse_manifest((tmp_path / "out/manifest.json").read_bytes(), "manifest.json").variants
    assert option[1] in (variant.optimized, variant.target_provider)


def test_parity_bounds_are_the_same_for_every_level(results: Results) -> None:
    """They follow from torch and the oracle alone."""
    levels: list[Literal["prediction", "routing_weights"]] = ["prediction", "routing_weights"]
    bounds = [
        [
            group.bound
            for parity in result.manifest.variants[0].parity
            for output in levels
            for group in getattr(parity, output).groups
        ]
        for result in results.values()
    ]
    assert bounds[0] == bounds[1] == bounds[2]
