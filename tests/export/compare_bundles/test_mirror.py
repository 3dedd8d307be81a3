"""Laws of a comparison, over bundles that differ at random: nothing between equal ones, and B to A mirrors A to B."""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from te_export.compare_bundles import diff
from te_export.compare_bundles.result_json import diff_object
from te_export.compare_bundles.text import diff_lines

NAMES = st.lists(st.sampled_from(["a", "b", "c", "d"]), min_size=1, max_size=3, unique=True)
BUNDLES = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 1),
        "experts": st.integers(2, 3),
        "outputs": NAMES.map(lambda names: {name: 1 + (name == "d") for name in names}),
        "gated": st.booleans(),
        "trunk": st.booleans(),
        "two_inputs": st.booleans(),
        "standalone": st.booleans(),
    }
)
STATUSES = {"added": "removed", "removed": "added"}
quick = settings(max_examples=25, deadline=None, derandomize=True)


def mirrored(value: Any) -> Any:
    """What comparing the other way round should give: before and after, and what follows from them, exchanged."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        found = {other_name(key): mirrored(entry) for key, entry in value.items()}
        if "status" in found:
            found["status"] = STATUSES.get(found["status"], found["status"])
        return found
    if isinstance(value, tuple | list):
        return [mirrored(entry) for entry in value]
    return value


def other_name(name: object) -> object:
    for one, other in (("before", "after"), ("added", "removed")):
        for old, new in ((one, other), (other, one)):
            if isinstance(name, str) and (
                name == old or name.endswith(f"_{old}") or name.startswith(f"{old}_")
            ):
                return name.replace(old, new)
    return {"a": "b", "b": "a"}.get(name, name) if isinstance(name, str) else name


def plain(value: Any) -> Any:
    return mirrored(mirrored(value))


def as_set(value: Any) -> Any:
    """Lists without their order: A's entries come first in either direction."""
    if isinstance(value, dict):
        return {key: as_set(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return sorted(map(as_set, value), key=lambda entry: json.dumps(entry, sort_keys=True))
    return value


@quick
@given(options=BUNDLES)
def test_equal_bundles_have_no_differences(options: dict[str, Any], tiny: ModuleType) -> None:
    with tempfile.TemporaryDirectory() as folder:
        tiny.write_tiny_bundle(Path(folder, "a"), **options)
        shutil.copytree(Path(folder, "a"), Path(folder, "b"))

        found = diff(Path(folder, "a"), Path(folder, "b"))

    assert not found.is_different
    assert list(diff_lines(found, verbose=True)) == ["no differences"]
    told = diff_object(found, exit_code=0)
    assert told["different"] is False
    assert all(weight["status"] == "same" for weight in told["weights"])  # type: ignore[attr-defined]


@quick
@given(one=BUNDLES, other=BUNDLES)
def test_the_other_way_round_is_the_mirror_image(
    one: dict[str, Any], other: dict[str, Any], tiny: ModuleType
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        tiny.write_tiny_bundle(Path(folder, "a"), **one)
        tiny.write_tiny_bundle(Path(folder, "b"), **other)

        there = diff(Path(folder, "a"), Path(folder, "b"))
        back = diff(Path(folder, "b"), Path(folder, "a"))

    assert as_set(mirrored(back)) == as_set(plain(there))
    assert there.is_different == (repr(one) != repr(other))  # the order of tasks too
    for found in (there, back):
        json.dumps(diff_object(found, exit_code=0), allow_nan=False)
        assert all(len(line) < 400 for line in diff_lines(found, verbose=True))
