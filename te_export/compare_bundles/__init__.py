"""What differs between two bundles: in model, tasks, weights, variants, figures, sizes, routing and latency."""

from __future__ import annotations

from te_export.compare_bundles.compare import diff
from te_export.compare_bundles.result import BundleDiff

__all__ = ["BundleDiff", "diff"]
