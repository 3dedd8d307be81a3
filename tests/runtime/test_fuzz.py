"""2,000 seeded corruptions of a bundle: each gives a BundleError or exactly the right answer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import te_runtime
from te_runtime import BundleError

RUNS, CORRUPTIONS_PER_RUN = 8, 250
X = np.random.default_rng(0).standard_normal((3, 6), dtype=np.float32)

Contents = dict[Path, bytes]


def flip_bits(rng: np.random.Generator, data: bytes) -> bytes:
    changed = bytearray(data)
    for place in rng.integers(len(data), size=int(rng.integers(1, 9))):
        changed[place] ^= 1 << int(rng.integers(8))
    return bytes(changed)


def cut_off(rng: np.random.Generator, data: bytes) -> bytes:
    return data[: int(rng.integers(len(data)))]


def zero_a_range(rng: np.random.Generator, data: bytes) -> bytes:
    start, stop = sorted(rng.integers(len(data) + 1, size=2).tolist())
    return data[:start] + bytes(stop - start) + data[stop:]


def append_bytes(rng: np.random.Generator, data: bytes) -> bytes:
    return data + rng.bytes(int(rng.integers(1, 5000)))


def swap_ranges(rng: np.random.Generator, data: bytes) -> bytes:
    a, b, c = sorted(rng.integers(len(data) + 1, size=3).tolist())
    return data[:a] + data[b:c] + data[a:b] + data[c:]


def repeat_a_range(rng: np.random.Generator, data: bytes) -> bytes:
    start, stop = sorted(rng.integers(len(data) + 1, size=2).tolist())
    return data[:stop] + data[start:stop] + data[stop:]


CHANGES: tuple[Callable[[np.random.Generator, bytes], bytes], ...] = (
    flip_bits,
    cut_off,
    zero_a_range,
    append_bytes,
    swap_ranges,
    repeat_a_range,
)


def corrupt(rng: np.random.Generator, contents: Contents) -> Contents:
    """New contents for one or two files; empty bytes for a file that is there no more."""
    paths = list(contents)
    one, other = (paths[i] for i in rng.choice(len(paths), size=2, replace=False))
    kind = int(rng.integers(len(CHANGES) + 3))
    if kind == len(CHANGES):
        return {one: contents[other], other: contents[one]}
    if kind == len(CHANGES) + 1:
        return {one: contents[other]}
    if kind == len(CHANGES) + 2:
        return {one: b""}
    return {one: CHANGES[kind](rng, contents[one])}


def outcome(root: Path, mode: str, expected: dict[str, tuple[np.ndarray, np.ndarray]]) -> str:
    try:
        with te_runtime.load(root, threads=1, mode=mode) as model:
            found = model.predict(X)
    except BundleError as error:
        return "error" if str(root) in str(error) else f"an error that does not say where: {error}"
    assert list(found) == list(expected)
    for task, (output, weights, _) in found.items():
        np.testing.assert_array_equal(output, expected[task][0])
        np.testing.assert_array_equal(weights, expected[task][1])
    return "right"


@pytest.mark.parametrize("seed", range(RUNS))
def test_a_corrupt_bundle_gives_an_error_or_the_right_answer(bundle: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    mode = ("joint", "split", "task")[seed % 3]
    with te_runtime.load(bundle, threads=1, mode=mode) as model:
        expected = {task: (output, weights) for task, (output, weights, _) in model.predict(X).items()}
    contents = {path: path.read_bytes() for path in sorted(bundle.rglob("*")) if path.is_file()}
    outcomes: Counter[str] = Counter()
    for _ in range(CORRUPTIONS_PER_RUN):
        changed = corrupt(rng, contents)
        for path, data in changed.items():
            path.write_bytes(data) if data else path.unlink()
        outcomes[outcome(bundle, mode, expected)] += 1
        for path in changed:
            path.write_bytes(contents[path])
    assert set(outcomes) <= {"error", "right"}
    assert outcomes["error"] >= 0.9 * CORRUPTIONS_PER_RUN  # the rest changed no byte, or swapped equal files
    assert outcome(bundle, mode, expected) == "right"
