"""What the manifest says of a variant's layers: read back to the digit, and refused where it contradicts itself."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from te_runtime.errors import BundleError
from te_runtime.manifest import (
    LayerAccuracy,
    LayerLoss,
    Manifest,
    parse_manifest,
    seal_manifest,
    serialize_manifest,
)

SHARED = LayerAccuracy(
    ("backbone.w", "experts.w"), 96, None, "converted", LayerLoss("task_1", 0.5, 0.25, 1e-3, 5e-4)
)
KEPT = LayerAccuracy(("task_0.gate.w",), 48, ("task_0",), "kept", LayerLoss("task_0", None, 0.0, None, 0.0))
UNMEASURED = LayerAccuracy(("task_1.gate.w",), 48, ("task_1",), "converted", None)
PLAIN = LayerAccuracy(("task_1.head.w",), 8, ("task_1",), "float32", None)


@pytest.fixture(scope="module")
def manifest(pristine: Path) -> Manifest:
    found = parse_manifest((pristine / "manifest.json").read_bytes(), "manifest.json")
    (variant,) = found.variants
    layers = (SHARED, KEPT, UNMEASURED, PLAIN)
    return found._replace(variants=(variant._replace(kept_weights=KEPT.weights, layers=layers),))


def as_object(manifest: Manifest) -> dict[str, Any]:
    parsed = json.loads(serialize_manifest(manifest))
    assert isinstance(parsed, dict)
    return parsed


def read(changed: dict[str, Any]) -> Manifest:
    return parse_manifest(seal_manifest(json.dumps(changed).encode()), "here/manifest.json")


def test_layers_are_read_back(manifest: Manifest) -> None:
    data = serialize_manifest(manifest)
    found = parse_manifest(data, "manifest.json")
    assert found.variants[0].layers == (SHARED, KEPT, UNMEASURED, PLAIN)
    assert serialize_manifest(found) == data


def test_a_manifest_from_before_has_no_key(manifest: Manifest) -> None:
    changed = as_object(manifest)
    del changed["variants"][0]["layers"]
    assert read(changed).variants[0].layers == ()


def layer(m: dict[str, Any], place: int = 0) -> dict[str, Any]:
    found = m["variants"][0]["layers"][place]
    assert isinstance(found, dict)
    return found


ATTACKS: list[tuple[str, Callable[[dict[str, Any]], object], str]] = [
    ("another type", lambda m: m["variants"][0].update(layers={}), "layers: expected array, found object"),
    ("unknown key", lambda m: layer(m).update(bits=8), "layers[0]: unknown key 'bits'"),
    ("missing key", lambda m: layer(m).pop("held"), "layers[0]: key 'held' is missing"),
    ("no weights", lambda m: layer(m).update(weights=[]), "weights is empty"),
    ("a weight without a name", lambda m: layer(m).update(weights=[""]), "weights is empty, or a name"),
    ("a weight of control characters", lambda m: layer(m).update(weights=["\x1b"]), "cannot be printed"),
    ("a weight twice", lambda m: layer(m).update(weights=["w", "w"]), "'w' stands twice in layers"),
    (
        "a weight in two layers",
        lambda m: layer(m, 3).update(weights=["backbone.w"]),
        "'backbone.w' stands twice in layers",
    ),
    ("no parameters", lambda m: layer(m).update(parameters=0), "parameters of layers of 'backbone.w'"),
    ("parameters below zero", lambda m: layer(m).update(parameters=-1), "are out of bounds: -1"),
    ("read by none", lambda m: layer(m).update(tasks=[]), "expected null for every task"),
    ("no such task", lambda m: layer(m).update(tasks=["t", "task_1"]), "read by 't', which is no task"),
    ("a task twice", lambda m: layer(m).update(tasks=["task_1", "task_1"]), "a task stands twice"),
    ("held otherwise", lambda m: layer(m).update(held="int8"), "layers[0].held: expected 'converted'"),
    ("kept and not listed", lambda m: layer(m).update(held="kept"), "is not among kept_weights"),
    ("listed and not kept", lambda m: layer(m, 1).update(held="float32"), "is among kept_weights"),
    ("a loss of no task", lambda m: layer(m)["loss"].update(task="t"), "which does not read them"),
    ("a loss of another task", lambda m: layer(m, 1)["loss"].update(task="task_1"), "which does not read"),
    ("a loss that is text", lambda m: layer(m)["loss"].update(loss_points="1"), "loss_points: expected"),
    ("NaN", lambda m: layer(m)["loss"].update(loss_points=float("nan")), "NaN is not allowed"),
    ("infinite", lambda m: layer(m)["loss"].update(loss_points=float("inf")), "Infinity is not allowed"),
    ("an error below zero", lambda m: layer(m)["loss"].update(relative_error=-1e-9), "relative error of"),
    (
        "a spared error below zero",
        lambda m: layer(m)["loss"].update(spared_relative_error=-1.0),
        "relative error of",
    ),
]


@pytest.mark.parametrize(
    ("edit", "message"), [attack[1:] for attack in ATTACKS], ids=[attack[0] for attack in ATTACKS]
)
def test_what_contradicts_itself_is_refused(
    manifest: Manifest, edit: Callable[[dict[str, Any]], object], message: str
) -> None:
    changed = as_object(manifest)
    edit(changed)
    with pytest.raises(BundleError, match=re.escape(message)) as caught:
        read(changed)
    assert str(caught.value).startswith("here/manifest.json: ")
    assert len(str(caught.value)) < 700
