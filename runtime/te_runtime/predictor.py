"""load and Model: predictions for any subset of a bundle's tasks."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self

from te_runtime.bundle import Bundle, Check, open_bundle
from te_runtime.errors import ClosedError, InputError
from te_runtime.golden import VerifyReport, verify
from te_runtime.inputs import prepare_inputs
from te_runtime.manifest import Manifest, Precision, TensorSpec, Variant
from te_runtime.plan import TrunkPlan, open_plan
from te_runtime.prediction import Prediction
from te_runtime.providers import Provider, parse_provider
from te_runtime.session import parse_threads

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Model", "choose_variant", "load"]


def load(
    path: str | os.PathLike[str],
    *,
    provider: Provider = "cpu",
    precision: str | None = None,
    threads: int | None = None,
    check: Check = "full",
) -> Model:
    """Load a bundle.

    Args:
        path: the folder that te-export wrote.
        provider: where to run; this release has `cpu`.
        precision: which variant, for example `fp32`; None takes the bundle's first.
        threads: CPU threads that the trunk may use in one call; None takes half of the usable CPUs, at most
            four. Calls from several threads of one's own run side by side, which is the better use of a
            second CPU.
        check: `full` compares every file's sha256 first; `size` only its size, which is faster and misses
            changed bytes.

    Returns:
        A Model; use it as a context manager or call close().

    Raises:
        BundleError: no bundle there, or it is damaged, incomplete or of another version.
        InputError: precision, threads or check is none that there is.
        ProviderError: ONNX Runtime or the provider is missing.
    """
    chosen_provider = parse_provider(provider)
    chosen_threads = parse_threads(threads)
    bundle = open_bundle(path, check=check)
    variant = choose_variant(bundle.manifest, precision)
    plan = open_plan(bundle, variant, provider=chosen_provider, threads=chosen_threads)
    bundle.require_same_folder()
    return Model(bundle, variant, plan, provider=chosen_provider, threads=chosen_threads)


def choose_variant(manifest: Manifest, precision: str | None) -> Variant:
    """The variant of `precision`, or the first one for None.

    Raises:
        InputError: the bundle has no such variant.
    """
    if precision is None:
        return manifest.variants[0]
    for variant in manifest.variants:
        if variant.precision == precision:
            return variant
    available = ", ".join(variant.precision for variant in manifest.variants)
    raise InputError(f"precision {precision!r:.80} is not in this bundle, which has {available}")


class Model:
    """A loaded bundle. Any number of threads may call predict at once; made by load()."""

    def __init__(
        self, bundle: Bundle, variant: Variant, plan: TrunkPlan, *, provider: Provider, threads: int
    ) -> None:
        self._bundle = bundle
        self._variant = variant
        self._plan: TrunkPlan | None = plan
        self._provider: Provider = provider
        self._threads = threads

    @property
    def manifest(self) -> Manifest:
        """Everything the bundle says about itself."""
        return self._bundle.manifest

    @property
    def tasks(self) -> tuple[str, ...]:
        """The names of the tasks."""
        return self._bundle.manifest.task_names

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """Name, dtype and shape of every input."""
        return self._bundle.manifest.inputs

    @property
    def provider(self) -> Provider:
        """Where the model runs."""
        return self._provider

    @property
    def precision(self) -> Precision:
        """The variant in use."""
        return self._variant.precision

    def predict(
        self, x: NDArray[np.generic] | Mapping[str, NDArray[np.generic]], tasks: Sequence[str] | None = None
    ) -> dict[str, Prediction]:
        """Predict tasks for a batch of rows. The trunk runs once; only the tails of the tasks asked for run.

        Args:
            x: the input, of shape `(batch, ...)` as `inputs` says; for several inputs a dict from name to
                array. Other numeric dtypes are cast as te_runtime.inputs describes.
            tasks: names of tasks, each once; None means all.

        Returns:
            A Prediction per task, in the order asked for. For no rows, arrays of no rows.

        Raises:
            ClosedError: the model was closed.
            InputError: a name, dtype, shape or value does not fit.
            BundleError: a graph failed while it ran.
        """
        plan = self._open_plan()
        chosen = self.tasks if tasks is None else self._checked_tasks(tasks)
        feeds, rows = prepare_inputs(x, self.inputs)
        return plan.run(feeds, rows, chosen)

    def verify(self) -> VerifyReport:
        """Rerun the bundle's golden rows on this device, through every graph of the variant.

        Raises:
            ClosedError: the model was closed.
            BundleError: the golden rows or a graph cannot be used.
        """
        plan = self._open_plan()
        return verify(self._bundle, self._variant, plan, provider=self._provider, threads=self._threads)

    def close(self) -> None:
        """Let go of the graphs. Calls running in other threads finish; later ones raise ClosedError."""
        self._plan = None

    def __enter__(self) -> Self:
        self._open_plan()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._plan is None else self._provider
        return (
            f"<te_runtime.Model {self._bundle.root.name}, {self.precision}, {len(self.tasks)} tasks, {state}>"
        )

    def _open_plan(self) -> TrunkPlan:
        plan = self._plan
        if plan is None:
            raise ClosedError("the model was closed: call te_runtime.load() again")
        return plan

    def _checked_tasks(self, tasks: Sequence[str]) -> Sequence[str]:
        if isinstance(tasks, str):
            raise InputError(
                f"tasks: got the text {tasks!r:.80}, expected a list of names: pass [{tasks!r:.80}]"
            )
        known = self.tasks
        chosen = list(tasks)
        if not chosen:
            raise InputError(
                f"tasks is empty: leave it out for all tasks, or name some of {', '.join(known):.400}"
            )
        for task in chosen:
            if task not in known:
                near = difflib.get_close_matches(str(task), known, n=1)
                hint = f"did you mean {near[0]!r}? " if near else ""
                raise InputError(f"unknown task {task!r:.80}: {hint}The tasks are {', '.join(known):.400}")
            if chosen.count(task) > 1:
                raise InputError(f"task {task!r} is asked for twice, expected each name once")
        return chosen
