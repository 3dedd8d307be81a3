"""Where the state dict, the config and the task names are found, and what is said when they are not."""

from __future__ import annotations

import argparse
import pathlib
import types

import numpy as np
import pytest
import torch

from te_export.checkpoint import read_checkpoint
from te_export.errors import CheckpointError

STATE = {"a.weight": torch.ones(2), "b.weight": torch.zeros(3)}


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod.", "model.model."])
def test_wrapper_prefixes_are_removed(save, prefix):
    found = read_checkpoint(save({prefix + name: tensor for name, tensor in STATE.items()}))
    assert list(found.state) == list(STATE)
    assert found.notes == (f"prefix '{prefix}' was removed from every parameter name",)


def test_a_prefix_that_not_every_name_has_stays(save):
    state = {"module.a": torch.ones(1), "b": torch.ones(1)}
    assert list(read_checkpoint(save(state)).state) == list(state)


def test_the_first_usual_key_is_taken_and_the_rest_noted(save):
    other = {name: tensor + 1 for name, tensor in STATE.items()}
    found = read_checkpoint(save({"ema": other, "model": STATE}))
    assert torch.equal(found.state["a.weight"], STATE["a.weight"])
    assert found.notes == ("'model' was taken, 'ema' ignored",)


def test_metadata_of_a_state_dict_is_no_entry(save):
    assert list(read_checkpoint(save({**STATE, "_metadata": {"version": 1}})).state) == list(STATE)


CONFIG = {"expert_dim": 4, "num_experts": 3}


@pytest.mark.parametrize(
    ("beside", "source"),
    [
        ({"config": CONFIG}, "'config' (a dict)"),
        ({"model_config": CONFIG}, "'model_config' (a dict)"),
        ({"hyper_parameters": CONFIG}, "'hyper_parameters' (a dict)"),
        ({"args": argparse.Namespace(**CONFIG)}, "'args' (a Namespace)"),
        ({"config": types.SimpleNamespace(**CONFIG)}, "'config' (a SimpleNamespace)"),
        ({"config": {"model": CONFIG, "lr": 1.0}}, "'config', its 'model'"),
        ({"config": {"lr": 1.0}, "args": CONFIG}, "'args' (a dict)"),
    ],
)
def test_configs_are_found(save, beside, source):
    found = read_checkpoint(save({"state_dict": STATE, **beside}))
    assert found.config == CONFIG
    assert found.config_source == source


def test_settings_of_something_else_are_no_config(save):
    found = read_checkpoint(
        save({"state_dict": STATE, "args": {"lr": 0.1}, "hyper_parameters": {"epochs": 3}})
    )
    assert (found.config, found.config_source) == (None, None)


def test_a_config_keeps_plain_values_and_flat_lists(save):
    config = {
        "on": True,
        "n": 3,
        "rate": 0.5,
        "kind": "x",
        "none": None,
        "dims": [1, 2],
        "names": ("a", "b"),
        "size": torch.Size([4, 5]),
        "empty": [],
        "floats": [0.5],
        "flags": [True],
        "nested": [[1]],
        "control": "\x1b[2J",
        "table": {"a": 1},
        "numpy": np.float64(1.5),
        "path": pathlib.PurePosixPath("/x"),
        "tensor": torch.ones(1),
        7: "seven",
    }
    found = read_checkpoint(save({"state_dict": STATE, "config": config}))
    assert found.config == {
        "on": True,
        "n": 3,
        "rate": 0.5,
        "kind": "x",
        "none": None,
        "dims": (1, 2),
        "names": ("a", "b"),
        "size": (4, 5),
        "empty": (),
        "numpy": 1.5,
    }
    assert found.notes == (
        "in the config, 'floats', 'flags', 'nested', 'control', 'table' and 2 more ignored: neither a plain value nor a "
        "list of texts or integers",
    )


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize(
    "number", [np.int64(-7), np.uint8(200), np.float32(0.5), np.float16(2.0), np.bool_(True), np.int64(2**62)]
)
def test_numbers_of_numpy_are_numbers(save, number, protocol):
    found = read_checkpoint(save({"state_dict": STATE, "config": {"n": number}}, pickle_protocol=protocol))
    assert found.config == {"n": number.item()}
    assert type(found.config["n"]) is type(number.item())


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"task_names": ["a", "b"]}, ("a", "b")),
        ({"task_names": ("a",)}, ("a",)),
        ({"config": {"task_names": ["c"]}}, ("c",)),
        ({"task_names": "a, b"}, ("a", "b")),
        ({"task_names": [1, 2]}, None),
        ({"task_names": {}}, None),
        ({}, None),
    ],
)
def test_task_names(save, value, expected):
    assert read_checkpoint(save({"state_dict": STATE, **value})).task_names == expected


def test_a_module_inside_nn_layers_and_its_buffers(save):
    module = torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2, bias=False))
    module[0].register_buffer("transient", torch.ones(1), persistent=False)
    module.register_module("absent", None)
    found = read_checkpoint(save(module))
    assert list(found.state) == list(module.state_dict())
    assert found.layer_types == {"": "Sequential", "0": "BatchNorm1d", "1": "Linear"}


def test_shared_submodules_have_both_names(save):
    layer = torch.nn.Linear(2, 2)
    module = torch.nn.ModuleList([layer, layer])
    assert list(read_checkpoint(save(module)).state) == list(module.state_dict())


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            {"epoch": 1, "loss": 0.5},
            "the file holds no state dict: it has 'epoch' (1), 'loss' (0.5), expected",
        ),
        ({}, "the file holds an empty state dict"),
        ({"state_dict": {}}, "it has 'state_dict' (a dict), expected tensors"),
        ([torch.ones(1)], "holds a list of 1, expected a state dict"),
        (torch.ones(1), "holds a tensor, expected a state dict"),
        (3, "holds 3, expected a state dict"),
        (torch.nn.Sequential(), "the model has no parameters"),
        ({**STATE, "epoch": 3}, "other things than tensors: 'epoch' (3)"),
        ({**STATE, 0: torch.ones(1)}, "1 keys that are no parameter names (0)"),
        ({**STATE, "inner": {"a": torch.ones(1)}}, "'inner' (a dict)"),
        ({**STATE, "a\x1b[2J": torch.ones(1)}, "1 keys that are no parameter names ('a\\x1b[2J')"),
        ({"module." * 1000 + "a": torch.ones(1)}, "no parameter names ('module.module."),
        ({"optimizer_state_dict": {"state": {}}}, "'optimizer_state_dict' (a dict)"),
    ],
)
def test_what_is_missing_is_said(save, value, message):
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(save(value))
    assert message in str(caught.value)


def test_only_the_model_has_to_be_readable(save):
    """Sparse, complex and quantized tensors may lie beside the state dict."""
    beside = {
        "sparse": torch.eye(3).to_sparse(),
        "complex": torch.ones(2, dtype=torch.complex64),
        "set": {1, 2},
    }
    found = read_checkpoint(save({"state_dict": STATE, "best": np.float32(0.5), **beside}))
    assert list(found.state) == list(STATE)
