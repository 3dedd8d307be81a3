"""te-export: from a multi-task mixture-of-experts checkpoint to verified ONNX graphs.

Importing the package loads neither torch nor onnx; the first use of `export` does. `diff` compares two bundles, and
needs no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from te_export import errors
from te_export.errors import TeExportError
from te_export.options import ExportOptions, ExportResult
from te_export.version import VERSION

if TYPE_CHECKING:
    from te_export.compare_bundles import BundleDiff, diff
    from te_export.pipeline import export

__version__ = VERSION

__all__ = [
    "BundleDiff",
    "ExportOptions",
    "ExportResult",
    "TeExportError",
    "__version__",
    "diff",
    "errors",
    "export",
]


def __getattr__(name: str) -> object:
    if name == "export":
        from te_export.pipeline import export

        return export
    if name in ("BundleDiff", "diff"):
        from te_export import compare_bundles

        return getattr(compare_bundles, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
