"""Damaged and hostile bundles: each is refused with a BundleError that names the file, and none gives wrong numbers."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import te_runtime
from te_runtime import predictor
from te_runtime.bundle import open_bundle
from te_runtime.describe import bundle_json, bundle_text
from te_runtime.errors import BundleError
from te_runtime.interfaces import check_interfaces
from te_runtime.manifest import MAX_MANIFEST_BYTES, Manifest, parse_manifest, seal_manifest

X = np.random.default_rng(11).normal(size=(4, 6)).astype(np.float32)
FILES = (
    "golden.npz",
    "fp32/weights.bin",
    "fp32/joint.onnx",
    "fp32/trunk.onnx",
    "fp32/joint-tails.onnx",
    "fp32/tail-task_0.onnx",
    "fp32/tail-task_1.onnx",
    "fp32/task-task_0.onnx",
    "fp32/task-task_1.onnx",
    "fp32/standalone-task_0.onnx",
    "fp32/standalone-task_1.onnx",
)


def load_builder() -> ModuleType:
    """The runtime tests' bundle builder, however pytest imports tests."""
    name = "te_runtime_tiny_bundle"
    if name not in sys.modules:
        path = Path(__file__).parents[1] / "runtime" / "tiny_bundle.py"
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


TINY = load_builder()


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("attacked") / "tiny-onnx"
    TINY.write_tiny_bundle(root)
    return root


@pytest.fixture(scope="module")
def truth(pristine: Path) -> dict[str, te_runtime.Prediction]:
    return predicted(pristine)


@pytest.fixture
def bundle(pristine: Path, tmp_path: Path) -> Path:
    root = tmp_path / "tiny-onnx"
    shutil.copytree(pristine, root)
    return root


def predicted(root: Path) -> dict[str, te_runtime.Prediction]:
    with te_runtime.load(root, threads=1) as model:
        return model.predict(X)


def assert_same(found: dict[str, te_runtime.Prediction], truth: dict[str, te_runtime.Prediction]) -> None:
    assert list(found) == list(truth)
    for task, prediction in truth.items():
        np.testing.assert_array_equal(found[task].output, prediction.output)
        np.testing.assert_array_equal(found[task].routing_weights, prediction.routing_weights)


def refused(root: Path, name: str, message: str | None = None) -> None:
    with pytest.raises(BundleError, match=message) as caught:
        te_runtime.load(root, threads=1)
    text = str(caught.value)
    assert name in text
    assert "\n" not in text
    assert len(text) < 2000


def test_the_list_of_files_is_complete(pristine: Path) -> None:
    assert sorted(FILES) == [entry.path for entry in open_bundle(pristine).manifest.files]


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file(bundle: Path, name: str) -> None:
    (bundle / name).unlink()
    refused(bundle, name, "no such file")


@pytest.mark.parametrize("name", FILES)
def test_a_file_cut_off_or_grown(bundle: Path, name: str) -> None:
    data = (bundle / name).read_bytes()
    for changed in (data[:-1], data + b"\0", b""):
        (bundle / name).write_bytes(changed)
        refused(bundle, name, f"{len(changed)} bytes, expected {len(data)}")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("place", [0, 0.5, -1])
def test_a_flipped_byte(bundle: Path, name: str, place: float) -> None:
    data = bytearray((bundle / name).read_bytes())
    data[-1 if place == -1 else int(place * len(data))] ^= 0x40
    (bundle / name).write_bytes(data)
    refused(bundle, name, "sha256")


@pytest.mark.parametrize("name", FILES)
def test_a_symlink_instead_of_a_file(bundle: Path, tmp_path: Path, name: str) -> None:
    shutil.move(bundle / name, tmp_path / "elsewhere")
    (bundle / name).symlink_to(tmp_path / "elsewhere")
    refused(bundle, name, "is a symlink")


@pytest.mark.parametrize("name", FILES)
def test_a_folder_instead_of_a_file(bundle: Path, name: str) -> None:
    (bundle / name).unlink()
    (bundle / name).mkdir()
    refused(bundle, name, "is not a file")


def test_a_symlink_instead_of_a_folder(bundle: Path, tmp_path: Path) -> None:
    shutil.move(bundle / "fp32", tmp_path / "fp32")
    (bundle / "fp32").symlink_to(tmp_path / "fp32", target_is_directory=True)
    refused(bundle, "fp32", "is a symlink")


def test_a_file_instead_of_a_folder(bundle: Path) -> None:
    shutil.rmtree(bundle / "fp32")
    (bundle / "fp32").write_bytes(b"")
    refused(bundle, "fp32", "is not a folder")


