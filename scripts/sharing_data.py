"""The two real tables that ways of sharing are compared on, both read from files inside installed packages.

digits  scikit-learn's 1,797 handwritten digits, 8 x 8 pixels. Which digit it is was written down by people;
        parity and closed loops are functions of the digit, the heaviest quadrant is a function of the pixels.
nhefs   the NHANES I epidemiologic follow-up study of smokers, from the package causaldata (MIT; data of the
        CDC, in the public domain). Inputs were measured or asked in 1971; the targets are four columns of the
        follow-up: weight and systolic pressure in 1982, death by 1992, and whether the person quit smoking.

N rows of a table, B rows of a split, D inputs.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.impute import SimpleImputer
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler

HELD_OUT_SHARE = 0.25
LOOPS_OF_DIGIT = np.array([1, 0, 0, 0, 0, 0, 1, 0, 2, 1])

NHEFS_NUMBERS = (
    "age income school ht wt71 smokeintensity smokeyrs alcoholhowmuch pregnancies cholesterol price71 tax71"
)
NHEFS_YES_OR_NO = (
    "sex race asthma bronch tb hf pepticulcer colitis hepatitis chroniccough hayfever polio tumor "
    "nervousbreak headache otherpain weakheart allergies nerves lackpep wtloss infection"
)
NHEFS_CODES = (
    "marital education hbp diabetes alcoholpy alcoholfreq alcoholtype pica hbpmed boweltrouble active "
    "exercise birthcontrol"
)
NHEFS_TARGETS = {
    "weight_1982": "wt82",
    "systolic_1982": "sbp",
    "death_by_1992": "death",
    "quit_smoking": "qsmk",
}
"""Left out: columns of 1982 and later, what is derived from them, identifiers, and the state of birth."""


@dataclass(frozen=True)
class Task:
    """One target column; `classes` is None where it holds values."""

    name: str
    classes: int | None

    @property
    def outputs(self) -> int:
        return 1 if self.classes is None else self.classes

    @property
    def measure(self) -> str:
        return "R²" if self.classes is None else "accuracy"


@dataclass(frozen=True)
class Table:
    """A data set before it is split.

    Attributes:
        inputs: (N, D) float64, NaN where a value is missing.
        is_scaled: (D,), whether a column is brought to mean 0 and deviation 1 by the training rows' own.
        targets: per task (N,), classes counted from 0 or values.
    """

    name: str
    inputs: NDArray[np.float64]
    is_scaled: NDArray[np.bool_]
    tasks: tuple[Task, ...]
    targets: Mapping[str, NDArray[np.float64]]


@dataclass(frozen=True)
class Rows:
    """What a model is given.

    Attributes:
        numbers: (B,), the place of each row in its table.
        x: (B, D) float32.
        targets: in task order, classes (B,) int64 or standardized values (B, 1) float32.
    """

    numbers: NDArray[np.int64]
    x: torch.Tensor
    targets: tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Split:
    training: Rows
    held_out: Rows


def load_table(name: str) -> Table:
    """Reads one of TABLES."""
    return TABLES[name]()


def split_table(table: Table, seed: int) -> Split:
    """Draws the held-out rows; medians, means and deviations come from the training rows alone."""
    numbers = np.arange(len(table.inputs))
    training, held_out = train_test_split(numbers, test_size=HELD_OUT_SHARE, random_state=seed)
    imputer = SimpleImputer(strategy="median").fit(table.inputs[training])
    scaler = StandardScaler().fit(imputer.transform(table.inputs[training]))

    def prepared(rows: NDArray[np.int64]) -> Rows:
        filled = imputer.transform(table.inputs[rows])
        x = np.where(table.is_scaled, scaler.transform(filled), filled).astype(np.float32)
        targets = tuple(_target(task, table.targets[task.name], rows, training) for task in table.tasks)
        return Rows(rows, torch.from_numpy(x), targets)

    return Split(prepared(training), prepared(held_out))


def _target(
    task: Task, column: NDArray[np.float64], rows: NDArray[np.int64], training: NDArray[np.int64]
) -> torch.Tensor:
    if task.classes is not None:
        return torch.from_numpy(column[rows].astype(np.int64))
    values = (column[rows] - column[training].mean()) / column[training].std()
    return torch.from_numpy(values.astype(np.float32)).reshape(-1, 1)


def _load_digits() -> Table:
    pixels, digit = load_digits(return_X_y=True)
    # (N, upper or lower half, row, left or right half, column), ink summed over rows and columns → (N, 4)
    ink_of_quadrant = pixels.reshape(-1, 2, 4, 2, 4).sum(axis=(2, 4)).reshape(-1, 4)
    return Table(
        name="digits",
        inputs=pixels / 16.0,
        is_scaled=np.zeros(pixels.shape[1], dtype=np.bool_),
        tasks=(Task("digit", 10), Task("parity", 2), Task("closed_loops", 3), Task("heaviest_quadrant", 4)),
        targets={
            "digit": digit,
            "parity": digit % 2,
            "closed_loops": LOOPS_OF_DIGIT[digit],
            "heaviest_quadrant": ink_of_quadrant.argmax(axis=1),
        },
    )


def _load_nhefs() -> Table:
    path = _package_file("causaldata", "nhefs/nhefs.dta")
    # Imported here: only this table needs it, and the digits are compared without it.
    import pandas as pd

    frame = pd.read_stata(path)
    frame = frame.dropna(subset=list(NHEFS_TARGETS.values()))
    numbers = frame[NHEFS_NUMBERS.split()].to_numpy(np.float64)
    is_missing = np.isnan(numbers)
    # Which columns there are is the same for every split: codes and gaps of the whole table, no statistics.
    codes = pd.get_dummies(frame[NHEFS_CODES.split()].astype(str)).to_numpy(np.float64)
    flags = frame[NHEFS_YES_OR_NO.split()].astype(np.float64).to_numpy()
    gaps = is_missing[:, is_missing.any(axis=0)].astype(np.float64)
    inputs = np.hstack([numbers, flags, codes, gaps])
    return Table(
        name="nhefs",
        inputs=inputs,
        is_scaled=np.arange(inputs.shape[1]) < len(NHEFS_NUMBERS.split()),
        tasks=(
            Task("weight_1982", None),
            Task("systolic_1982", None),
            Task("death_by_1992", 2),
            Task("quit_smoking", 2),
        ),
        targets={task: frame[column].to_numpy(np.float64) for task, column in NHEFS_TARGETS.items()},
    )


def _package_file(package: str, path: str) -> Path:
    """A file of an installed package that need not be imported: causaldata imports statsmodels."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            f"{package} is not installed. Install what the comparison needs: pip install '.[compare]'"
        )
    return Path(spec.submodule_search_locations[0]) / path


TABLES: Mapping[str, Callable[[], Table]] = {"digits": _load_digits, "nhefs": _load_nhefs}
