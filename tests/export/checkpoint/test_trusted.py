"""--trust-pickle: code is run only where it is needed, and a missing class is explained."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch

from te_export.checkpoint import read_checkpoint
from te_export.errors import CheckpointError, UntrustedPickleError


@pytest.fixture
def trainer(tmp_path, monkeypatch):
    """Writes a module `trainer_code` with a model class of its own, and two checkpoints of it."""
    folder = tmp_path / "code"
    folder.mkdir()
    (folder / "trainer_code.py").write_text(
        textwrap.dedent(
            """
            import torch
            class Settings:
                def __init__(self):
                    self.expert_dim = 4
            class OwnModel(torch.nn.Module):
                def __init__(self):
                    super().__init__()
                    self.config = {"expert_dim": 4, "num_experts": 2}
                    self.layer = torch.nn.Linear(2, 2)
            """
        )
    )
    (folder / "train.py").write_text(
        textwrap.dedent(
            """
            import torch, trainer_code
            torch.manual_seed(0)
            model = trainer_code.OwnModel()
            torch.save({"model": model, "note": trainer_code.Settings()}, "own.pt")
            class InMain(trainer_code.OwnModel): pass
            torch.save(InMain(), "main.pt")
            """
        )
    )
    subprocess.run([sys.executable, "train.py"], cwd=folder, check=True, timeout=120)
    sys.modules.pop("trainer_code", None)
    return folder


def test_own_classes(trainer, monkeypatch):
    with pytest.raises(UntrustedPickleError) as caught:
        read_checkpoint(trainer / "own.pt")
    assert "trainer_code.OwnModel, trainer_code.Settings. Nothing was run" in str(caught.value)
    assert "--trust-pickle" in str(caught.value)
    assert "trainer_code" not in sys.modules

    with pytest.raises(CheckpointError, match=r"needs the module 'trainer_code'.*PYTHONPATH"):
        read_checkpoint(trainer / "own.pt", trust_pickle=True)

    monkeypatch.syspath_prepend(str(trainer))
    found = read_checkpoint(trainer / "own.pt", trust_pickle=True)
    assert found.container == "trusted-pickle"
    assert {name: tuple(tensor.shape) for name, tensor in found.state.items()} == {
        "layer.weight": (2, 2),
        "layer.bias": (2,),
    }
    assert found.config == {"expert_dim": 4, "num_experts": 2}
    assert found.layer_types == {"": "OwnModel", "layer": "Linear"}
    assert found.notes == ("code that the file names was run (--trust-pickle)",)

    with pytest.raises(CheckpointError, match=r"needs the class 'InMain' of the script that saved it"):
        read_checkpoint(trainer / "main.pt", trust_pickle=True)
    sys.modules.pop("trainer_code", None)


def test_nothing_is_run_where_nothing_needs_to_be(save):
    found = read_checkpoint(save({"w": torch.ones(1)}), trust_pickle=True)
    assert found.container == "torch-zip"
    assert found.notes == ()


class Raises:
    def __reduce__(self):
        return (int, ("no number",))


class Renamed:
    def __reduce__(self):
        return (__import__, ("te_export.no_such_module",))


def test_code_that_fails(save):
    class_of = {"fails": Raises()}
    with pytest.raises(CheckpointError, match="holds no state dict"):
        read_checkpoint(save(class_of), trust_pickle=True)  # builtins.int is known, and not called
    with pytest.raises(CheckpointError, match="needs the module"):
        read_checkpoint(save({"a": Renamed()}), trust_pickle=True)


def test_damage_is_not_trusted_away(save):
    path = save({"w": torch.ones(1)})
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(CheckpointError, match="cut short or damaged"):
        read_checkpoint(path, trust_pickle=True)
