"""report.html: what it says, that it is well formed and fetches nothing, and that no name gets out of its place."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from itertools import pairwise

import pytest

import te_export
from te_export.options import FailedVariant, TaskPruning
from te_export.pruning.expert_use import ExpertUse
from te_export.report.heat_colours import HEAT_STEPS, HeatStep, heat_step
from te_export.report.html import HTML_REPORT_NAME, render_html, visible
from te_export.rewrite.log import Applied, Declined, GraphCost, GraphCosts, RewriteLog
from te_runtime.manifest import (
    FileEntry,
    Golden,
    GraphLatency,
    GraphSpec,
    GroupParity,
    Latency,
    LayerAccuracy,
    LayerLoss,
    Manifest,
    ModelInfo,
    OutputParity,
    Precision,
    Producer,
    PrunedGraph,
    RowGroup,
    TaskAccuracy,
    TaskGraphs,
    TaskParity,
    TaskSpec,
    TaskUtilization,
    TensorSpec,
    Variant,
)

VOID = {"meta", "wbr"}
COMMON = ("summary", "contents", "exported", "parity", "routing", "rewrites", "variants")
LOG = RewriteLog(
    applied=(Applied("fold_linears", "backbone.6", "folded into 3 layers"),),
    declined=(Declined("batch_linears", "experts.1", "12,345 weights are faster apart"),),
    costs=(
        GraphCosts(
            "joint", GraphCost({"Gemm": 30, "Relu": 17}, 4_001, 16_004), GraphCost({"Gemm": 9}, 3_001, 12_004)
        ),
    ),
)
NO_LOG = RewriteLog()


@dataclass
class Seen(HTMLParser):
    """What a parser finds: every tag balanced, or the test fails."""

    open: list[str] = field(default_factory=list)
    tags: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)
    cells: list[str] = field(default_factory=list)
    text: str = ""

    def __post_init__(self) -> None:
        super().__init__(convert_charrefs=True)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        assert len({name for name, _ in attrs}) == len(attrs)
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data
        if self.cells and {"td", "th"} & set(self.open):
            self.cells[-1] += data

    def named(self, *tags: str) -> list[dict[str, str | None]]:
        return [attrs for tag, attrs in self.tags if tag in tags]


def read(page: str) -> Seen:
    seen = Seen()
    seen.feed(page)
    seen.close()
    assert seen.open == []
    return seen


def figures(error: float = 3e-8, *, own: float = 2e-8, bound: float = 12e-8) -> OutputParity:
    groups = tuple(
        GroupParity(name, 10, error * times, own * times, bound)
        for name, times in (("ordinary", 1), ("large", 2))
    )
    ratio = error / own if own else None
    return OutputParity(error * 2, 1e-6, own * 2, 2e-6, ratio, 5e-9, 4e-9, 0.975, 1.0, groups)


def parity(task: str, *, gate: bool) -> TaskParity:
    return TaskParity(task, figures(), figures() if gate else None)


def graph(path: str, name: str = "x") -> GraphSpec:
    spec = TensorSpec(name, "float32", ("batch", 4))
    return GraphSpec(path, (spec,), (spec,))


def accuracy(task: str) -> TaskAccuracy:
    return TaskAccuracy(
        task, "calibration data", 718, "accuracy", 0.28, 0.5, 91.25, 90.97, 0.9912, 1e-4, 2.5e-5, 0.9875
    )


def pruned(task: str) -> PrunedGraph:
    return PrunedGraph(
        graph(f"fp32/pruned-{task}.onnx"), (1,), (0.07,), accuracy(task), parity(task, gate=True)
    )


def layers(tasks: tuple[str, ...], kept: str) -> tuple[LayerAccuracy, ...]:
    """Shared experts, a kept head of the first task, and what was not measured."""
    loss = LayerLoss(tasks[0], 0.75, 0.5, 0.02, 0.01)
    return (
        LayerAccuracy(("experts.0.weight", "experts.1.weight"), 131_072, None, "converted", loss),
        LayerAccuracy((kept,), 16_385, tasks[:1], "kept", loss),
        LayerAccuracy(("gates.0.weight",), 16_386, tasks[:1], "converted", None),
    )


def variant(precision: Precision, tasks: tuple[str, ...], gated: int, prune: bool = False) -> Variant:
    lower = precision != "fp32"
    return Variant(
        precision=precision,
        form="dynamic" if lower else "float32",
        optimized="exact",
        target_provider="cpu",
        weights=f"{precision}/weights.bin",
        joint=graph(f"{precision}/joint.onnx"),
        trunk=graph(f"{precision}/trunk.onnx"),
        joint_tails=graph(f"{precision}/joint-tails.onnx"),
        tasks=tuple(
            TaskGraphs(
                task,
                graph(f"{precision}/task-{task}.onnx"),
                graph(f"{precision}/tail-{task}.onnx"),
                None,
                pruned(task) if prune else None,
            )
            for task in tasks
        ),
        kept_weights=("heads.0.weight",) if lower else (),
        accuracy=tuple(accuracy(task) for task in tasks) if lower else (),
        parity=tuple(parity(task, gate=place < gated) for place, task in enumerate(tasks)),
        layers=layers(tasks, "heads.0.weight") if lower else (),
    )


def use(task: str, experts: int) -> TaskUtilization:
    total = experts * (experts + 1) / 2
    mean = tuple((place + 1) / total for place in range(experts))
    return TaskUtilization(
        task,
        mean,
        tuple(x / 2 for x in mean),
        tuple(min(1.0, x * 3) for x in mean),
        (0, *range(7, 6 + experts)),
    )


def manifest(
    tasks: int = 3,
    experts: int = 4,
    *,
    gated: int | None = None,
    lower: tuple[Precision, ...] = (),
    prune: bool = False,
) -> Manifest:
    """A manifest of so many tasks; the first `gated` of them have a gate."""
    names = tuple(f"task_{place}" for place in range(tasks))
    gated = tasks if gated is None else gated
    variants = (variant("fp32", names, gated, prune), *(variant(name, names, gated) for name in lower))
    shape = TensorSpec("y", "float32", ("batch", 10))
    weights = TensorSpec("w", "float32", ("batch", experts))
    made = Manifest(
        format="te-export-bundle",
        version=1,
        checksum="",
        model=ModelInfo(
            "TaskExpert", {"input_dim": 784, "dims": (3, 5)}, "ab" * 32, 14_966_036, ("lost.weight",)
        ),
        producer=Producer("0.1.0", "2.13.0", "1.23.2", "0.7.2", "1.31.1", 23),
        inputs=(TensorSpec("x", "float32", ("batch", 784)), TensorSpec("age", "int64", ("batch", 1))),
        tasks=tuple(
            TaskSpec(name, shape, weights if place < gated else None) for place, name in enumerate(names)
        ),
        variants=variants,
        golden=Golden("golden.npz", (RowGroup("ordinary", 10),)),
        utilization=tuple(use(name, experts) for name in names[:gated]),
        files=(),
    )
    paths = sorted({*made.referenced_paths(), "report.md"})
    sizes = {"fp32/weights.bin": 2_000_000, "int8/weights.bin": 500_000}
    return made._replace(files=tuple(FileEntry(path, sizes.get(path, 1_234), "cd" * 32) for path in paths))


def with_latency(made: Manifest, machine: str = "A CPU of 2.9 GHz") -> Manifest:
    """The same with a time for each joint graph and task graph; a variant is as much faster as it is late."""
    graphs = tuple(
        GraphLatency(path, batch, 120.0 * batch, 100.0 * batch, 900.0 * batch, 321, 1 / (1 + place))
        for place, entry in enumerate(made.variants)
        for path in (entry.joint.path, *(task.graph.path for task in entry.tasks))
        for batch in (1, 8, 64)
    )
    return made._replace(latency=Latency(machine, "1.31.1", "cpu", 1, graphs))


LEFT_OUT = (FailedVariant("fp16", "fp16 is left out: float16 cannot hold 3 of 40 weights"),)


def pruning(task: str) -> TaskPruning:
    kept = ExpertUse((0.6, 0.05, 0.35), (0.9, 0.0712, 0.8))
    return TaskPruning(task, kept, 0.5, removed=(1,), loss_points=0.12, added_bytes=393_216)


# What it says


def test_every_section_is_there_once_and_in_the_contents() -> None:
    made = manifest(lower=("int8",), prune=True)

    seen = read(render_html(made, ["a note"], LOG, [pruning("task_0")]))

    ids = [attrs["id"] for attrs in seen.named("h2")]
    assert ids == [*COMMON, "pruning", "notes", "provenance"]
    assert [a["href"] for a in seen.named("a") if a["href"] != "#variants"] == [
        f"#{name}" for name in ids[2:] if name != "variants"
    ]
    assert [attrs["aria-labelledby"] for attrs in seen.named("section", "nav")] == ids


def test_sections_of_what_was_not_asked_for_are_left_out() -> None:
    seen = read(render_html(manifest(), (), NO_LOG))

    assert [attrs["id"] for attrs in seen.named("h2")] == [*COMMON, "provenance"]
    assert "None: the graphs are as they were captured." in seen.text
    assert "left out" not in seen.text.lower()
    assert "what each layer costs" not in seen.text
    assert "Latency was not measured; te-export --measure-latency does." in seen.text
    assert "this page holds no times and no paths" in seen.text


def test_latency() -> None:
    seen = read(render_html(with_latency(manifest(lower=("int8",))), (), LOG))

    ids = [attrs["id"] for attrs in seen.named("h2")]
    assert ids == [*COMMON, "latency", "provenance"]
    assert "#latency" in [attrs["href"] for attrs in seen.named("a")]
    place = seen.cells.index("321")
    assert seen.cells[place - 6 : place + 8] == [
        *("all tasks", "fp32", "1", "120 µs", "1.00x", "100 µs to 900 µs", "321"),
        *("all tasks", "int8", "1", "120 µs", "0.50x", "100 µs to 900 µs", "321"),
    ]
    assert sum(cell == "task_2" for cell in seen.cells) > 2 * 3
    told = "All tasks for one row at a time took 120 µs in fp32, 120 µs in int8, on A CPU of 2.9 GHz"
    assert told in seen.text
    assert "Measured on A CPU of 2.9 GHz, onnxruntime 1.31.1 on cpu, one thread." in seen.text
    assert "was not measured" not in seen.text
    assert "no times" not in seen.text
    assert "a measurement, and so have other bytes each time" in seen.text


def test_latency_of_the_joint_graph_alone() -> None:
    made = with_latency(manifest())
    assert made.latency is not None
    made = made._replace(latency=made.latency._replace(graphs=made.latency.graphs[1:2]))

    seen = read(render_html(made, (), LOG))

    assert "All tasks for 8 rows at a time took 960 µs in fp32" in seen.text
    assert "Task graphs" not in seen.text


def test_what_each_layer_costs() -> None:
    page = render_html(manifest(lower=("int8", "int4")), (), LOG)
    seen = read(page)

    place = seen.cells.index("experts.{0…1}.weight")
    row = ["experts.{0…1}.weight", "8 bits", "0.250", "0.750", "task_0", "1.000", "131,072"]
    assert seen.cells[place : place + 7] == row
    place = seen.cells.index("heads.0.weight")
    row = ["heads.0.weight", "float32, kept", "0.250", "0.750", "task_0", "1.000", "task_0", "16,385"]
    assert seen.cells[place : place + 8] == row
    assert seen.cells.count("not measured") == 2
    assert "8 bits, kept" in seen.cells
    assert seen.text.count("1 of 3 rows were not measured") == 2
    assert "experts.<wbr>{0…1}.<wbr>weight</th>" in page


def test_many_layers_are_opened_by_the_reader() -> None:
    made = manifest(lower=("int8",))
    fp32, int8 = made.variants
    many = tuple(LayerAccuracy((f"w{place}x",), 1, None, "converted", None) for place in range(40))

    page = render_html(made._replace(variants=(fp32, int8._replace(layers=many))), (), LOG)

    assert "<summary>int8: layers that every task reads (40 rows)</summary>" in page


def test_variants_that_are_left_out() -> None:
    seen = read(render_html(manifest(), (), LOG, left_out=LEFT_OUT))

    assert "\nfp16: float16 cannot hold 3 of 40 weights\n" in seen.text
    assert "Asked for and left out: fp16. Why is told with the variants." in seen.text


def test_what_was_exported() -> None:
    seen = read(render_html(manifest(), (), LOG))

    for cell in ("x", "age", "int64", "(batch, 784)", "task_2", "(batch, 10)", "(batch, 4)", "784", "3, 5"):
        assert cell in seen.cells
    for told in ("ab" * 32, "14,966,036 bytes", "2.13.0", "te-export-bundle version 1", "lost.weight"):
        assert told in seen.text


def test_parity_shows_the_bound_and_how_much_of_it_was_used() -> None:
    page = render_html(manifest(), (), LOG)
    cells = read(page).cells

    place = cells.index("large")
    assert cells[place - 2 : place + 6] == [
        *("task_0", "prediction", "large", "6.00e-08", "4.00e-08", "1.50", "1.20e-07", "50%")
    ]
    assert 'style="--w:50%">50%<' in page
    assert "At most 50% of the error that was allowed was used: by task_0, prediction, large rows." in page
    assert "At worst an error is 1.50 times torch&#39;s own in float32." in page


def test_no_error_of_torch_and_no_bound_are_no_division() -> None:
    made = manifest(1)
    first = made.variants[0]
    exact = TaskParity("task_0", figures(0.0, own=0.0, bound=0.0), None)

    seen = read(render_html(made._replace(variants=(first._replace(parity=(exact,)),)), (), LOG))

    place = seen.cells.index("large")
    assert seen.cells[place + 3 : place + 6] == ["-", "0.00e+00", "-"]
    assert "of the error that was allowed" not in seen.text


def test_the_heat_map_has_a_cell_for_each_task_and_expert() -> None:
    page = render_html(manifest(tasks=2, experts=4), (), LOG)
    seen = read(page)

    # 1/10, 2/10, 3/10 and 4/10 of the weight, by 4 experts: 0.4, 0.8, 1.2 and 1.6 equal shares.
    expected = [("0.100", "0.050 to 0.300", "0 won", 1), ("0.200", "0.100 to 0.600", "7 won", 3)]
    expected += [("0.300", "0.150 to 0.900", "8 won", 3), ("0.400", "0.200 to 1.000", "9 won", 4)]
    for mean, low_high, wins, step in expected:
        assert seen.cells.count(f"{mean} {low_high} {wins}") == 2
        assert page.count(f'<td class="h{step}"><b>{mean}</b>') == 2
    assert "task_0: 0" in seen.text
    assert any("Heat map" in (attrs.get("aria-label") or "") for attrs in seen.named("div"))


def test_tasks_without_a_gate_are_named_and_have_no_row() -> None:
    seen = read(render_html(manifest(3, gated=1), (), LOG))

    assert "Without a gate, so without routing weights: task_1, task_2." in seen.text
    assert seen.cells.count("no gate") == 2
    assert sum("won" in cell for cell in seen.cells) == 4


def test_a_model_without_any_gate_has_no_heat_map() -> None:
    seen = read(render_html(manifest(2, gated=0), (), LOG))

    assert "Without a gate, so without routing weights: task_0, task_1." in seen.text
    assert "Heat map" not in str(seen.tags)
    assert "largest weight" not in seen.text


def test_gates_of_different_widths_share_the_map() -> None:
    made = manifest(2, experts=4)
    made = made._replace(utilization=(made.utilization[0], use("task_1", 2)))

    seen = read(render_html(made, (), LOG))

    assert "different numbers of experts" in seen.text
    assert seen.cells.count("-") == 2


def test_rewrites_before_and_after() -> None:
    seen = read(render_html(manifest(), (), LOG))

    for told in ("47", "4,001", "16,004", "9", "3,001", "12,004", "0.75x"):
        assert told in seen.cells
    assert "fold_linears at backbone.6: folded into 3 layers" in seen.text
    assert "batch_linears left experts.1: 12,345 weights are faster apart" in seen.text
    assert "30 Gemm, 17 Relu" in seen.text


def test_many_rewrites_are_cut_short() -> None:
    applied = tuple(Applied("rule", f"node_{place}", "done") for place in range(250))

    text = read(render_html(manifest(), (), replace(LOG, applied=applied))).text

    assert "node_99:" in text
    assert "node_100:" not in text
    assert "… and 150 more" in text


def test_variants_of_lower_precision() -> None:
    seen = read(render_html(manifest(lower=("int8",)), (), LOG))

    for cell in ("0.28", "91.25 to 90.97", "99.12%", "2.5e-05", "98.75%", "500,000", "0.25"):
        assert cell in seen.cells
    assert "heads.0.weight" in seen.text
    assert "int8 takes 0.25 of the bytes of fp32" in seen.text
    assert "0.28 of the 0.5 percentage points allowed, over 718 rows of calibration data" in seen.text


def test_pruning() -> None:
    seen = read(render_html(manifest(2, prune=True), (), LOG, [pruning("task_0")]))

    assert (
        "task_0: without experts 1 of 3 it loses 0.12 of the 0.5 points allowed; 393,216 bytes" in seen.text
    )
    for cell in ("0.0712", "gone", "kept", "task_1 without experts it hardly uses"):
        assert cell in seen.cells
    assert "For every task there is one more graph" in seen.text


def test_one_task() -> None:
    seen = read(render_html(manifest(1), (), LOG))

    assert "TaskExpert: 1 task" in seen.text
    assert "It answers one task, task_0." in seen.text


def test_every_file_is_listed_with_its_size_and_sha256() -> None:
    made = manifest()
    cells = read(render_html(made, (), LOG)).cells

    for entry in made.files:
        place = cells.index(entry.path)
        assert cells[place + 1]
        assert cells[place + 2 : place + 4] == [f"{entry.size_bytes:,}", entry.sha256]


# How it is made


PAGES: dict[str, Callable[[], str]] = {
    "plain": lambda: render_html(manifest(), (), LOG),
    "full": lambda: render_html(
        with_latency(manifest(lower=("int8", "int4"), prune=True)),
        ["n"],
        LOG,
        [pruning("task_0")],
        left_out=LEFT_OUT,
    ),
    "no gate": lambda: render_html(manifest(1, gated=0), (), NO_LOG),
}
every_page = pytest.mark.parametrize("make", PAGES.values(), ids=PAGES)


@every_page
def test_nothing_is_fetched_and_nothing_runs(make: Callable[[], str]) -> None:
    page = make()
    seen = read(page)

    assert re.findall(r"https?:|//|\bsrc\s*=|url\(|@import|@font-face|\bon\w+\s*=", page, re.IGNORECASE) == []
    assert not seen.named("script", "link", "img", "iframe", "object", "base", "form")
    assert all(str(attrs["href"]).startswith("#") for attrs in seen.named("a"))


@every_page
def test_the_structure_is_sound(make: Callable[[], str]) -> None:
    page = make()
    seen = read(page)

    assert page.startswith("<!DOCTYPE html>\n<html lang=")
    levels = [int(tag[1]) for tag, _ in seen.tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(below - above <= 1 for above, below in pairwise(levels))
    ids = [attrs["id"] for _, attrs in seen.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert {str(attrs["href"])[1:] for attrs in seen.named("a")} <= set(ids)
    assert {attrs["aria-labelledby"] for _, attrs in seen.tags if "aria-labelledby" in attrs} <= set(ids)
    assert {attrs.get("scope") for attrs in seen.named("th")} == {"col", "row"}
    assert "" not in seen.cells
    assert len(seen.named("caption")) == len(seen.named("table"))
    assert all(attrs.get("tabindex") == "0" and attrs.get("aria-label") for attrs in seen.named("div"))


@every_page
def test_the_same_bundle_gives_the_same_bytes(make: Callable[[], str]) -> None:
    assert make() == make()


def test_a_bundle_lists_its_report(exported: te_export.ExportResult) -> None:
    data = (exported.bundle / HTML_REPORT_NAME).read_bytes()

    assert exported.manifest.file(HTML_REPORT_NAME).size_bytes == len(data)
    without = exported.manifest._replace(
        files=tuple(entry for entry in exported.manifest.files if entry.path != HTML_REPORT_NAME)
    )
    assert data.decode("utf-8") == render_html(without, exported.notes, exported.rewrites, exported.pruning)
    assert str(exported.bundle.parent) not in data.decode("utf-8")
    read(data.decode("utf-8"))


def test_the_size_of_a_usual_bundle() -> None:
    assert len(render_html(manifest(5, 8), ["n"] * 5, LOG).encode("utf-8")) < 60_000


def test_200_tasks_of_64_experts_stay_usable() -> None:
    page = render_html(manifest(200, 64), (), LOG)
    seen = read(page)

    assert len(page) < 3_000_000
    assert sum(cell.endswith(" won") for cell in seen.cells) == 200 * 64
    assert page.count('class="heat"') == 4
    assert "experts 48 to 63" in seen.text
    # Tables of hundreds of rows are opened by the reader: tasks, parity twice, files.
    assert sum("rows)" in part for part in re.findall(r"<summary>(.*?)</summary>", page)) == 4
    assert "task_5 and 194 more" in seen.text


# Names from outside


HOSTILE = {
    "script": "<script>alert(1)</script>",
    "attribute": '" onmouseover="alert(1)" x=\'',
    "end of table": "</td></tr></table></main>]]>-->",
    "entity": "&lt;b&gt; &amp; &#x3c;",
    "template": "{{ 7 * 7 }}{% raw %}",
    "right to left": "שלום",
    "override": "a\u202ecba\u2066\u200b",
    "control": "\x00\x1b[31m\r\x7f\x85",
    "surrogate": "\ud800",
    "long": "w" * 5000,
}


@pytest.mark.parametrize("name", HOSTILE.values(), ids=HOSTILE)
def test_no_name_gets_out_of_its_place(name: str) -> None:
    made = with_latency(manifest(2, lower=("int8",), prune=True))
    plain = read(render_html(made, ["n"], LOG, [pruning("t")], left_out=LEFT_OUT))
    made = made._replace(
        model=made.model._replace(family=name, config={name: name, "dims": 3}, unused_parameters=(name,)),
        inputs=(made.inputs[0]._replace(name=name, shape=(name, 3)), made.inputs[1]),
        tasks=tuple(task._replace(name=f"{name}{place}") for place, task in enumerate(made.tasks)),
        utilization=tuple(
            entry._replace(task=f"{name}{place}") for place, entry in enumerate(made.utilization)
        ),
        variants=tuple(
            entry._replace(
                kept_weights=(name,) * len(entry.kept_weights),
                layers=tuple(
                    layer._replace(
                        weights=(name,),
                        tasks=layer.tasks and (name,),
                        loss=layer.loss and layer.loss._replace(task=name),
                    )
                    for layer in entry.layers
                ),
            )
            for entry in made.variants
        ),
        producer=made.producer._replace(torch=name),
        latency=with_latency(made, name).latency,
    )
    log = RewriteLog(
        (Applied(name, name, name),), (Declined(name, name, name),), (replace(LOG.costs[0], graph=name),)
    )

    page = render_html(
        made,
        [name],
        log,
        [replace(pruning(name), loss_points=None, reason=name)],
        left_out=[FailedVariant("fp16", name)],
    )

    seen = read(page)
    tags = [(tag, list(attrs)) for tag, attrs in seen.tags if tag != "wbr"]
    assert tags == [(tag, list(attrs)) for tag, attrs in plain.tags if tag != "wbr"]
    assert visible(name) in seen.cells
    assert all(char.isprintable() or char == "\n" for char in page)
    page.encode("utf-8")


def test_what_cannot_be_seen_stands_as_its_escape() -> None:
    assert visible("a\u202eb\x1b[0m\x00\ud800\nc") == r"a\u202eb\x1b[0m\x00\ud800 c"
    assert visible("שלום été 漢字") == "שלום été 漢字"
    assert visible("x" * 3000) == f"{'x' * 2000}… (3,000 characters)"


# Colours


def luminance(colour: str) -> float:
    """Relative luminance, WCAG 2.2."""
    channels = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    lighter, darker = sorted((luminance(one), luminance(other)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


@pytest.mark.parametrize("step", HEAT_STEPS, ids=range(len(HEAT_STEPS)))
def test_text_on_every_heat_colour_can_be_read(step: HeatStep) -> None:
    assert contrast(*step.light) >= 4.5
    assert contrast(*step.dark) >= 4.5


def test_each_step_stands_out_from_the_one_before() -> None:
    for scheme in ("light", "dark"):
        grounds = [luminance(getattr(step, scheme)[0]) for step in HEAT_STEPS]
        assert grounds == sorted(grounds, reverse=scheme == "light")


def test_text_on_the_page_can_be_read() -> None:
    page = render_html(manifest(1), (), LOG)

    schemes = re.findall(r":root \{ color-scheme: \w+; (.*?) \}", page)
    assert len(schemes) == 2
    for scheme in schemes:
        colours = dict(part.strip().split(": ") for part in scheme.split(";"))
        full = {
            name: "#" + "".join(char * 2 for char in value[1:]) if len(value) == 4 else value
            for name, value in colours.items()
        }
        for text in ("--text", "--quiet", "--mark"):
            for ground in ("--ground", "--soft"):
                assert contrast(full[text], full[ground]) >= 4.5


@pytest.mark.parametrize(
    ("mean", "experts", "step"),
    [
        (0.0, 8, 0),
        (0.124, 1, 0),
        (0.125, 1, 1),
        (0.125, 8, 3),
        (0.5, 2, 3),
        (0.25, 8, 5),
        (1.0, 8, 6),
        (1.0, 1, 3),
    ],
)
def test_steps_compare_with_an_equal_share(mean: float, experts: int, step: int) -> None:
    assert heat_step(mean, experts) == step
