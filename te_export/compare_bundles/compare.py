"""The whole comparison of two bundles on one screen; read on in the modules that it calls.

two folders → opened bundles, every checksum compared → tasks paired → weights, variants, figures → BundleDiff
"""

from __future__ import annotations

from os import PathLike, fsdecode

from te_export.compare_bundles.bundle_weights import Weight, read_weights
from te_export.compare_bundles.compare_facts import (
    compare_files,
    compare_inputs,
    compare_model,
    compare_routing,
)
from te_export.compare_bundles.compare_latency import compare_latency
from te_export.compare_bundles.compare_variants import compare_variants
from te_export.compare_bundles.compare_weights import compare_weights
from te_export.compare_bundles.result import BundleDiff, BundleSide, WeightsDiff
from te_export.compare_bundles.task_pairs import compare_tasks
from te_runtime.bundle import Bundle, open_bundle
from te_runtime.manifest import Variant

__all__ = ["diff"]


def diff(a: str | PathLike[str], b: str | PathLike[str]) -> BundleDiff:
    """Compare two bundles. Needs neither torch nor onnxruntime.

    Every checksum of both is compared first: a damaged file would show as a changed weight.

    Args:
        a, b: folders that te-export wrote; `before` and `after` in what comes back.

    Raises:
        BundleError: one of them is damaged or no bundle.
    """
    before, after = open_bundle(fsdecode(a)), open_bundle(fsdecode(b))
    old, new = before.manifest, after.manifest
    weights_before, weights_after = _weights(before), _weights(after)
    tasks = compare_tasks(old, new, weights_before or (), weights_after or ())
    weights = WeightsDiff((), is_compared=False)
    if weights_before is not None and weights_after is not None:
        weights = WeightsDiff(compare_weights(weights_before, weights_after, tasks.pairs))
    return BundleDiff(
        a=_side(before, fsdecode(a)),
        b=_side(after, fsdecode(b)),
        model=compare_model(old, new),
        inputs=compare_inputs(old, new),
        tasks=tasks,
        weights=weights,
        variants=compare_variants(before, after, tasks.pairs),
        routing=compare_routing(old, new, tasks.in_both),
        golden_is_same=old.file(old.golden.path).sha256 == new.file(new.golden.path).sha256,
        files=compare_files(old, new),
        latency=compare_latency(old, new, tasks.pairs),
    )


def _weights(bundle: Bundle) -> tuple[Weight, ...] | None:
    """The weights of the fp32 variant; None where there is none."""
    variant: Variant | None = next((v for v in bundle.manifest.variants if v.precision == "fp32"), None)
    return None if variant is None else read_weights(bundle, variant)


def _side(bundle: Bundle, path: str) -> BundleSide:
    manifest = bundle.manifest
    return BundleSide(
        path=path,
        manifest_sha256=bundle.manifest_sha256,
        family=manifest.model.family,
        tasks=manifest.task_names,
        size_bytes=sum(entry.size_bytes for entry in manifest.files),
    )
