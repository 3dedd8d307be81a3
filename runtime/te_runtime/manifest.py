"""manifest.json as named tuples: the exporter writes through them, the runtime reads through them.

Reading is strict: unknown, missing or repeated keys, other types, names that are not allowed, paths that
leave the bundle, and sizes out of bounds are refused with the place and the finding. docs/bundle-format.md
has the same in prose.

Named tuples, because sixteen frozen dataclasses would take 10 ms of every start to make.
"""

from __future__ import annotations

import re
from hashlib import sha256
from typing import Literal, NamedTuple

from te_runtime.errors import BundleError
from te_runtime.manifest_accuracy import AccuracyMetric, LayerAccuracy, LayerLoss, TaskAccuracy, check_layers
from te_runtime.manifest_latency import GraphLatency, Latency
from te_runtime.manifest_values import check_path, check_unique, is_task_name, require
from te_runtime.strict_json import StrictJsonError, decode, encode

__all__ = [
    "FORMAT_NAME",
    "FORMAT_VERSION",
    "MANIFEST_NAME",
    "MAX_MANIFEST_BYTES",
    "AccuracyMetric",
    "FileEntry",
    "FormName",
    "Golden",
    "GraphLatency",
    "GraphSpec",
    "GroupParity",
    "Latency",
    "LayerAccuracy",
    "LayerLoss",
    "Manifest",
    "ModelInfo",
    "OptimizeLevel",
    "OutputParity",
    "Producer",
    "PrunedGraph",
    "RowGroup",
    "TargetProvider",
    "TaskAccuracy",
    "TaskGraphs",
    "TaskParity",
    "TaskSpec",
    "TaskUtilization",
    "TensorSpec",
    "Variant",
    "is_task_name",
    "parse_manifest",
    "seal_manifest",
    "serialize_manifest",
]

FORMAT_NAME = "te-export-bundle"
FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
MAX_MANIFEST_BYTES = 16 * 2**20
MAX_FILE_BYTES = 2**46
_NO_CHECKSUM = "0" * 64
_CHECKSUM_AT = re.compile(
    rb'\s*\{\s*"format"\s*:\s*"[^"]*"\s*,\s*"version"\s*:\s*\d+\s*,\s*"checksum"\s*:\s*"([^"]*)"'
)

DType = Literal["float32", "float16", "float64", "bfloat16", "int64", "int32", "int8", "uint8", "bool"]
Precision = Literal["fp32", "fp16", "int8", "int4"]
FormName = Literal["float32", "static", "dynamic", "block4", "half"]
"""How a variant's weights are held: as they were; int8 with activation ranges from data; int8 in blocks, with
activations quantized as they come; 4 bits in blocks likewise; float16."""
OptimizeLevel = Literal["none", "exact"]
TargetProvider = Literal["cpu", "cuda"]

_SHA256 = re.compile(r"[0-9a-f]{64}")


class TensorSpec(NamedTuple):
    """One graph input or output. A string in `shape` names a symbolic axis; `batch` is the batch axis."""

    name: str
    dtype: DType
    shape: tuple[int | str, ...]

    def check(self) -> None:
        require(0 < len(self.name) <= 200, f"tensor name {self.name!r:.80} must have 1 to 200 characters")
        for axis in self.shape:
            fits = bool(axis) if isinstance(axis, str) else 0 < axis < 2**31
            require(fits, f"axis {axis!r:.80} of {self.name!r} is out of bounds")


class GraphSpec(NamedTuple):
    """One ONNX file: its path inside the bundle and its interface."""

    path: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def check(self) -> None:
        check_path(self.path)
        require(bool(self.inputs) and bool(self.outputs), f"graph {self.path!r} has no inputs or no outputs")


class TaskSpec(NamedTuple):
    """One task: prediction (batch, out) and, where the model has a gate, routing weights (batch, experts)."""

    name: str
    prediction: TensorSpec
    routing_weights: TensorSpec | None

    def check(self) -> None:
        require(
            is_task_name(self.name),
            f"task name {self.name!r:.80} is not allowed: 1 to 64 letters, digits, '_' or '-'",
        )


