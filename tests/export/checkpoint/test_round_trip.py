"""Every container and layout gives back the tensors bit for bit."""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from te_export.checkpoint import read_checkpoint

LEGACY = {"_use_new_zipfile_serialization": False}


def same_bits(found, expected) -> None:
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert found[name].device.type == "cpu"
        assert not found[name].requires_grad
        assert type(found[name]) is torch.Tensor
        assert torch.equal(
            found[name].contiguous().reshape(-1).view(torch.uint8),
            tensor.detach().contiguous().reshape(-1).view(torch.uint8),
        ), name


LAYOUTS = {
    "raw": lambda model, config: model.state_dict(),
    "module": lambda model, config: model,
    "state_dict": lambda model, config: {"state_dict": model.state_dict(), "config": config, "epoch": 3},
    "model_state_dict": lambda model, config: {
        "epoch": 3,
        "model_state_dict": model.state_dict(),
        "optimizer_state_dict": torch.optim.AdamW(model.parameters()).state_dict(),
        "config": dict(vars(config)),
        "loss": 0.5,
        "rng_state": torch.get_rng_state(),
        "torch_version": torch.__version__,
    },
    "module under a key": lambda model, config: {"model": model, "args": argparse.Namespace(lr=1.0)},
    "nested": lambda model, config: {"model": {"state_dict": model.state_dict(), "config": config}},
    "DataParallel": lambda model, config: torch.nn.DataParallel(model),
}


@pytest.mark.parametrize("options", [{}, LEGACY], ids=["zip", "legacy"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_round_trip(model, config, save, layout, options):
    path = save(LAYOUTS[layout](model, config), **options)
    found = read_checkpoint(path)
    same_bits(found.state, model.state_dict())
    assert found.container == ("torch-legacy" if options else "torch-zip")
    assert found.size_bytes == path.stat().st_size
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    if layout != "raw" and layout != "module under a key":
        assert found.config is not None
        assert found.config["num_experts"] == 3
        assert found.config["task_output_dims"] == (2, 3)
    assert bool(found.layer_types) == (layout in ("module", "module under a key", "DataParallel"))


@pytest.mark.parametrize("protocol", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("options", [{}, LEGACY], ids=["zip", "legacy"])
def test_pickle_protocols_round_trip(model, config, save, protocol, options):
    value = {"model": model.state_dict(), "config": {"expert_dim": 4, "num_experts": 3}}
    found = read_checkpoint(save(value, pickle_protocol=protocol, **options))
    same_bits(found.state, model.state_dict())
    assert found.config == {"expert_dim": 4, "num_experts": 3}


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.bool, torch.int64]
)
def test_dtypes_stay_as_stored(save, tmp_path, dtype):
    generator = torch.Generator().manual_seed(1)
    state = {"w": torch.randint(0, 2, (5, 3), generator=generator).to(dtype), "b": torch.ones(2).to(dtype)}
    save_file(state, tmp_path / "s.safetensors")
    for path in (save(state), save(state, "old.pt", **LEGACY), tmp_path / "s.safetensors"):
        found = read_checkpoint(path).state
        same_bits({name: found[name] for name in state}, state)


def test_module_as_the_script_saved_it(tmp_path, model):
    """Classes in __main__, pickled by a process that is gone."""
    script = tmp_path / "train.py"
    script.write_text(
        textwrap.dedent(
            """
            import sys
            from pathlib import Path
            import torch
            source = Path(sys.argv[1]).read_text().replace("from __future__ import annotations", "")
            exec(source, globals())
            torch.manual_seed(7)
            config = TaskExpertConfig(6, 5, 4, 3, 2, [2, 3])
            model = TaskExpertModel(config)
            assert type(model).__module__ == "__main__"
            torch.save(model, "whole.pt")
            torch.save({"model": torch.nn.DataParallel(model), "config": config}, "wrapped.pt")
            torch.save(model, "old.pt", _use_new_zipfile_serialization=False)
            """
        )
    )
    import te_export.models.task_expert as definition

    subprocess.run(
        [sys.executable, "-W", "ignore", str(script), str(definition.__file__)],
        cwd=tmp_path,
        check=True,
        timeout=120,
    )
    for name in ("whole.pt", "wrapped.pt", "old.pt"):
        found = read_checkpoint(tmp_path / name)
        same_bits(found.state, model.state_dict())
        assert found.layer_types[""] == "TaskExpertModel"
        assert found.layer_types["experts.0.network.1"] == "ReLU"
        assert found.layer_types["gating_networks.1"] == "DynamicGatingNetwork"
        assert found.config is not None
        assert found.config["expert_dim"] == 4
        assert "TaskExpertConfig" in str(found.config_source)


@pytest.mark.parametrize("location", [b"cuda:0", b"mps:0"])
def test_tensors_saved_on_a_gpu_come_to_the_cpu(save, location):
    path = save({"weight": torch.arange(6.0).reshape(2, 3)}, **LEGACY)
    cpu = b"X\x03\x00\x00\x00cpu"
    data = path.read_bytes()
    assert cpu in data
    path.write_bytes(data.replace(cpu, b"X" + len(location).to_bytes(4, "little") + location))
    assert torch.equal(read_checkpoint(path).state["weight"], torch.arange(6.0).reshape(2, 3))


def test_safetensors_with_metadata(model, tmp_path):
    path = tmp_path / "model.bin"  # the content decides
    config = '{"expert_dim": 4, "num_experts": 3, "task_output_dims": [2, 3]}'
    save_file(
        model.state_dict(), path, metadata={"config": config, "task_names": '["a", "b"]', "format": "pt"}
    )
    found = read_checkpoint(path)
    assert found.container == "safetensors"
    same_bits({name: found.state[name] for name in model.state_dict()}, model.state_dict())
    assert found.config == {"expert_dim": 4, "num_experts": 3, "task_output_dims": (2, 3)}
    assert found.task_names == ("a", "b")
    save_file(model.state_dict(), path, metadata={"task_names": "a, b"})
    assert read_checkpoint(path).task_names == ("a", "b")


def test_stored_tensors_are_mapped_from_the_file(save):
    """A 64 MiB checkpoint takes next to no anonymous memory."""
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("reads /proc/self/status, which a Linux machine has")

    def anonymous_kib() -> int:
        line = next(line for line in status.read_text().splitlines() if line.startswith("RssAnon"))
        return int(line.split()[1])

    path = save({"w": torch.ones(1 << 24)})
    read_checkpoint(path)  # what is loaded once
    before = anonymous_kib()
    state = read_checkpoint(path).state
    assert float(state["w"].sum()) == 1 << 24
    assert anonymous_kib() - before < 16 * 1024


def test_writing_to_a_tensor_leaves_the_file_alone(save):
    path = save({"w": torch.ones(8)})
    before = path.read_bytes()
    read_checkpoint(path).state["w"].zero_()
    assert path.read_bytes() == before


def test_tied_weights_stay_tied(save):
    shared = torch.arange(4.0)
    for options in ({}, LEGACY):
        state = read_checkpoint(save({"a": shared, "b": shared, "c": shared[2:]}, **options)).state
        assert state["a"].data_ptr() == state["b"].data_ptr()
        assert torch.equal(state["c"], shared[2:])
        state["a"][3] = 9.0
        assert state["c"][1] == 9.0


def test_views_and_empty_tensors(save):
    base = torch.arange(12.0).reshape(3, 4)
    value = {"t": base.t(), "row": base[1], "scalar": torch.tensor(2.0), "empty": torch.empty(0, 4)}
    for options in ({}, LEGACY):
        same_bits(read_checkpoint(save(value, **options)).state, value)