@pytest.mark.skipif(
    not hasattr(os, "mkfifo"), reason="named pipes are a POSIX thing: runs on Linux and macOS"
)
def test_a_pipe_instead_of_a_file_does_not_hang(bundle: Path) -> None:
    for name in ("fp32/weights.bin", "manifest.json"):
        (bundle / name).unlink()
        os.mkfifo(bundle / name)
        refused(bundle, name, "is not a file")


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads everything: runs as a user"
)
def test_a_file_that_may_not_be_read(bundle: Path) -> None:
    (bundle / "golden.npz").chmod(0)
    refused(bundle, "golden.npz", "cannot be opened: Permission denied")


def test_a_symlink_instead_of_the_manifest(bundle: Path, tmp_path: Path) -> None:
    shutil.move(bundle / "manifest.json", tmp_path / "m")
    (bundle / "manifest.json").symlink_to(tmp_path / "m")
    refused(bundle, "manifest.json", "is a symlink")


def test_a_huge_manifest_is_not_read(bundle: Path) -> None:
    with (bundle / "manifest.json").open("r+b") as file:
        file.truncate(100 * 2**20)
    refused(bundle, "manifest.json", f"{100 * 2**20} bytes, expected at most {MAX_MANIFEST_BYTES}")


BEGINNING = '{"format": "te-export-bundle", "version": 1, '


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a te-export bundle"),
        ("\0" * 1000, "not a te-export bundle"),
        ("{}", "not a te-export bundle"),
        (BEGINNING, "not JSON"),
        (BEGINNING + '"model": ' + "[" * 500_000, "nested too deeply"),
        (BEGINNING + '"model": ' + '{"a":' * 500_000, "nested too deeply"),
        (BEGINNING + '"a": 1, "a": 1}', "stands twice"),
        (BEGINNING + '"format": "other"}', "stands twice"),
        (BEGINNING + '"a": NaN}', "NaN is not allowed"),
        (BEGINNING + '"a": 1}', "unknown key 'a'"),
        (BEGINNING + '"__class__": 1}', "unknown key '__class__'"),
        (BEGINNING + '"a": ' + "9" * 5000 + "}", "not JSON"),
        ('{"format": "te-export-bundle", "version": 99}', "version 99, this te_runtime reads version 1"),
        ('{"format": "te-export-bundle", "version": 1.0}', "not a te-export bundle"),
        ('{"format": "te-export-bundle", "version": "1"}', "not a te-export bundle"),
        ('{"version": 1, "format": "te-export-bundle"}', "not a te-export bundle"),
    ],
    ids=lambda value: value[:40],
)
def test_text_instead_of_a_manifest(bundle: Path, text: str, message: str) -> None:
    (bundle / "manifest.json").write_text(text)
    refused(bundle, "manifest.json", message)


def numbers(data: Any) -> Iterator[tuple[Any, Any]]:
    """Every number that is not a version, as the object or array that holds it and its place there."""
    entries = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, entry in list(entries):
        if isinstance(entry, int | float) and not isinstance(entry, bool) and key != "version":
            yield data, key
        else:
            yield from numbers(entry)


@pytest.mark.parametrize("number", ["1e999", "-1e999", "NaN", "Infinity", "1" + "0" * 400, "{}", "[[]]"])
def test_numbers_that_no_number_can_be(pristine: Path, number: str) -> None:
    data = json.loads((pristine / "manifest.json").read_text())
    places = list(numbers(data))
    assert len(places) > 100
    for holder, key in places[::3]:
        kept = holder[key]
        holder[key] = "NUMBER"
        with pytest.raises(BundleError, match=r"^m: "):
            parse_manifest(json.dumps(data).replace('"NUMBER"', number).encode(), "m")
        holder[key] = kept


@pytest.mark.parametrize(
    "path",
    [
        "../x",
        "/etc/passwd",
        "fp32/../../x",
        "C:\\x",
        "fp32\\x",
        "\\\\host\\x",
        "",
        ".",
        "..",
        "a\0b",
        "fp32/",
    ],
)
@pytest.mark.parametrize("place", ["files", "weights", "golden", "joint", "tail"])
def test_a_path_that_leaves_the_bundle(bundle: Path, path: str, place: str) -> None:
    def edit(data: dict[str, Any]) -> None:
        variant = data["variants"][0]
        if place == "weights":
            variant["weights"] = path
            return
        holder = {
            "files": data["files"][0],
            "golden": data["golden"],
            "joint": variant["joint"],
            "tail": variant["tasks"][0]["tail"],
        }[place]
        holder["path"] = path

    TINY.edit_manifest(bundle, edit)
    refused(bundle, "manifest.json", "is not allowed|cannot be printed")