class TaskGraphs(NamedTuple):
    """The graphs of one task in one variant.

    `tail` reads the trunk's outputs, and inputs of the model where it needs them; `standalone` carries its weights
    inside; `pruned` does without the experts that the task hardly uses.
    """

    task: str
    graph: GraphSpec
    tail: GraphSpec
    standalone: GraphSpec | None
    pruned: PrunedGraph | None = None


class GroupParity(NamedTuple):
    """Errors against the float64 oracle over one group of rows, the worst of every graph and batch size.

    `bound` is what `max_abs_error` was allowed to be; `torch_max_abs_error` is what torch float32 reached.
    """

    group: str
    rows: int
    max_abs_error: float
    torch_max_abs_error: float
    bound: float


class OutputParity(NamedTuple):
    """Parity of one output.

    Relative errors are over the larger of the oracle's magnitude and its RMS in the group. `ratio` is the
    largest, over groups, of `max_abs_error / torch_max_abs_error`, and null where torch made no error at all.
    """

    max_abs_error: float
    max_rel_error: float
    torch_max_abs_error: float
    torch_max_rel_error: float
    ratio: float | None
    rms_error: float
    torch_rms_error: float
    argmax_agreement: float | None
    torch_argmax_agreement: float | None
    groups: tuple[GroupParity, ...]


class TaskParity(NamedTuple):
    task: str
    prediction: OutputParity
    routing_weights: OutputParity | None

    @property
    def outputs(self) -> dict[str, OutputParity]:
        """The parity of each output that the task has, by name."""
        weights = {} if self.routing_weights is None else {"routing weights": self.routing_weights}
        return {"prediction": self.prediction, **weights}

    @property
    def worst_ratio(self) -> float | None:
        """The largest error over torch's own, of any output and group; None where torch made no error."""
        return max((out.ratio for out in self.outputs.values() if out.ratio is not None), default=None)


class PrunedGraph(NamedTuple):
    """A task graph in which some experts are constants, their mean outputs: faster, and not the model's function.

    Attributes:
        experts: those that are gone, counted from 0, ascending.
        largest_weights: the largest routing weight that each of them had on the calibration rows.
        accuracy: what the task loses in it.
        parity: how far it is from the oracle, and may be on another machine.
    """

    graph: GraphSpec
    experts: tuple[int, ...]
    largest_weights: tuple[float, ...]
    accuracy: TaskAccuracy
    parity: TaskParity

    def check(self) -> None:
        path, experts = self.graph.path, self.experts
        ascending = bool(experts) and experts[0] >= 0 and list(experts) == sorted(set(experts))
        require(ascending, f"experts of {path!r} are {experts!s:.80}, expected ascending numbers from 0")
        require(
            len(self.largest_weights) == len(experts)
            and all(0 <= most <= 1 for most in self.largest_weights),
            f"largest_weights of {path!r} are {self.largest_weights!s:.80}, expected one from 0 to 1 per expert",
        )


class Variant(NamedTuple):
    """One precision of the bundle: one weights file and the graphs that point into it.

    Attributes:
        form: how the weights are held.
        optimized: what was rewritten.
        target_provider: what for; the graphs run on any.
        trunk: what every task shares; null where tasks share nothing: their tails are then their task graphs.
        joint_tails: what the trunk gives, and inputs that tails read themselves, to what the joint graph gives; null
            without a trunk, and where there is one task.
        kept_weights: in a variant of lower precision, the weights that a task could not spare: they stay in
            float32, in int4 in 8 bits.
        accuracy: what each task lost; empty for fp32.
        layers: in what its layers are held, and what that costs; empty for fp32.
    """

    precision: Precision
    form: FormName
    optimized: OptimizeLevel
    target_provider: TargetProvider
    weights: str
    joint: GraphSpec
    trunk: GraphSpec | None
    joint_tails: GraphSpec | None
    tasks: tuple[TaskGraphs, ...]
    kept_weights: tuple[str, ...]
    accuracy: tuple[TaskAccuracy, ...]
    parity: tuple[TaskParity, ...]
    layers: tuple[LayerAccuracy, ...] = ()

    def check(self) -> None:
        check_path(self.weights)
        tasks = [graphs.task for graphs in self.tasks]
        check_layers(self.layers, tasks=frozenset(tasks), kept_weights=frozenset(self.kept_weights))


