"""Naming the line of the user's own code that an error or a traced operator comes from."""

from __future__ import annotations

import ast
import inspect
import os
import re
import sysconfig
import textwrap
import traceback
from pathlib import Path

import torch
from torch import nn
from torch.fx import Node

__all__ = ["line_of_attribute", "line_of_error", "line_of_node"]

_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<name>\S+)\n\s*(?P<code>[^\n]*)')
_TORCH = str(Path(torch.__file__).parent) + os.sep
_OURS = str(Path(__file__).parents[1]) + os.sep
_STANDARD = sysconfig.get_paths()["stdlib"] + os.sep


def line_of_error(error: BaseException) -> str:
    """`model.py:31, in forward: x = x.view(8, -1)`, or nothing where no line of the user's is on the way.

    The error's own frames come first, then frames that its message quotes, as torch.export does.
    """
    seen: BaseException | None = error
    while seen is not None:
        frames = [frame for frame in traceback.extract_tb(seen.__traceback__) if _is_users(frame.filename)]
        if frames:
            last = frames[-1]
            return _shown(last.filename, last.lineno or 0, last.name, last.line or "")
        seen = seen.__cause__ or seen.__context__
    return _last_quoted(str(error))


def line_of_node(node: Node) -> str:
    """Where the user's code called a traced operator; nothing where torch recorded no such line."""
    return _last_quoted(node.meta.get("stack_trace") or "")


def line_of_attribute(module: nn.Module, name: str) -> str:
    """The line of the module's class that assigns `self.<name>` outside __init__."""
    kind = type(module)
    try:
        lines, first = inspect.getsourcelines(kind)
        file = inspect.getsourcefile(kind) or "?"
        tree = ast.parse(textwrap.dedent("".join(lines)))
    except (OSError, TypeError, SyntaxError):
        return ""
    attribute = re.compile(rf"\bself\.{re.escape(name)}\b")
    methods = [
        node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name != "__init__"
    ]
    for node in (found for method in methods for found in ast.walk(method)):
        if isinstance(node, ast.Assign):
            targets = node.targets
        elif isinstance(node, ast.AugAssign | ast.AnnAssign):
            targets = [node.target]
        else:
            continue
        if any(attribute.search(ast.unparse(target)) for target in targets):
            return _shown(file, first + node.lineno - 1, kind.__name__, lines[node.lineno - 1].strip())
    return ""


def _last_quoted(text: str) -> str:
    frames = [found for found in _FRAME.finditer(text) if _is_users(found["file"])]
    if not frames:
        return ""
    last = frames[-1]
    return _shown(last["file"], int(last["line"]), last["name"], last["code"])


def _is_users(file: str) -> bool:
    if file.startswith((_TORCH, _OURS, "<")):
        return False
    if "site-packages" in file:  # which lies within the standard library's folder
        return "/onnxscript/" not in file
    return not file.startswith(_STANDARD)


def _shown(file: str, line: int, name: str, code: str) -> str:
    return f"{Path(file).name}:{line}, in {name}: {code.strip()}".rstrip(": ")
