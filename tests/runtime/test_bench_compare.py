"""`te-runtime bench --compare…`: another bundle, another precision and another mode."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from te_runtime.bench_compare import check_comparable, resolve_other
from te_runtime.bench_options import LoadOptions, Other
from te_runtime.bench_rows import BenchRows
from te_runtime.cli import main
from te_runtime.errors import InputError
from te_runtime.manifest import TensorSpec, parse_manifest, serialize_manifest

QUICK = ("--duration", "0.02", "--threads", "1", "--scenario", "single-stream")


@pytest.fixture(scope="module")
def two_variants(tiny: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny bundle, once more under the name of another precision: what is compared are names, not numbers."""
    root: Path = tmp_path_factory.mktemp("variants") / "tiny-onnx"
    tiny.write_tiny_bundle(root, standalone=False)
    shutil.copytree(root / "fp32", root / "fp16")
    manifest = parse_manifest((root / "manifest.json").read_bytes(), "manifest.json")
    (whole,) = manifest.variants

    def moved(spec: Any) -> Any:
        return spec._replace(path=spec.path.replace("fp32/", "fp16/"))

    half = whole._replace(
        precision="fp16",
        weights="fp16/weights.bin",
        joint=moved(whole.joint),
        trunk=moved(whole.trunk),
        joint_tails=moved(whole.joint_tails),
        tasks=tuple(task._replace(graph=moved(task.graph), tail=moved(task.tail)) for task in whole.tasks),
    )
    changed = manifest._replace(variants=(whole, half), files=tiny.list_files(root))
    (root / "manifest.json").write_bytes(serialize_manifest(changed))
    return root


def bench(*arguments: object) -> Result:
    result = CliRunner().invoke(main, ["bench", *map(str, arguments), *QUICK])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    return result


def ran(*arguments: object) -> list[tuple[str, str, str]]:
    """The folder, precision and mode of what took turns."""
    result = bench(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout, parse_constant=pytest.fail)
    loaded = [(each["bundle"], each["precision"], each["plan"]["mode"]) for each in found["bundles"]]
    (measured,) = found["results"]
    assert [(each["bundle"], each["precision"], each["mode"]) for each in measured["bundles"]] == loaded
    assert measured["ratio"]["pairs"] == measured["bundles"][0]["calls"] == measured["bundles"][1]["calls"]
    return [(Path(path).name, precision, mode) for path, precision, mode in loaded]


@pytest.mark.parametrize(
    ("arguments", "first", "second"),
    [
        (("--compare-precision", "fp16"), ("fp32", "split"), ("fp16", "split")),
        (
            ("--precision", "fp16", "--compare-precision", "fp32", "--mode", "joint"),
            ("fp16", "joint"),
            ("fp32", "joint"),
        ),
        (("--compare-mode", "task"), ("fp32", "split"), ("fp32", "task")),
        (("--compare-precision", "fp16", "--compare-mode", "joint"), ("fp32", "split"), ("fp16", "joint")),
    ],
)
def test_one_bundle_is_compared_with_itself_otherwise_loaded(
    two_variants: Path, arguments: tuple[str, ...], first: tuple[str, str], second: tuple[str, str]
) -> None:
    assert ran(two_variants, *arguments) == [("tiny-onnx", *first), ("tiny-onnx", *second)]


def test_another_bundle_in_another_precision(two_variants: Path, bundle: Path) -> None:
    assert ran(bundle, "--compare", two_variants, "--compare-precision", "fp16") == [
        ("tiny-onnx", "fp32", "split"),
        ("tiny-onnx", "fp16", "split"),
    ]
    assert bench(bundle, "--compare", bundle).exit_code == 0  # on purpose, to see the noise


def test_settings_say_what_was_asked_for(two_variants: Path) -> None:
    found = json.loads(bench(two_variants, "--compare-precision", "fp16", "--json").stdout)
    assert found["settings"]["compare"] == {"bundle": None, "precision": "fp16", "mode": None}
    assert json.loads(bench(two_variants, "--json").stdout)["settings"]["compare"] is None


def test_the_text_names_both(two_variants: Path) -> None:
    text = bench(two_variants, "--compare-precision", "fp16").stdout
    assert f"A: {two_variants}, fp32 on cpu\n" in text
    assert f"B: {two_variants}, fp16 on cpu\n" in text
    assert "  A over B " in text
    assert "loaded second" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--compare-precision", "fp32"), "both would run fp32 in mode split"),
        (("--compare-mode", "split"), "both would run fp32 in mode split"),
        (
            ("--compare-precision", "int8"),
            "which is compared with: precision of this bundle: found 'int8', expected 'fp32' or 'fp16'",
        ),
        (("--compare-mode", "pruned"), "no pruned graph"),
        (("--compare-mode", "whole"), "'--compare-mode': 'whole' is not one of"),
        (("--compare-precision", "fp16", "--scenario", "server", "--p99-ms", "9"), "leave one of them out"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    two_variants: Path, arguments: tuple[str, ...], message: str
) -> None:
    result = bench(two_variants, *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr


def test_what_is_not_said_of_the_second_is_as_for_the_first() -> None:
    load = LoadOptions(precision="int8", mode="joint", threads=3)
    assert resolve_other(Path("a"), load, Other(Path("b"))) == (Path("b"), load)
    assert resolve_other(Path("a"), load, Other(precision="fp32", mode="task")) == (
        Path("a"),
        replace(load, precision="fp32", mode="task"),
    )


def rows_of(*inputs: TensorSpec) -> BenchRows:
    return BenchRows(inputs, {"x": np.zeros((2, 6))}, "ordinary", 2, ("click",))


X, Z = TensorSpec("x", "float32", ("batch", 6)), TensorSpec("z", "int64", ("batch", "length"))


def test_inputs_in_another_order_and_axes_of_another_name_are_the_same_inputs() -> None:
    check_comparable(
        rows_of(X, Z), rows_of(Z._replace(shape=("rows", "words")), X._replace(shape=("rows", 6)))
    )


@pytest.mark.parametrize(
    "other",
    [
        (X,),
        (X, Z, X._replace(name="y")),
        (X, Z._replace(dtype="int32")),
        (X._replace(shape=("batch", 7)), Z),
        (X, Z._replace(shape=("batch", 4))),
    ],
)
def test_other_inputs_are_refused(other: tuple[TensorSpec, ...]) -> None:
    with pytest.raises(InputError, match=r"this one x float32 \(batch, 6\), z int64 \(batch, length\)"):
        check_comparable(rows_of(X, Z), rows_of(*other))
