"""The page that people read: tables of ratios with their spread, where te-export loses, who was left out and why."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from rivals_losses import Loss, find_losses
from rivals_parity import ALLOWED
from rivals_plan import Point, Scope, device_label
from rivals_plots import Figure
from rivals_results import Measured, Ratio, Results, take_ratio
from rivals_subjects import Role

INTRODUCTION = """\
# te-export and its rivals

    {command}

This page is what that command wrote; its text stands in `scripts/rivals_page.py`. Everything at one point (a model, a
number of threads, a batch size) is measured in one process in one run, in turns whose order is drawn anew for each round:
{timing}.

*Naive* is `torch.onnx.export` of one task in ONNX Runtime, taken as it comes; for all tasks a session for each, run one
after another. The *roof* is one Gemm that reads as many weight bytes, and multiplies and adds as often, as te-export's
float32 graph of the same scope, run by ONNX Runtime: a runtime whose Gemm is better can get below it in float32, and lower
precision does. R is the reference model: input 784, backbone 512, K experts of 128, T tasks, float32.

- A ratio is taken within a round, of medians. Given are the median over all rounds and the span from the 10th to the
  90th percentile. `~` marks a ratio whose first and second half of rounds differ by more than 5%.
- Everybody gets the same rows as a numpy array, gives predictions as numpy arrays and has as many threads. te_runtime gives
  the routing weights as well.
- Before anybody is timed, answers are compared with float64 torch on the very rows, and whoever is off is not timed.
- With two threads everybody waits 50 ms before each turn: threads of ONNX Runtime and of OpenMP turn in circles for up to
  40 ms after a call, and would take a CPU from whoever comes next. Bare sessions leave that on, as ONNX Runtime does by
  itself, and a session per task suffers from its neighbours' threads; te_runtime turns it off.
- OpenVINO runs with its latency hint, one stream, a fixed batch size, one infer request used again and memory shared with
  numpy. Left to itself it computes in bfloat16 on CPUs that can; here its precision is set and stated.
- torch.compile runs with freezing: its first batch size is compiled for itself, further ones for any size. Where all tasks
  are wanted, torch computes what they share once.
"""
NOISY_BELOW = 0.8
"""Share of steady ratios below which a run is called noisy."""


def write_page(results: Results, figures: Sequence[Figure]) -> str:
    """The whole page as Markdown; figures by their names, which are taken to lie in the page's folder."""
    steps: Iterable[Iterable[str]] = (
        _introduction(results),
        _machine(results),
        _losses(results),
        _figures(figures),
        _tables(results),
        _errors(results),
        _absences(results),
    )
    return "\n".join(line for step in steps for line in step).rstrip() + "\n"


def _introduction(results: Results) -> Iterator[str]:
    settings = results.settings
    timing = (
        f"{settings['seconds per point']} s for each point, and {settings['least rounds']} rounds at least"
    )
    yield INTRODUCTION.format(command=settings["command"], timing=timing)


def _machine(results: Results) -> Iterator[str]:
    yield "## Measured on"
    yield ""
    yield from table(("", ""), results.settings.items())
    yield ""
    yield from table(("model", ""), results.models.items())
    yield ""
    ratios = [take_ratio(entry, naive) for entry, naive in _with_naive(results)]
    steady = sum(ratio.is_steady for ratio in ratios)
    yield (
        f"{steady} of {len(ratios)} ratios to naive are steady: the first and the second half of their rounds agree "
        "within 5%."
    )
    if steady < NOISY_BELOW * len(ratios):
        yield (
            "**That is a noisy run**: the machine did not keep one speed, because of other work on it or of its neighbours "
            "on the same host. Believe what differs by more than its span."
        )
    yield ""


def _losses(results: Results) -> Iterator[str]:
    losses = find_losses(results)
    yield "## Where we lose"
    yield ""
    if not losses:
        yield "Nowhere at the points that were measured: no rival that is at least as precise was faster."
        yield ""
        return
    yield (
        "Rivals that compute at least as precisely and took less time, told from the figures by the program. *Clear* are "
        "points at which they were faster in nine rounds of ten. The ratio is the rival's latency over ours."
    )
    yield ""
    headings = ("ours", "rival", "faster at", "clear", "by most", "where")
    yield from table(headings, (_loss_row(loss) for loss in losses))
    yield ""