class RowGroup(NamedTuple):
    """A run of consecutive rows of golden.npz made the same way (ordinary, large, tiny, routing)."""

    name: str
    rows: int

    def check(self) -> None:
        require(0 < self.rows <= 1_000_000, f"row group {self.name!r:.80} has {self.rows!r:.80} rows")


class Golden(NamedTuple):
    """Golden rows: `input.<name>`, and the oracle's float64 `<task>.prediction`, `<task>.routing_weights`."""

    path: str
    groups: tuple[RowGroup, ...]

    def check(self) -> None:
        check_path(self.path)


class TaskUtilization(NamedTuple):
    """How one task used each expert over the verification rows, by the oracle.

    `mean` is over ordinary rows and is the baseline that a deployed model is compared with; `low` and
    `high` bound the routing weight over every row; `wins` counts the rows in which it had the largest.
    """

    task: str
    mean: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    wins: tuple[int, ...]


class FileEntry(NamedTuple):
    path: str
    size_bytes: int
    sha256: str

    def check(self) -> None:
        check_path(self.path)
        in_bounds = 0 <= self.size_bytes <= MAX_FILE_BYTES
        require(in_bounds, f"size of {self.path!r} is out of bounds: {self.size_bytes!r:.80}")
        require(_SHA256.fullmatch(self.sha256) is not None, f"sha256 of {self.path!r} is not 64 hex digits")


class ModelInfo(NamedTuple):
    """Where the graphs came from. `unused_parameters` are in the checkpoint but reach no prediction."""

    family: str
    config: dict[str, bool | int | float | str | tuple[int, ...]]
    checkpoint_sha256: str
    parameter_bytes: int
    unused_parameters: tuple[str, ...]


class Producer(NamedTuple):
    """Versions of what wrote the bundle."""

    te_export: str
    torch: str
    onnx: str
    onnxscript: str
    onnxruntime: str
    opset: int


class Manifest(NamedTuple):
    """The whole of manifest.json.

    Attributes:
        checksum: sha256 of the file itself with these 64 digits read as zeros, so that no byte of it can
            change unnoticed. serialize_manifest fills it in.
        latency: None where it was not measured.
    """

    format: str
    version: int
    checksum: str
    model: ModelInfo
    producer: Producer
    inputs: tuple[TensorSpec, ...]
    tasks: tuple[TaskSpec, ...]
    variants: tuple[Variant, ...]
    golden: Golden
    utilization: tuple[TaskUtilization, ...]
    files: tuple[FileEntry, ...]
    latency: Latency | None = None

    def check(self) -> None:
        require(bool(self.inputs), "inputs is empty")
        require(bool(self.tasks), "tasks is empty")
        require(bool(self.variants), "variants is empty")
        check_unique("task", (task.name for task in self.tasks))
        check_unique("variant", (variant.precision for variant in self.variants))
        check_unique("file", (entry.path for entry in self.files))
        names = [task.name for task in self.tasks]
        check_unique("utilization of task", (entry.task for entry in self.utilization))
        for entry in self.utilization:
            require(entry.task in names, f"utilization of {entry.task!r:.80}, which is no task")
        for variant in self.variants:
            with_graphs = [entry.task for entry in variant.tasks]
            with_parity = [entry.task for entry in variant.parity]
            checked = [("tasks", with_graphs), ("parity", with_parity)]
            if variant.accuracy:
                checked.append(("accuracy", [entry.task for entry in variant.accuracy]))
            for what, found in checked:
                where = f"{what} of variant {variant.precision}"
                require(found == names, f"{where} are {found!s:.200}, expected {names!s:.200}")
            for task, graphs in zip(self.tasks, variant.tasks, strict=True):
                if graphs.pruned is not None:
                    _check_pruned(task, graphs.pruned)
        listed = {entry.path for entry in self.files}
        for path in self.referenced_paths():
            require(path in listed, f"{path!r} is used but not listed in files")
        if self.latency is not None:
            fp32, others = set[str](), set[str]()
            for variant in self.variants:
                timed = fp32 if variant.precision == "fp32" else others
                timed |= {variant.joint.path, *(graphs.graph.path for graphs in variant.tasks)}
            self.latency.check_graphs(fp32, others)

    @property
    def task_names(self) -> tuple[str, ...]:
        return tuple(task.name for task in self.tasks)

    def referenced_paths(self) -> tuple[str, ...]:
        """Every path the manifest points to, apart from the list of files itself."""
        paths = [self.golden.path]
        for variant in self.variants:
            paths += [variant.weights, variant.joint.path]
            paths += [spec.path for spec in (variant.trunk, variant.joint_tails) if spec is not None]
            for task in variant.tasks:
                paths += [task.graph.path, task.tail.path]
                if task.standalone is not None:
                    paths.append(task.standalone.path)
                if task.pruned is not None:
                    paths.append(task.pruned.graph.path)
        return tuple(paths)

    def file(self, path: str) -> FileEntry:
        """The entry of `path`, which must be listed."""
        return next(entry for entry in self.files if entry.path == path)


