"""load and Model: predictions for any subset of a bundle's tasks."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple, Self, SupportsIndex

from te_runtime.batching import parse_max_batch, predict_in_parts
from te_runtime.bundle import Bundle, Check, open_bundle
from te_runtime.choices import parse_choice
from te_runtime.errors import ClosedError
from te_runtime.executor import Executor, open_executor
from te_runtime.forking import holding_back_forks, watch_forks
from te_runtime.inputs import InputReader, OnNonfinite, parse_on_nonfinite
from te_runtime.manifest import Manifest, Precision, TensorSpec, Variant
from te_runtime.memory import return_freed_memory
from te_runtime.plan import Mode, Plan, choose_plan
from te_runtime.prediction import Prediction
from te_runtime.providers import CudaOptions, Provider, ProviderChoice, ProviderName, choose_provider
from te_runtime.row_parts import RowPart
from te_runtime.task_choice import check_tasks
from te_runtime.threads import parse_spinning, parse_threads
from te_runtime.utilization import Utilization, UtilizationCounter

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from te_runtime.golden import VerifyReport

__all__ = ["Model", "ModelSettings", "choose_variant", "load"]

_CLOSED = "the model was closed: call te_runtime.load() again"
_FORKED = (
    "the model was loaded before this process was forked, and its sessions do not survive that: "
    "call te_runtime.load() again after the fork"
)


class ModelSettings(NamedTuple):
    """How a model was loaded; load() makes them from its arguments."""

    provider: ProviderChoice
    cuda: CudaOptions
    threads: int
    spinning: bool
    max_batch: int | None
    on_nonfinite: OnNonfinite


def load(
    path: str | os.PathLike[str],
    *,
    provider: ProviderName = "cpu",
    precision: str | None = None,
    threads: int | None = None,
    spinning: bool = False,
    mode: Mode | None = None,
    max_batch: int | None = None,
    on_nonfinite: OnNonfinite = "pass",
    check: Check = "full",
    cuda: CudaOptions | None = None,
) -> Model:
    """Load a bundle.

    Args:
        path: the folder that te-export wrote.
        provider: where to run: `cpu`, `cuda`, or `auto` for CUDA where it works and the CPU elsewhere.
        precision: which variant, for example `fp32`; None takes fp16 on CUDA where the bundle has it, and
            the bundle's first otherwise.
        threads: CPU threads that the trunk may use in one call; None takes half of the usable CPUs, at most
            four. Calls from several threads of one's own run side by side, which is the better use of a
            second CPU.
        spinning: have those threads turn in circles between two calls, which wakes them some µs sooner and
            takes their CPUs from everybody else; of use with `threads` above 1 on a machine of one's own.
        mode: which graphs to run. `split`: the trunk, and a tail for each task asked for, or the tails of all
            tasks as one graph. `joint`: one graph that computes every task whatever is asked for. `task`: the
            task's own graph where one task is asked for and no other; from the second on the trunk and a tail for
            each: for calls that ask for one task at a time. `pruned`: a graph per task, each with its own copy of the
            weights, without the experts that the task hardly uses where the bundle has such a graph: its answers are
            others, and the manifest says what each task loses. None decides among the first three by what
            te_runtime.plan says was measured; `model.plan` tells. A graph that only some calls need is loaded by
            the first that does, or by `model.prepare`, so memory holds the weights of what is asked for.
        max_batch: the most rows that run at once; more are cut into parts and their answers joined. None
            sets no limit.
        on_nonfinite: `error` refuses NaN and infinities in the input; `pass` lets them through.
        check: `full` compares every file's sha256 first; `size` only its size, which is faster and misses
            changed bytes.
        cuda: which GPU, and batch sizes to record as CUDA graphs.

    Returns:
        A Model; use it as a context manager or call close().

    Raises:
        BundleError: no bundle there, or it is damaged, incomplete or of another version.
        InputError: precision, threads, spinning, mode, max_batch, on_nonfinite, check or cuda is none that there is.
        ProviderError: ONNX Runtime or the provider is missing.
    """
    settings = ModelSettings(
        provider=choose_provider(provider, cuda=cuda),
        cuda=cuda or CudaOptions(),
        threads=parse_threads(threads),
        spinning=parse_spinning(spinning),
        max_batch=parse_max_batch(max_batch),
        on_nonfinite=parse_on_nonfinite(on_nonfinite),
    )
    bundle = open_bundle(path, check=check, wait=False)
    variant = choose_variant(bundle.manifest, precision, settings.provider.provider)
    plan = choose_plan(variant, mode)
    with holding_back_forks():
        bundle.start_check()
        try:
            executor = _open(bundle, variant, plan.mode, settings)
        finally:
            bundle.finish_check()  # it knows better than onnxruntime what is wrong with a file
    bundle.require_same_folder()
    return Model(bundle, variant, plan, executor, settings)


def choose_variant(manifest: Manifest, precision: str | None, provider: Provider = "cpu") -> Variant:
    """The variant of `precision`; for None the first one, or on CUDA fp16 where there is one.

    Raises:
        InputError: the bundle has no such variant.
    """
    if precision is None:
        half = (variant for variant in manifest.variants if variant.precision == "fp16")
        return next(half, manifest.variants[0]) if provider == "cuda" else manifest.variants[0]
    known = [variant.precision for variant in manifest.variants]
    return manifest.variants[known.index(parse_choice("precision of this bundle", precision, known))]


class Model:
    """A loaded bundle. Any number of threads may call predict at once; made by load()."""

    def __init__(
        self, bundle: Bundle, variant: Variant, plan: Plan, executor: Executor, settings: ModelSettings
    ) -> None:
        self._bundle = bundle
        self._variant = variant
        self._plan = plan
        self._executor: Executor | None = executor
        self._settings = settings
        self._gone = _CLOSED
        self._tasks = bundle.manifest.task_names
        self._inputs = InputReader(bundle.manifest.inputs, settings.on_nonfinite)
        self._max_batch = sys.maxsize if settings.max_batch is None else settings.max_batch
        self._counter = UtilizationCounter(bundle.manifest)
        watch_forks(self)

    @property
    def manifest(self) -> Manifest:
        """Everything the bundle says about itself."""
        return self._bundle.manifest

    @property
    def tasks(self) -> tuple[str, ...]:
        """The names of the tasks."""
        return self._tasks

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """Name, dtype and shape of every input."""
        return self._bundle.manifest.inputs

    @property
    def plan(self) -> Plan:
        """Which graphs are open, and why."""
        return self._plan

    @property
    def provider(self) -> Provider:
        """Where the model runs."""
        return self._settings.provider.provider

    @property
    def provider_choice(self) -> ProviderChoice:
        """What was asked for, where the model runs, on which GPU, and why."""
        return self._settings.provider

    @property
    def precision(self) -> Precision:
        """The variant in use."""
        return self._variant.precision

    @property
    def threads(self) -> int:
        """CPU threads that one call may use."""
        return self._settings.threads

    @property
    def max_batch(self) -> int | None:
        """The most rows that run at once; None for no limit."""
        return self._settings.max_batch

    @property
    def input_reader(self) -> InputReader:
        """What checks and casts the input of predict."""
        return self._inputs

    def predict(
        self, x: NDArray[np.generic] | Mapping[str, NDArray[np.generic]], tasks: Sequence[str] | None = None
    ) -> dict[str, Prediction]:
        """Predict tasks for a batch of rows. What runs for them is told by `plan`.

        Args:
            x: the input, of shape `(batch, ...)` as `inputs` says; for several inputs a dict from name to
                array. Other numeric dtypes are cast as te_runtime.inputs describes.
            tasks: names of tasks, each once; None means all.

        Returns:
            A Prediction per task, in the order asked for. For no rows, arrays of no rows.

        Raises:
            ClosedError: the model was closed, or loaded before a fork.
            InputError: a name, dtype, shape or value does not fit.
            BundleError: a graph cannot be loaded, its file was changed since load, or it failed while it ran.
            ProviderError: the provider does not run every node of a graph.
        """
        executor = self._executor
        if executor is None:
            raise ClosedError(self._gone)
        chosen = self._tasks if tasks is None else check_tasks(tasks, self._tasks)
        feeds, rows = self._inputs.read(x)
        if rows <= self._max_batch:
            predictions = executor.run(feeds, rows, chosen)
        else:
            predictions = predict_in_parts(executor, feeds, rows, chosen, max_batch=self._max_batch)
        self._counter.add(chosen, predictions, rows)
        return predictions

    def predict_parts(
        self, feeds: Mapping[str, NDArray[np.generic]], rows: int, parts: Sequence[RowPart]
    ) -> list[Prediction]:
        """Predict different tasks for different rows of one batch; what they share is computed once.

        Args:
            feeds: what input_reader gave, for `rows` rows, at least one.
            rows: B.
            parts: each task once, with the rows that it is wanted for.

        Returns:
            For each part a Prediction for its rows.

        Raises:
            ClosedError: the model was closed, or loaded before a fork.
            BundleError: a graph failed while it ran.
        """
        predictions = self._open_executor().run_parts(feeds, rows, parts)
        for part, prediction in zip(parts, predictions, strict=True):
            self._counter.add((part.task,), {part.task: prediction}, part.size)
        return predictions

    def example_rows(self) -> dict[str, NDArray[np.generic]]:
        """Rows that fit the model: the first group of its golden rows, by input.

        Raises:
            ClosedError: the model was closed, or loaded before a fork.
            BundleError: the golden rows cannot be used.
        """
        self._open_executor()
        with holding_back_forks():
            from te_runtime.golden_rows import read_golden_rows, take_rows  # as for verify

            golden = read_golden_rows(self._bundle, self._variant)
            return take_rows(golden, slice(0, self.manifest.golden.groups[0].rows))

    def prepare(self, tasks: Sequence[str] | None = None) -> None:
        """Load what predict needs for `tasks`, so that its first call with them does not wait.

        Args:
            tasks: names of tasks as predict takes them, each once; None means all.

        Raises:
            ClosedError: the model was closed, or loaded before a fork.
            InputError: a name does not fit.
            BundleError, ProviderError: a graph cannot be loaded.
        """
        executor = self._open_executor()
        executor.prepare(self._tasks if tasks is None else check_tasks(tasks, self._tasks))

    def utilization(self, *, reset: bool = False) -> dict[str, Utilization]:
        """How each task's experts were used by the rows that predict has answered, against the baseline.

        Args:
            reset: begin counting again after this report.

        Returns:
            A Utilization per task that has a gate. A closed model still tells what it counted.

        Raises:
            ClosedError: the model was loaded before this process was forked.
        """
        if self._gone is _FORKED:
            raise ClosedError(_FORKED)
        return self._counter.report(reset=reset)

    def verify(self) -> VerifyReport:
        """Rerun the bundle's golden rows on this device, through every graph of the variant.

        Raises:
            ClosedError: the model was closed, or loaded before a fork.
            BundleError: the golden rows or a graph cannot be used, or the files changed since they were loaded.
        """
        split = self._open_executor()
        self._bundle.require_unchanged()
        with holding_back_forks():
            from te_runtime.golden import verify  # here, since reading .npz files takes 20 ms to import

            if self._plan.mode != "split":
                split = _open(self._bundle, self._variant, "split", self._settings)
            return verify(
                self._bundle,
                self._variant,
                split,
                provider=self.provider,
                threads=self._settings.threads,
                device_id=self._settings.cuda.device_id,
            )

    def close(self) -> None:
        """Let go of the graphs. Calls running in other threads finish; later ones raise ClosedError."""
        if self._executor is not None:
            self._executor = None
            return_freed_memory()

    def forked(self) -> object:
        """Called in a forked child: refuse every use, and hand over what must not be released there."""
        kept, self._executor, self._gone = self._executor, None, _FORKED
        return kept

    def __enter__(self) -> Self:
        self._open_executor()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __reduce_ex__(self, _protocol: SupportsIndex) -> tuple[object, ...]:
        """copy, deepcopy and pickle come here; two models cannot share what one of them may close."""
        raise TypeError(
            "a loaded model cannot be copied, nor sent to another process: call te_runtime.load() again there"
        )

    def __repr__(self) -> str:
        state = "closed" if self._executor is None else self.provider
        return (
            f"<te_runtime.Model {self._bundle.root.name}, {self.precision}, {len(self.tasks)} tasks, {state}>"
        )

    def _open_executor(self) -> Executor:
        executor = self._executor
        if executor is None:
            raise ClosedError(self._gone)
        return executor


def _open(bundle: Bundle, variant: Variant, mode: Mode, settings: ModelSettings) -> Executor:
    provider = settings.provider.provider
    if provider == "cpu":
        return open_executor(
            bundle,
            variant,
            mode,
            provider=provider,
            threads=settings.threads,
            spinning=settings.spinning,
        )
    from te_runtime.open_device import open_device_executor

    return open_device_executor(
        bundle, variant, mode, provider=provider, threads=settings.threads, cuda=settings.cuda
    )
