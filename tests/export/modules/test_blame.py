"""The line of the user's own code that an error, an operator or an attribute comes from."""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from te_export.modules import blame
from te_export.modules.blame import line_of_attribute, line_of_error, line_of_node
from te_export.modules.trace import Traced

SOURCE = """\
import torch
from torch import nn


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 2)
        self.calls = 0
        self.calls_before = 0
        self.register_buffer("mean", torch.zeros(2))

    def forward(self, x):
        h = torch.relu(x)
        return self.layer(h)

    def count(self):
        self.calls_before = self.calls
        self.calls += 1

    def keep(self, h):
        self.first, (self.mean, rest) = 1, (h, 2)
        self.typed: int = 3


def fails(x):
    return inner(x)


def inner(x):
    return x.view(3, -1)


def raises():
    raise ValueError("no")


def wraps():
    try:
        raises()
    except ValueError as error:
        raise RuntimeError("around") from error
"""


@pytest.fixture(scope="module")
def users(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """SOURCE as the module users.py of someone's project."""
    path = tmp_path_factory.mktemp("project") / "users.py"
    path.write_text(SOURCE)
    spec = importlib.util.spec_from_file_location("users", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["users"] = module  # inspect looks a class's module up
    spec.loader.exec_module(module)
    return module


def error_of(call: Callable[[], object]) -> Exception:
    with pytest.raises(Exception) as raised:  # noqa: PT011 - any error is what is asked for
        call()
    return raised.value


def test_the_innermost_line_of_the_users_is_named(users: ModuleType) -> None:
    error = error_of(lambda: users.fails(torch.zeros(4)))

    assert line_of_error(error) == "users.py:31, in inner: return x.view(3, -1)"


def test_an_error_around_another_names_its_own_line(users: ModuleType) -> None:
    assert line_of_error(error_of(users.wraps)).startswith("users.py:42, in wraps: raise RuntimeError")


def test_the_cause_is_looked_at_where_the_error_has_no_line() -> None:
    error = RuntimeError("of no frame")
    error.__cause__ = error_of(lambda: int("x"))

    assert "in <lambda>" in line_of_error(error)


def test_frames_that_a_message_quotes(users: ModuleType) -> None:
    message = (
        f'failed\nUser code traceback:\n  File "{users.__file__}", line 14, in forward\n    h = torch.relu(x)\n'
        f'  File "{torch.__file__}", line 1, in relu\n    return x\n'
    )

    assert line_of_error(RuntimeError(message)) == "users.py:14, in forward: h = torch.relu(x)"


def test_no_line_where_nothing_is_the_users() -> None:
    assert line_of_error(RuntimeError("no frames")) == ""


@pytest.mark.parametrize(
    "file",
    [
        torch.__file__,
        blame.__file__,
        ast.__file__,
        "<string>",
        "<frozen importlib._bootstrap>",
    ],
)
def test_frames_of_torch_python_and_te_export_are_not_the_users(file: str) -> None:
    assert line_of_error(RuntimeError(f'File "{file}", line 1, in call\n    code')) == ""


def test_te_export_is_not_the_user_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = "/env/lib/python3.11/site-packages/te_export/"
    monkeypatch.setattr(blame, "_OURS", installed)

    assert line_of_error(RuntimeError(f'File "{installed}modules/trace.py", line 1, in trace\n    x')) == ""


def test_an_installed_library_of_layers_is_told() -> None:
    file = "/env/lib/python3.11/site-packages/some_layers/mmoe.py"

    found = line_of_error(RuntimeError(f'File "{file}", line 7, in forward\n    x = x.view(8)'))

    assert found == "mmoe.py:7, in forward: x = x.view(8)"


def test_an_operator_names_the_line_that_called_it(
    users: ModuleType, trace_module: Callable[..., Traced]
) -> None:
    traced = trace_module(users.Model(), torch.zeros(3, 4))
    lines = [line_of_node(node) for node in traced.graph.nodes if node.op == "call_function"]

    assert "users.py:14, in forward: h = torch.relu(x)" in lines
    assert "users.py:15, in forward: return self.layer(h)" in lines


def test_an_operator_without_a_recorded_line() -> None:
    node = torch.fx.Graph().placeholder("x")

    assert line_of_node(node) == ""


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("calls", "users.py:19, in Model: self.calls += 1"),
        ("calls_before", "users.py:18, in Model: self.calls_before = self.calls"),
        ("mean", "users.py:22, in Model: self.first, (self.mean, rest) = 1, (h, 2)"),
        ("typed", "users.py:23, in Model: self.typed: int = 3"),
        ("layer", ""),
        ("never", ""),
    ],
)
def test_the_line_outside_init_that_assigns_an_attribute(name: str, line: str, users: ModuleType) -> None:
    assert line_of_attribute(users.Model(), name) == line


def test_a_class_without_a_source_has_no_line() -> None:
    made: type[nn.Module] = type("Made", (nn.Module,), {"forward": lambda self, x: x})

    assert line_of_attribute(made(), "calls") == ""


def test_a_class_within_a_function_keeps_its_line() -> None:
    class Inner(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            self.calls = 1
            return x

    assert line_of_attribute(Inner(), "calls").endswith("in Inner: self.calls = 1")