def _loss_row(loss: Loss) -> tuple[str, ...]:
    point, ratio = loss.worst
    return (
        f"{loss.ours}, {loss.scope}",
        loss.rival,
        f"{len(loss.points)} of {loss.measured}",
        str(loss.clear),
        shown(ratio),
        point.label,
    )


def _figures(figures: Sequence[Figure]) -> Iterator[str]:
    for figure in figures:
        yield f"![{figure.caption}]({figure.path.name})"
        yield ""


def _tables(results: Results) -> Iterator[str]:
    for model, device, threads in dict.fromkeys((p.model, p.device, p.threads) for p in results.points()):
        yield f"## {model.label}: {device_label(device, threads)}"
        yield ""
        for scope in Scope:
            points = [
                p for p in results.points() if (p.model, p.device, p.threads) == (model, device, threads)
            ]
            yield from _table(results, points, scope)


def _table(results: Results, points: Sequence[Point], scope: Scope) -> Iterator[str]:
    """A row for each subject; naive's own row tells its latency."""
    batches = "/".join(str(point.batch) for point in points)
    headings = [f"{scope}, over naive", *(f"B = {point.batch}" for point in points), f"over roof, {batches}"]
    if scope is Scope.ALL_TASKS:
        headings.append(f"over naive for one task, {batches}")
    subjects = dict.fromkeys(entry.subject for point in points for entry in results.at(point, scope))
    yield from table(headings, (_subject_row(results, points, scope, name) for name in subjects))
    yield ""


def _subject_row(results: Results, points: Sequence[Point], scope: Scope, name: str) -> list[str]:
    cells, over_roof, over_one = [name], [], []
    for point in points:
        entry = next((own for own in results.at(point, scope) if own.subject == name), None)
        naive, roof = results.naive(point, scope), results.roof(point, scope)
        one = results.naive(point, Scope.ONE_TASK)
        is_naive = entry is not None and entry.role is Role.NAIVE
        cells.append(f"{entry.median_us:,.0f} µs" if entry and is_naive else _ratio_cell(entry, naive))
        over_roof.append(_median_cell(entry, roof))
        over_one.append(_median_cell(entry, one))
    cells.append(" / ".join(over_roof))
    if scope is Scope.ALL_TASKS:
        cells.append(" / ".join(over_one))
    return cells


def _ratio_cell(above: Measured | None, below: Measured | None) -> str:
    return "—" if above is None or below is None else shown(take_ratio(above, below))


def _median_cell(above: Measured | None, below: Measured | None) -> str:
    return "—" if above is None or below is None else f"{take_ratio(above, below).median:.2f}"


def shown(ratio: Ratio) -> str:
    """`~0.84 (0.80–0.91)`."""
    mark = "" if ratio.is_steady else "~"
    return f"{mark}{ratio.median:.2f} ({ratio.low:.2f}–{ratio.high:.2f})"  # noqa: RUF001 - a span


def _errors(results: Results) -> Iterator[str]:
    yield "## Errors of what was timed"
    yield ""
    yield (
        "The largest over all points: root mean square of the differences to float64 torch, over the spread of its answers "
        "from row to row, of the task where that is largest."
    )
    yield ""
    worst: dict[tuple[str, str, float], float] = {}
    for entry in results.measured:
        if entry.error is not None:
            key = (f"{entry.subject}, {entry.scope}", entry.precision, ALLOWED[entry.precision])
            worst[key] = max(worst.get(key, 0.0), entry.error)
    rows = ((name, kind, f"{error:.1e}", f"{allowed:g}") for (name, kind, allowed), error in worst.items())
    yield from table(("subject", "precision", "error", "allowed"), rows)
    yield ""


def _absences(results: Results) -> Iterator[str]:
    if not results.absences:
        return
    yield "## Left out"
    yield ""
    places: dict[tuple[str, str], list[str]] = {}
    for absence in results.absences:
        places.setdefault((absence.subject, absence.reason), []).append(absence.where)
    rows = ((subject, "; ".join(where), reason) for (subject, reason), where in places.items())
    yield from table(("subject", "where", "why"), rows)
    yield ""


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """A Markdown table; whatever would end a cell or a row is written otherwise."""
    for cells in (headings, ["---"] * len(headings), *rows):
        yield "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"


def _with_naive(results: Results) -> Iterator[tuple[Measured, Measured]]:
    for entry in results.measured:
        naive = results.naive(entry.point, entry.scope)
        if naive is not None and entry.role is not Role.NAIVE:
            yield entry, naive
