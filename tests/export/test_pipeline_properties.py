"""The whole way, from a checkpoint to a prediction of te_runtime, over many configurations."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import te_export
import te_runtime
from te_export.models.task_expert import TaskExpertConfig, TaskExpertModel
from te_runtime.manifest import GroupParity, Manifest

MakeModel = Callable[..., TaskExpertModel]
Sizes = dict[str, object]


@st.composite
def sizes(draw: st.DrawFn) -> Sizes:
    return {
        "input_dim": draw(st.integers(1, 33)),
        "backbone_dim": draw(st.integers(1, 17)),
        "expert_dim": draw(st.integers(2, 11)),
        "num_experts": draw(st.integers(1, 5)),
        "task_output_dims": tuple(draw(st.lists(st.integers(1, 7), min_size=1, max_size=3))),
        "final_relu": draw(st.booleans()),
    }


def corner(
    input_dim: int, backbone_dim: int, expert_dim: int, num_experts: int, outputs: tuple[int, ...], relu: bool
) -> Sizes:
    return {
        "input_dim": input_dim,
        "backbone_dim": backbone_dim,
        "expert_dim": expert_dim,
        "num_experts": num_experts,
        "task_output_dims": outputs,
        "final_relu": relu,
    }


def largest_bound(manifest: Manifest, task: str, output: str, groups: tuple[str, ...]) -> float:
    """What the manifest allows an output to be off on rows like those of the groups."""
    (parity,) = [entry for entry in manifest.variants[0].parity if entry.task == task]
    found: tuple[GroupParity, ...] = getattr(parity, output).groups
    return max(group.bound for group in found if group.group in groups)


# Random trials are few, since each costs an export; they are the same in every run.
@settings(
    max_examples=4,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@example(sizes=corner(1, 1, 2, 1, (1,), False))  # everything as small as it can be
@example(sizes=corner(7, 5, 3, 1, (4, 2), True))  # one expert: every routing weight is 1
@example(sizes=corner(5, 3, 4, 64, (2,), False))  # many experts
@example(sizes=corner(6, 4, 2, 3, (1, 1, 1), True))  # heads of one unit, outputs of one column
@example(sizes=corner(9, 9, 9, 9, (9,), False))  # shapes do not tell which axis is which
@example(sizes=corner(33, 13, 7, 3, (5, 1), True))  # odd throughout
@given(sizes=sizes())
def test_any_configuration_predicts_as_torch_does(
    sizes: Sizes, make_model: MakeModel, tmp_path: Path
) -> None:
    model = make_model(11, **sizes)
    path = tmp_path / "model.pt"
    torch.save({"state_dict": model.state_dict(), "config": {"final_relu": sizes["final_relu"]}}, path)

    result = te_export.export(path, options=te_export.ExportOptions(force=True))

    config = TaskExpertConfig(**result.manifest.model.config)  # type: ignore[arg-type]
    assert vars(config) == vars(model.config)
    x = np.random.default_rng(1).standard_normal((9, model.config.input_dim)).astype(np.float32)
    wide = model.double()
    with te_runtime.load(result.bundle, threads=1) as loaded, torch.no_grad():
        assert loaded.tasks == tuple(f"task_{task}" for task in range(model.config.num_tasks))
        for rows in (1, 9):
            predictions = loaded.predict(x[:rows])
            for task, name in enumerate(loaded.tasks):
                expected, aux = wide(torch.from_numpy(x[:rows]).double(), task)
                found = predictions[name]
                for output, values, oracle in (
                    ("prediction", found.output, expected),
                    ("routing_weights", found.routing_weights, aux["gate_weights"]),
                ):
                    assert values is not None
                    assert values.shape == tuple(oracle.shape)
                    assert values.dtype == np.float32
                    # The bound that the export was judged by, on rows of the same kind; twice, for other rows.
                    allowed = 2 * largest_bound(result.manifest, name, output, ("ordinary",))
                    assert np.abs(values - oracle.numpy()).max() <= allowed
    shutil.rmtree(result.bundle)


def test_half_weights_stored_the_other_way_round_end_in_the_same_bundle(
    make_model: MakeModel, tmp_path: Path
) -> None:
    state = make_model(2, num_experts=2, task_output_dims=(2,)).half().state_dict()
    narrow, plain = tmp_path / "narrow.pt", tmp_path / "plain.pt"
    torch.save({n: t.t().contiguous() if t.ndim == 2 else t for n, t in state.items()}, narrow)
    torch.save({name: tensor.float() for name, tensor in state.items()}, plain)

    first, second = (te_export.export(path) for path in (narrow, plain))

    for entry in first.manifest.files:
        if not entry.path.startswith("report."):  # they hold the sha256 of the checkpoint, and the notes
            assert (first.bundle / entry.path).read_bytes() == (second.bundle / entry.path).read_bytes()
    assert [note.split()[0] for note in first.notes if note not in second.notes] == ["weights", "float16"]


def test_a_subset_of_tasks_is_cut_from_the_same_trunk(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model(4, task_output_dims=(2, 3, 5), num_experts=2)
    torch.save(model.state_dict(), tmp_path / "model.pt")

    options = te_export.ExportOptions(tasks=("c", "a"), task_names=("a", "b", "c"))
    result = te_export.export(tmp_path / "model.pt", options=options)

    x = torch.linspace(-2, 2, 3 * 20).reshape(3, 20)
    with te_runtime.load(result.bundle) as loaded, torch.no_grad():
        assert loaded.tasks == ("c", "a")
        found = loaded.predict(x.numpy())
        for name, task in (("a", 0), ("c", 2)):
            expected = model(x, task)[0].numpy()
            np.testing.assert_allclose(found[name].output, expected, rtol=0, atol=1e-5)
    assert "task_heads.1.head.3.bias" in result.manifest.model.unused_parameters
    assert not any("task-b" in entry.path for entry in result.manifest.files)


def test_the_result_says_what_is_on_disk(exported: te_export.ExportResult) -> None:
    on_disk = {
        str(path.relative_to(exported.bundle)): path.stat().st_size
        for path in exported.bundle.rglob("*")
        if path.is_file()
    }
    assert exported.published
    assert [step for step, _ in exported.step_seconds] == [
        "read", "capture", "rewrite", "partition", "reference", "write", "verify", "publish"
    ]  # fmt: skip
    assert {entry.path: entry.size_bytes for entry in exported.manifest.files} == {
        path: size for path, size in on_disk.items() if path != "manifest.json"
    }
    assert exported.size_bytes == sum(on_disk.values())
    for task, size in exported.task_size_bytes.items():
        path = exported.bundle / f"fp32/task-{task}.onnx"
        graph = onnx.load(path, load_external_data=False).graph
        lengths = [e.value for t in graph.initializer for e in t.external_data if e.key == "length"]
        assert size == path.stat().st_size + sum(map(int, lengths))


def test_a_list_of_steps_reaches_the_caller_in_order(make_model: MakeModel, tmp_path: Path) -> None:
    told: list[tuple[str, str]] = []

    class Listener:
        def started(self, step: str) -> None:
            told.append(("started", step))

        def finished(self, step: str, detail: str, seconds: float) -> None:
            assert detail
            assert seconds >= 0
            told.append(("finished", step))

    torch.save(make_model(num_experts=1, task_output_dims=(1,)).state_dict(), tmp_path / "model.pt")
    options = te_export.ExportOptions(dry_run=True)
    te_export.export(tmp_path / "model.pt", options=options, progress=Listener())

    steps = ("read", "capture", "rewrite", "partition", "reference", "write", "verify", "publish")
    assert told == [(event, step) for step in steps for event in ("started", "finished")]
