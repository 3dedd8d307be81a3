"""Fixtures of the exporter's tests: seeded models, checkpoints made of them, and one export that many share.

Weights are N(0, 1/fan_in), drawn with numpy, so that they are the same whatever the torch version; SMALL is
large enough for weights.bin to hold both page-aligned and smaller tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

import te_export
from te_export.bundle.staged_graphs import StagedGraphs
from te_export.bundle.staging import StagedBundle
from te_export.capture.joint_graph import JointGraph
from te_export.capture.opset import newest_opset
from te_export.capture.torch_capture import capture
from te_export.checkpoint import Checkpoint
from te_export.models.exportable import ExportableModel
from te_export.models.task_expert import TaskExpertConfig, TaskExpertModel
from te_export.models.task_expert_checkpoint import load_task_expert
from te_export.partition import GraphSet, partition
from te_export.verify.probe_rows import make_probe_rows
from te_export.verify.references import References, evaluate_references
from te_export.verify.torch_threads import reference_threads
from te_runtime.manifest import Manifest, parse_manifest

SMALL: dict[str, object] = {
    "input_dim": 20,
    "backbone_dim": 24,
    "expert_dim": 8,
    "num_experts": 3,
    "task_output_dims": (4, 1, 4),
}

MakeModel = Callable[..., TaskExpertModel]
CheckpointOf = Callable[..., Checkpoint]
SaveCheckpoint = Callable[..., Path]
Load = Callable[..., ExportableModel]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Torch's threads spin; on a shared machine they only slow each other down."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def make_model() -> MakeModel:
    """`make_model(seed, **config)`: a TaskExpert model with seeded weights, SMALL where nothing is said."""

    def make(seed: int = 0, **changes: object) -> TaskExpertModel:
        settings = {**SMALL, **changes}
        settings["num_tasks"] = len(settings["task_output_dims"])  # type: ignore[arg-type]
        model = TaskExpertModel(TaskExpertConfig(**settings))  # type: ignore[arg-type]
        rng = np.random.default_rng(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                values = rng.standard_normal(parameter.shape) / math.sqrt(parameter.shape[-1])
                parameter.copy_(torch.from_numpy(values))
        return model.eval()

    return make


@pytest.fixture(scope="session")
def checkpoint_of() -> CheckpointOf:
    """`checkpoint_of(state, config=…, layer_types=…, task_names=…)`: what reading a file would have given."""

    def checkpoint(
        state: Mapping[str, torch.Tensor],
        config: Mapping[str, object] | None = None,
        layer_types: Mapping[str, str] | None = None,
        task_names: tuple[str, ...] | None = None,
    ) -> Checkpoint:
        return Checkpoint(
            path=Path("folder/model.pt"),
            sha256="0" * 64,
            size_bytes=1,
            container="torch-zip",
            state=state,
            config=config,  # type: ignore[arg-type]
            config_source=None if config is None else "'config' (a dict)",
            task_names=task_names,
            layer_types=layer_types or {},
            notes=(),
        )

    return checkpoint


@pytest.fixture(scope="session")
def load(checkpoint_of: CheckpointOf) -> Load:
    """`load(state, tasks=…, names=…, **as checkpoint_of)`: the exportable model of a state dict."""

    def load_state(
        state: Mapping[str, torch.Tensor],
        *,
        tasks: tuple[str, ...] | None = None,
        names: tuple[str, ...] | None = None,
        **rest: object,
    ) -> ExportableModel:
        return load_task_expert(checkpoint_of(state, **rest), task_names=names, tasks=tasks)

    return load_state


@pytest.fixture
def save_checkpoint(tmp_path: Path) -> SaveCheckpoint:
    """`save_checkpoint(model, name, **around)`: a model's state dict in a file, with entries around it."""

    def save(model: TaskExpertModel, name: str = "model.pt", **around: object) -> Path:
        path = tmp_path / name
        state = model.state_dict()
        torch.save({"state_dict": state, **around} if around else state, path)
        return path

    return save


@pytest.fixture(scope="session")
def exportable(make_model: MakeModel, load: Load) -> ExportableModel:
    """SMALL, all tasks. Not to be changed."""
    return load(make_model().state_dict())


@pytest.fixture(scope="session")
def captured(exportable: ExportableModel) -> JointGraph:
    """SMALL as captured. Not to be changed: tests that do so take `own_capture`."""
    return capture(exportable, newest_opset())


@pytest.fixture
def own_capture(captured: JointGraph) -> JointGraph:
    """A copy of the captured graph that the test may change."""
    return JointGraph(model=captured.model.clone(), tasks=captured.tasks, opset=captured.opset)


@pytest.fixture
def graphs(own_capture: JointGraph) -> GraphSet:
    """Joint, trunk, task and tail graphs that the test may change."""
    return partition(own_capture)


@pytest.fixture(scope="session")
def references(exportable: ExportableModel) -> References:
    """Oracle and torch float32 over the probe rows of SMALL. Not to be changed."""
    with reference_threads(exportable.parameter_bytes):
        return evaluate_references(exportable, make_probe_rows(exportable))


@pytest.fixture(scope="session")
def exported(make_model: MakeModel, tmp_path_factory: pytest.TempPathFactory) -> te_export.ExportResult:
    """SMALL exported once, standalone graphs included. Not to be changed."""
    folder = tmp_path_factory.mktemp("exported")
    torch.save(make_model().state_dict(), folder / "model.pt")
    return te_export.export(folder / "model.pt", options=te_export.ExportOptions(standalone=True))


@pytest.fixture(scope="session")
def staged_graphs() -> Callable[[Path], StagedGraphs]:
    """`staged_graphs(bundle folder)`: its fp32 graphs, as verify_graphs takes them."""

    def staged(root: Path) -> StagedGraphs:
        manifest: Manifest = parse_manifest((root / "manifest.json").read_bytes(), "manifest.json")
        (variant,) = manifest.variants
        return StagedGraphs(
            root=root,
            joint=variant.joint,
            trunk=variant.trunk,
            joint_tails=variant.joint_tails,
            tasks=variant.tasks,
            task_size_bytes={},
        )

    return staged


@pytest.fixture(scope="session")
def hidden_siblings() -> Callable[[Path], list[str]]:
    """`hidden_siblings(target)`: what an export left beside a target."""

    def siblings(target: Path) -> list[str]:
        return sorted(p.name for p in target.parent.iterdir() if p.name.startswith(f".{target.name}."))

    return siblings


@pytest.fixture
def staged_bundle(tmp_path: Path) -> StagedBundle:
    """A bundle that is being written to `tmp_path/out`."""
    return StagedBundle(tmp_path / "out", force=False)