def what_predictions_use(manifest: Manifest) -> tuple[object, ...]:
    """The manifest less the words, figures and names that no prediction depends on."""
    tasks = [
        (task.name, [(spec.dtype, spec.shape) for spec in (task.prediction, task.routing_weights)])
        for task in manifest.tasks
    ]
    variants = [
        (variant.precision, variant.weights, variant.joint, variant.trunk, variant.tasks)
        for variant in manifest.variants
    ]
    return manifest.inputs, tasks, variants, manifest.golden.path, manifest.files


def test_a_flipped_byte_anywhere_in_the_manifest_changes_no_prediction(pristine: Path) -> None:
    """Every flipped byte is refused. Where somebody also made the checksum true again, predictions are safe:

    changed paths, sizes, checksums and tensor names may pass that check; load() must then refuse them, by
    the files and the graphs.
    """
    data = (pristine / "manifest.json").read_bytes()
    truth = what_predictions_use(parse_manifest(data, "m"))
    rng = np.random.default_rng(5)
    let_through = []
    for place in range(0, len(data), 3):
        changed = bytearray(data)
        changed[place] ^= 1 << int(rng.integers(8))
        with pytest.raises(BundleError):
            parse_manifest(bytes(changed), "m")
        changed = bytearray(seal_manifest(bytes(changed)))
        try:
            manifest = parse_manifest(bytes(changed), "m")
            check_interfaces(manifest, "m")
        except BundleError:
            continue
        if what_predictions_use(manifest) != truth:
            let_through.append(bytes(changed))
    assert len(let_through) > 30
    kept = data
    try:
        for changed in let_through[:: max(1, len(let_through) // 100)]:
            (pristine / "manifest.json").write_bytes(changed)
            with pytest.raises(BundleError):
                te_runtime.load(pristine, threads=1)
    finally:
        (pristine / "manifest.json").write_bytes(kept)


def test_swapped_files_of_two_tasks(bundle: Path, truth: dict[str, te_runtime.Prediction]) -> None:
    """Both tails have the same interface, so that only checksums and the manifest tell them apart."""
    first, second = bundle / "fp32" / "tail-task_0.onnx", bundle / "fp32" / "tail-task_1.onnx"
    first.rename(bundle / "t")
    second.rename(first)
    (bundle / "t").rename(second)
    refused(bundle, "tail-task_", "bytes, expected|sha256")
    first.rename(bundle / "t")
    second.rename(first)
    (bundle / "t").rename(second)
    assert_same(predicted(bundle), truth)
    TINY.edit_manifest(
        bundle, lambda data: data["variants"][0]["tasks"][0]["tail"].update(path="fp32/tail-task_1.onnx")
    )
    refused(bundle, "manifest.json", "twice")


def external(model: Any, location: str, offset: int, length: int) -> None:
    for tensor in model.graph.initializer:
        if tensor.name == "backbone.w":
            TINY.set_external(tensor, location, offset, length)


@pytest.mark.parametrize(
    ("location", "offset", "length"),
    [
        ("weights.bin", 2**40, 120),
        ("weights.bin", 0, 2**40),
        ("weights.bin", 0, 8),
        ("weights.bin", -4096, 120),
        ("missing.bin", 0, 120),
        ("../outside.bin", 0, 120),
        ("../golden.npz", 0, 120),
        ("/etc/passwd", 0, 120),
        ("", 0, 120),
        ("link.bin", 0, 120),
    ],
)
def test_weights_out_of_reach(bundle: Path, location: str, offset: int, length: int) -> None:
    """The checksums are right: the exporter itself would have been wrong, or hostile."""
    (bundle.parent / "outside.bin").write_bytes(bytes(4096))
    (bundle / "fp32" / "link.bin").symlink_to(bundle.parent / "outside.bin")
    TINY.edit_graph(bundle, "trunk", lambda model: external(model, location, offset, length))
    (bundle / "fp32" / "link.bin").unlink()
    (bundle / "fp32" / "link.bin").symlink_to(bundle.parent / "outside.bin")
    TINY.edit_manifest(bundle, lambda data: drop_file(data, "fp32/link.bin"))
    refused(bundle, "fp32/trunk.onnx", "refuses it")


def drop_file(data: dict[str, Any], path: str) -> None:
    data["files"] = [entry for entry in data["files"] if entry["path"] != path]


def rename_input(model: Any) -> None:
    model.graph.input[0].name = "other"
    model.graph.node[0].input[0] = "other"


def double_input(model: Any) -> None:
    model.graph.input[0].type.tensor_type.elem_type = 11


def widen_input(model: Any) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 7


def add_input(model: Any) -> None:
    model.graph.input.add().CopyFrom(model.graph.input[0])
    model.graph.input[1].name = "more"


def fix_batch(model: Any) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 4


def drop_outputs(model: Any) -> None:
    del model.graph.output[:]


def unknown_operator(model: Any) -> None:
    model.graph.node[1].op_type = "Nonsense"


@pytest.mark.parametrize(
    "edit", [rename_input, double_input, widen_input, add_input, fix_batch, drop_outputs, unknown_operator]
)
@pytest.mark.parametrize("graph", ["trunk", "joint"])
def test_a_graph_with_another_interface(bundle: Path, graph: str, edit: Callable[[Any], None]) -> None:
    """The checksums are right, the graph is not what the manifest says."""
    TINY.edit_graph(bundle, graph, edit)
    with pytest.raises(BundleError, match=re.escape(f"fp32/{graph}.onnx")):
        with_verify(bundle)


def with_verify(root: Path) -> bool:
    with te_runtime.load(root, threads=1) as model:
        return model.verify().ok


def test_golden_rows_with_a_pickle(bundle: Path, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[Path]]:
            return (Path.touch, (tmp_path / "owned",))

    TINY.edit_golden(
        bundle, lambda arrays: arrays.update({"input.x": np.array([Evil()], dtype=object)}), pickled=True
    )
    with pytest.raises(BundleError, match=r"golden\.npz: .*pickled"):
        with_verify(bundle)
    assert not (tmp_path / "owned").exists()


def damage(rng: np.random.Generator, data: bytes) -> bytes:
    """Flip, cut, grow, overwrite, repeat or empty; never the same bytes."""
    changed = bytearray(data)
    kind = rng.integers(6)
    place = int(rng.integers(len(data)))
    if kind == 0:
        changed[place] ^= 1 << int(rng.integers(8))
    elif kind == 1:
        del changed[place:]
    elif kind == 2:
        changed[place:place] = rng.bytes(int(rng.integers(1, 64)))
    elif kind == 3:
        changed[place : place + 64] = rng.bytes(len(changed[place : place + 64]))
    elif kind == 4:
        changed[place:place] = changed[: int(rng.integers(1, 256))]
    else:
        changed = bytearray(rng.bytes(len(data)))
    return bytes(changed) if changed != data else b""


def error_of(call: Callable[[], object]) -> BundleError | None:
    """The BundleError that `call` raises, if it raises one; any other error fails the test."""
    try:
        call()
    except BundleError as error:
        return error
    return None


def test_random_damage_to_one_file_is_always_named(pristine: Path) -> None:
    """Whatever happens to a listed file, load() names it."""
    rng = np.random.default_rng(2024)
    for _ in range(250):
        name = FILES[rng.integers(len(FILES))]
        path = pristine / name
        kept = path.read_bytes()
        try:
            path.write_bytes(damage(rng, kept))
            refused(pristine, name)
        finally:
            path.write_bytes(kept)


def test_random_damage_to_the_manifest_is_refused_or_harmless(
    pristine: Path, truth: dict[str, te_runtime.Prediction]
) -> None:
    rng = np.random.default_rng(2025)
    path = pristine / "manifest.json"
    kept = path.read_bytes()
    try:
        for _ in range(250):
            path.write_bytes(damage(rng, kept))
            error = error_of(lambda: predicted(pristine))
            if error is None:
                assert_same(predicted(pristine), truth)
                opened = open_bundle(pristine)
                assert list(bundle_text(opened))
                assert json.dumps(bundle_json(opened), allow_nan=False)
            else:
                assert len(str(error)) < 2000
    finally:
        path.write_bytes(kept)


def test_random_damage_to_golden_rows_with_right_checksums(bundle: Path) -> None:
    """Only the reader of golden.npz stands between these bytes and memory: BundleError or a report, nothing else."""
    rng = np.random.default_rng(2026)
    path = bundle / "golden.npz"
    kept = path.read_bytes()
    for _ in range(100):
        path.write_bytes(damage(rng, kept))
        TINY.rehash(bundle)
        error = error_of(lambda: with_verify(bundle))
        assert error is None or "golden.npz" in str(error)


def test_a_bundle_replaced_while_it_is_loaded(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trunk of the old bundle and tails of the new one would give numbers that nobody ever checked."""
    other = tmp_path / "other"
    shutil.copytree(bundle, other)
    open_graphs = predictor._open

    def replaced_meanwhile(*args: Any, **kwargs: Any) -> object:
        executor = open_graphs(*args, **kwargs)
        bundle.rename(tmp_path / "old")
        other.rename(bundle)
        return executor

    monkeypatch.setattr(predictor, "_open", replaced_meanwhile)
    with pytest.raises(BundleError, match="replaced since it was opened"):
        te_runtime.load(bundle, threads=1)


def test_a_path_that_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="not valid text"):
        te_runtime.load(os.fsdecode(os.fsencode(tmp_path) + b"/m\xff"))
