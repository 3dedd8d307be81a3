"""The sizes of a bundle, per variant and per file, as report.html shows them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from te_export.report.html_table import Table, columns, make_table
from te_runtime.manifest import FormName, Manifest, Variant

__all__ = ["FileSizes", "file_sizes", "folder_bytes"]

_OPEN_ROWS = 60
_FORMS: dict[FormName, str] = {
    "float32": "float32",
    "static": "8-bit integers, activations too, by ranges from data",
    "dynamic": "8 bits in blocks, activations quantized as they come",
    "block4": "4 bits in blocks, activations quantized as they come",
    "half": "float16",
}


@dataclass(frozen=True)
class FileSizes:
    """What the bundle takes on disk."""

    variants: Table
    files: Table


def file_sizes(manifest: Manifest) -> FileSizes:
    """Bytes of each variant, and of each file with its sha256."""
    roles = dict(_roles(manifest))
    sizes = ("weights, bytes", "graphs, bytes", "together", "of fp32")
    return FileSizes(
        variants=make_table(
            "Variants",
            columns("variant", "weights held as", *sizes, numbers=sizes),
            (_variant_row(manifest, variant) for variant in manifest.variants),
        ),
        files=make_table(
            "Files",
            columns("file", "what it is", "bytes", "sha256", numbers=("bytes",), code=("sha256",)),
            (
                (entry.path, roles.get(entry.path, ""), f"{entry.size_bytes:,}", entry.sha256)
                for entry in manifest.files
            ),
            open_rows=_OPEN_ROWS,
        ),
    )


def folder_bytes(manifest: Manifest, folder: str) -> int:
    """What one variant's folder takes."""
    return sum(entry.size_bytes for entry in manifest.files if entry.path.startswith(f"{folder}/"))


def _variant_row(manifest: Manifest, variant: Variant) -> tuple[str, ...]:
    whole = folder_bytes(manifest, variant.precision)
    weights = manifest.file(variant.weights).size_bytes
    first = folder_bytes(manifest, manifest.variants[0].precision)
    return (
        variant.precision,
        _FORMS[variant.form],
        f"{weights:,}",
        f"{whole - weights:,}",
        f"{whole:,}",
        f"{whole / first:.2f}" if first else "-",
    )


def _roles(manifest: Manifest) -> Iterator[tuple[str, str]]:
    """What each file is; a path named twice, such as a tail that is the task graph, keeps its last name."""
    yield manifest.golden.path, "golden rows: inputs with the outputs they must give"
    yield "report.md", "this report as Markdown"
    for variant in manifest.variants:
        yield variant.weights, "every weight of the variant"
        yield variant.joint.path, "every task at once"
        if variant.trunk is not None:
            yield variant.trunk.path, "what the tasks share"
        if variant.joint_tails is not None:
            yield variant.joint_tails.path, "the rest of every task, after the trunk"
        for graphs in variant.tasks:
            yield graphs.tail.path, f"the rest of {graphs.task}, after the trunk"
            yield graphs.graph.path, f"{graphs.task} alone"
            if graphs.standalone is not None:
                yield graphs.standalone.path, f"{graphs.task} with its weights inside"
            if graphs.pruned is not None:
                yield graphs.pruned.graph.path, f"{graphs.task} without experts it hardly uses"