def _check_pruned(task: TaskSpec, pruned: PrunedGraph) -> None:
    path = pruned.graph.path
    for what, name in (("accuracy", pruned.accuracy.task), ("parity", pruned.parity.task)):
        require(name == task.name, f"{what} of {path!r} is of task {name!r:.80}, expected {task.name!r}")
    count = task.routing_weights.shape[-1] if task.routing_weights is not None else 0
    fits = isinstance(count, int) and pruned.experts[-1] < count and len(pruned.experts) < count
    require(fits, f"{path!r} is without experts {pruned.experts!s:.80} of {count}: one at least must be left")


def parse_manifest(data: bytes, where: str) -> Manifest:
    """Parse the bytes of a manifest.json.

    Args:
        data: the whole file.
        where: how to name the file in errors.

    Raises:
        BundleError: not UTF-8, not JSON, of another format or version, or not what the schema allows.
    """
    if len(data) > MAX_MANIFEST_BYTES:
        raise BundleError(f"{where}: {len(data)} bytes, expected at most {MAX_MANIFEST_BYTES}")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BundleError(f"{where}: not UTF-8 text: {error.reason} at byte {error.start}") from error
    _check_format(text, where)
    advice = "Export the model again, or copy the bundle again whole."
    try:
        manifest = decode(text, Manifest)
    except StrictJsonError as error:
        raise BundleError(f"{where}: {error}. {advice}") from error
    if seal_manifest(data) != data:
        raise BundleError(f"{where}: it is not what its checksum {manifest.checksum:.64} says. {advice}")
    return manifest


def serialize_manifest(manifest: Manifest) -> bytes:
    """The bytes of manifest.json for `manifest`, its checksum filled in; parse_manifest gives it back.

    Raises:
        BundleError: it would not, because a name holds a character that cannot be printed or an integer
            passes 64 bits.
    """
    data = seal_manifest(encode(manifest._replace(checksum=_NO_CHECKSUM)).encode("ascii"))
    parse_manifest(data, MANIFEST_NAME)
    return data


def seal_manifest(data: bytes) -> bytes:
    """The bytes of a manifest with its checksum, the third value, made true."""
    found = _CHECKSUM_AT.match(data)
    if found is None:
        return data[:0]
    start, stop = found.span(1)
    digest = sha256(data[:start] + _NO_CHECKSUM.encode() + data[stop:]).hexdigest()
    return data[:start] + digest.encode() + data[stop:]


def _check_format(text: str, where: str) -> None:
    """Name and version stand first and are checked first, so that a newer format gets the right advice."""
    head = re.match(r'\s*\{\s*"format"\s*:\s*"([^"\\]{0,80})"\s*,\s*"version"\s*:\s*(\d{1,9})\s*[,}]', text)
    if head is None or head[1] != FORMAT_NAME:
        beginning = f'"format": "{FORMAT_NAME}", "version": N'
        raise BundleError(f"{where}: not a te-export bundle: expected it to begin with {beginning}")
    if int(head[2]) != FORMAT_VERSION:
        raise BundleError(
            f"{where}: bundle format version {head[2]}, this te_runtime reads version {FORMAT_VERSION}. "
            "Install the te-runtime release that matches the exporter, or export again with this release."
        )
