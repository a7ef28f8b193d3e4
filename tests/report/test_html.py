from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import streamcomp
from streamcomp.job.rows import DenseRow, LinearRow, RefinedBlock, StepRow
from streamcomp.report.html import html_report
from tests.jobs import compress, varied_text
from tests.report.reports import MEMORY, MIB, MODEL, linear, report, step

HOSTILE = "<script>alert(1)</script>\"onload=alert(1) '&{{ 7 }}{% raw %}\udcff"


class Page(HTMLParser):
    """Refuses a tag that is not closed in its turn; keeps tags, attributes and text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str]] = []
        self.text: list[str] = []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data.strip())


def test_stages_are_told_next_to_what_the_machine_could_do() -> None:
    stages = {"reverse": 20.0, "loading": 3.0, "ranks": 0.1}

    made = report(stages=stages, limits={"reverse": 15.0, "loading": 0.01})

    text = " ".join(" ".join(Page(html_report(made)).text).split())

    assert "reverse 20s 15s 75%" in text
    assert "loading 3" not in text  # too short to say anything
    assert "700 GFLOP/s" in text and "0.5 GB/s" in text


@pytest.mark.parametrize("blocks", [1, 2, 30, 126])
def test_a_page_is_well_formed_and_fetches_nothing(blocks: int) -> None:
    page = Page(html_report(report(blocks=blocks)))

    assert not page.tags & {"script", "link", "img", "iframe", "object", "embed", "base", "a"}
    assert not [pair for pair in page.attributes if pair[0] in ("src", "href")]
    assert not [pair for pair in page.attributes if "//" in pair[1] or "url(" in pair[1]]


def test_the_key_figures_are_there() -> None:
    text = " ".join(Page(html_report(report())).text).replace("\xa0", " ")

    for figure in ("pico, compressed", "25.0%", "10 M → 8 M", "19.1 MiB → 15.3 MiB"):
        assert figure in text
    for figure in ("300 MiB", "predicted 400 MiB, budget 1.00 GiB", "12s", "3 steps"):
        assert figure in text


def test_the_memory_of_a_gpu_is_told_where_there_is_one() -> None:
    memory = replace(
        MEMORY,
        device_budget_bytes=8192 * MIB,
        device_predicted_bytes=6144 * MIB,
        device_peak_bytes=5120 * MIB,
    )

    without, on_gpu = (
        " ".join(" ".join(Page(html_report(made)).text).split())
        for made in (report(), report(memory=memory))
    )

    assert "GPU" not in without
    assert "peak GPU memory 5.00 GiB predicted 6.00 GiB, budget 8.00 GiB" in on_gpu


def test_names_from_anywhere_stay_text() -> None:
    name = f"model.layers.0.{HOSTILE}"
    shared = {"axis": HOSTILE, "clusters": 3}
    hostile = report(
        [linear(name, damping=0.1, fallback=HOSTILE, bits_per_weight=4.0, spec=shared)],
        model=replace(MODEL, source=f"/models/{HOSTILE}", type=HOSTILE),
        steps=(step(HOSTILE, peak=2000 * MIB, stages={HOSTILE: 1.0}),),
        stages={HOSTILE: 1.0},
        limits={HOSTILE: 1.0},
        notes=(HOSTILE,),
        left={name: HOSTILE},
        recipe={HOSTILE: HOSTILE, "calibration": [HOSTILE]},
        levers=replace(report().levers, device=HOSTILE),
        versions={HOSTILE: HOSTILE},
        dense=(DenseRow(name=f"model.layers.0.x.{HOSTILE}", rows=4, columns=4),),
    )

    page = html_report(hostile)

    assert "<script" not in page
    assert page.encode("utf-8")
    assert Page(page).tags == Page(html_report(report(dense=hostile.dense))).tags | {"li", "ul"}
    shown = HOSTILE.replace("\udcff", "?")
    assert Page(page).text.count(f"/models/{shown}, compressed") == 1
    assert not [key for key, _ in Page(page).attributes if key.startswith("on")]
    assert not [v for k, v in Page(page).attributes if "alert" in v]


def test_every_family_is_in_the_map_the_legend_and_the_tables() -> None:
    families = ["attn.qkv", *(f"mlp.w{n}" for n in range(40))]
    linears = [linear(f"h.{block}.{name}") for block in range(3) for name in families]

    text = Page(html_report(report(linears))).text

    # a row of the map, an entry of the legend, a row of the family, one for each of its blocks
    assert all(text.count(family) == 3 + 3 for family in families)


def test_experts_of_a_block_are_one_family() -> None:
    names = [f"model.layers.{b}.mlp.experts.{e}.w1" for b in range(2) for e in range(4)]

    page = Page(html_report(report([linear(name) for name in names])))

    assert page.text.count("mlp.experts.*.w1") == 3 + 2
    assert "model.layers.0.mlp.experts.0.w1 and 3 more, on average: 1%" in page.text


def test_stacks_of_blocks_are_told_apart() -> None:
    names = ["vision.blocks.0.attn.q", "model.layers.0.attn.q"]

    text = Page(html_report(report([linear(name) for name in names]))).text

    assert {"vision.blocks.*.attn.q", "model.layers.*.attn.q"} <= set(text)


@pytest.mark.parametrize(
    "losses",
    [
        [0.0],
        [0.0, 0.0],
        [0.0, 0.5],
        [0.0, 1e-6, 0.5],
        [1e-300, 1.0],
        [1e-310, 1e-300],
        [0.1, 0.2],
        [2.5],
        [math.nan],
    ],
    ids=str,
)
def test_any_loss_can_be_plotted(losses: list[float]) -> None:
    linears = [linear(f"h.{block}.w", loss) for block, loss in enumerate(losses)]

    page = Page(html_report(report(linears)))

    paths = [value for name, value in page.attributes if name == "d"]
    assert not [path for path in paths if "nan" in path or "inf" in path]
    assert "w" in page.text


@pytest.mark.parametrize(
    ("blocks", "pieces"),
    [((0, 1, 2, 3), 1), ((0, 1, 5, 6), 2), ((0, 4, 8, 12), 1), ((0, 5, 7, 20), 3), ((3,), 1)],
)
def test_a_line_breaks_where_its_family_stays_dense(blocks: tuple[int, ...], pieces: int) -> None:
    linears = [linear(f"h.{block}.w") for block in blocks]
    linears += [linear(f"h.{block}.v") for block in range(30)]

    paths = [v for k, v in Page(html_report(report(linears))).attributes if k == "d"]

    drawn = [path for path in paths if path[0] == "M" and path[-2:] != "h0" and "h" not in path]
    assert [path.count("M") for path in drawn] == [pieces, 1]
    assert [path.count("M") + path.count("L") for path in drawn] == [len(blocks), 30]


def test_a_log_axis_where_the_range_asks_for_it() -> None:
    narrow, wide = ([linear("h.0.w", low), linear("h.1.w", 0.1)] for low in (0.01, 0.001))

    assert "log scale" not in html_report(report(narrow))
    assert "log scale" in html_report(report(wide))


def test_a_budget_far_above_the_peaks_leaves_them_readable() -> None:
    page = Page(html_report(report(memory=replace(MEMORY, budget_bytes=64 * 1024 * MIB))))

    assert "budget 64.0 GiB, above the plot" in page.text
    assert "512 MiB" in page.text


def test_warnings_name_the_worst() -> None:
    linears = [
        linear("h.0.w", fallback="no gradient arrives: one-sided"),
        linear("h.1.w", damping=1e-6),
        linear("h.2.w", damping=1e-3),
    ]
    steps = (step("block 0", 401 * MIB), step("block 1", 1025 * MIB), step("block 2"))

    page = html_report(report(linears, steps=steps))

    told = [
        "1 of 3 steps peaked above the budget; most of all block 1, by 1.00 MiB.",
        "2 of 3 steps peaked above their prediction; most of all block 1, by 625 MiB.",
        "1 of 3 linears took a fallback; the first is h.0.w: no gradient arrives: one-sided.",
        "1 of 3 linears needed 10 times the damping asked for, or more; most of all h.2.w, "
        "0.001 of the moment's mean.",
    ]
    assert [text for text in Page(page).text if text in told] == told
    assert page.index("Warnings") < page.index("Ranks")


def test_nothing_to_warn_of() -> None:
    page = html_report(report(refined=(refined(0, 0.01, 0.01, 0),)))

    assert "None." in page  # no note either
    assert 'class="alarm"' not in page and "Warnings" not in page


# -- ranks and dense linears --------------------------------------------------------------


def test_the_map_shows_the_share_of_the_full_rank_and_what_stays_dense() -> None:
    linears = [linear("h.0.w", rank=8), linear("h.1.w", rank=24), linear("h.0.v", rank=16)]
    dense = (
        DenseRow(name="h.1.v", rows=64, columns=32),
        DenseRow(name="h.2.v", rows=8, columns=8),
    )

    page = Page(html_report(report(linears, dense=dense)))

    for told in ("h.0.w: rank 8 of 64 × 32, 25%", "h.1.w: rank 24 of 64 × 32, 75%"):
        assert page.text.count(told) == 1
    for told in ("h.1.v: dense, 64 × 32", "h.2.v: dense, 8 × 8", "1–2"):
        assert page.text.count(told) == 1
    assert any("; 2 linears that could be factored stay dense." in text for text in page.text)
    fills = [v for k, v in page.attributes if k == "fill"]
    assert fills[:4] == ["var(--c0)", "var(--c0)", "var(--c0)", "var(--c4)"]  # w, w, v, v
    shades = [float(v) for k, v in page.attributes if k == "fill-opacity"][:3]
    assert shades[0] < shades[2] < shades[1]


def test_no_dense_linear_no_word_of_it() -> None:
    assert "dense" not in " ".join(Page(html_report(report())).text)


# -- numerical health ---------------------------------------------------------------------


def rows_of(page: str) -> list[list[str]]:
    """Cells of all rows of all tables."""
    rows = re.findall(r"<tr>(.*?)</tr>", page, re.DOTALL)
    return [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row, re.DOTALL) for row in rows]


def test_health_is_told_by_family_by_block_and_for_the_worst() -> None:
    linears = [
        linear("h.0.w", 0.25, loss=1.0, condition=1e3, damping=0.01),
        linear("h.1.w", 0.5, loss=2.0, condition=None, damping=0.02, fallback="none <b>"),
        linear("h.0.v", 0.125, loss=5.0, condition=2e7, damping=0.01),
    ]

    rows = rows_of(html_report(report(linears, recipe={"method": "two-sided"})))

    assert ["family", "count", "outputs × inputs", "rank", "mean loss", "max loss", "loss"] + [
        "share of all loss",
        "condition",
        "damping",
    ] in rows
    sizes = ["64 × 32", "12"]
    assert ["w", "2", *sizes, "37.5%", "50% in block 1", "3", "37.5%", "1 singular", "0.02"] in rows
    assert ["v", "1", *sizes, "12.5%", "12.5% in block 0", "5", "62.5%", "2.0e+07", "0.01"] in rows
    first = ["h.1.w", "12", "50%", "2", "25%", "singular", "0.02", "none &lt;b&gt;"]
    worst = rows.index(first)  # its fallback first, the others by loss
    assert [row[0] for row in rows[worst : worst + 3]] == ["h.1.w", "h.0.v", "h.0.w"]
    assert ["0", "w", "12", "25%", "1", "12.5%", "1.0e+03", "0.01", "–"] in rows
    assert ["1", "w", *first[1:]] in rows


def test_counts_of_what_went_wrong() -> None:
    linears = [linear(f"h.{n}.w", condition=None if n < 2 else 10.0) for n in range(4)]

    page = html_report(report(linears))

    told = "Of 4 linears none took a fallback; none needed far more damping than was asked for; "
    assert f"{told}2 had a singular moment." in page


def test_ten_are_the_worst_of_many() -> None:
    linears = [linear(f"h.{n}.w", n / 100) for n in range(40)]

    names = [row[0] for row in rows_of(html_report(report(linears)))]

    assert [n for n in names if n.startswith("h.")] == [f"h.{n}.w" for n in range(39, 29, -1)]


# -- what methods have to tell ------------------------------------------------------------


def refined(block: int, before: float, after: float, steps: int = 8) -> RefinedBlock:
    return RefinedBlock(block=block, before=before, after=after, steps=steps)


def test_refinement_is_told_block_by_block() -> None:
    blocks = (refined(0, 0.5, 0.25), refined(1, 0.4, 0.4, 0), refined(2, 0.2, 0.1, 1))

    page = html_report(report(refined=blocks))

    text = Page(page).text
    for told in ("block 0: 50% → 25%, 8 steps kept", "block 1: 40% → 40%, 0 steps kept"):
        assert told in text
    assert "block 2: 20% → 10%, 1 step kept" in text
    assert "2 of 3 blocks improved, the median went from 40% to 25%. The others stay" in page
    assert ["0", "50% → 25%", "50% less", "8"] in rows_of(page)
    assert ["1", "40% → 40%", "0% less", "0, the closed form"] in rows_of(page)
    assert "Refinement" not in Page(html_report(report())).text


@pytest.mark.parametrize("before", [0.0, 1e-12, 1e6])
def test_any_refinement_can_be_plotted(before: float) -> None:
    page = Page(html_report(report(refined=(refined(0, before, before / 2), refined(7, 1, 0.5)))))

    assert not [v for k, v in page.attributes if k == "d" and ("nan" in v or "inf" in v)]


def test_shared_channels_tell_clusters_axis_and_bits() -> None:
    def shared(name: str, bits: float, clusters: int, axis: str) -> LinearRow:
        spec = {"form": "shared", "clusters": clusters, "axis": axis}
        return linear(name, bits_per_weight=bits, energy=None, condition=None, spec=spec)

    linears = [
        shared("h.0.w", 4.0, 3, "rows"),
        shared("h.1.w", 5.0, 9, "rows"),
        shared("h.0.v", 9.0, 5, "columns"),
    ]

    page = html_report(report(linears))

    text = Page(page).text
    figure = text.index("bits per weight")
    assert "6" in text[figure : figure + 3]
    assert "3–9 clusters of rows (2) and columns (1)" in text
    assert "singular" not in [cell for row in rows_of(page) for cell in row]


def test_the_perplexity_before_is_told_where_it_is_known() -> None:
    steps = (step("gradient of the loss", nll=math.log(12.5)), step("block 0"))

    text = Page(html_report(report(steps=steps))).text

    assert "12.5" in text[text.index("perplexity before") :][:3]
    assert "perplexity before" not in Page(html_report(report())).text


# -- steps --------------------------------------------------------------------------------


def sweeps(blocks: int, prefix: str = "") -> tuple[StepRow, ...]:
    """The steps of a two-sided job."""
    numbers = range(blocks)
    names = ["tokenize", "embed", *(f"forward {n}" for n in numbers), "gradient of the loss"]
    names += [*(f"reverse {n}" for n in reversed(numbers)), "ranks"]
    names += [f"{prefix}block {n}" for n in numbers] + [f"{prefix}copy the rest"]
    return tuple(step(name) for name in names)


def labels_below(page: str) -> list[list[tuple[float, str]]]:
    """The rows of labels below the plots: percent of the width, and text."""
    rows = re.findall(r'<div class="x">(.*?)</div>', page, re.DOTALL)
    return [
        [(float(at), text) for at, text in re.findall(r'left:([\d.]+)%">(.*?)</span>', row)]
        for row in rows
    ]


@pytest.mark.parametrize("prefix", ["", "ratio 0.4: "])
@pytest.mark.parametrize("blocks", [4, 16, 30, 80, 126])
def test_sweeps_over_many_blocks_stay_apart(blocks: int, prefix: str) -> None:
    page = html_report(report([], steps=sweeps(blocks, prefix)))

    numbers, names = labels_below(page)[:2]
    assert [text for _, text in names] == ["forward", "reverse", "block"]
    assert [at for at, _ in names] == sorted(at for at, _ in names)
    assert 3 <= len(numbers) <= 12
    assert all(b[0] - a[0] >= 3.5 for a, b in pairwise(numbers))
    assert page.count('fill="var(--line)"') == 2 * 2  # bands behind the first and the third sweep


def test_a_single_sweep_has_no_band() -> None:
    page = html_report(report([], steps=tuple(step(f"block {n}") for n in range(30))))

    assert 'fill="var(--line)"' not in page
    assert [text for _, text in labels_below(page)[0]] == ["0", "5", "10", "15", "20", "25"]


def test_the_page_of_a_job_lists_what_stays_dense_and_what_was_refined(
    pico: Callable[..., Path], tmp_path: Path
) -> None:
    text = varied_text(tmp_path / "text", 4000)
    settings: dict[str, Any] = {"ratio": 0.15, "refine": 2, "exclude": "up_proj"}

    made = compress(pico("llama"), tmp_path / "out", text, **settings).report

    factored = {linear["name"] for linear in made["linears"]}
    dense = {linear["name"]: (linear["rows"], linear["columns"]) for linear in made["dense"]}
    eligible = streamcomp.inspect(pico("llama")).families
    assert not factored & set(dense)
    names = [f"model.layers.{n}.{family.name}" for n in range(2) for family in eligible]
    assert factored | set(dense) == {name for name in names if "up_proj" not in name}
    page = (tmp_path / "out" / "streamcomp_report.html").read_text("utf-8")
    shown = Page(page).text
    for name, (rows, columns) in dense.items():
        assert f"{name}: dense, {rows} × {columns}" in shown
    assert {"Refinement", "Numerical health", "perplexity before"} <= set(shown)


def test_modules_left_are_counted_by_reason() -> None:
    left = {f"model.layers.{n}.mlp.gate": "a router" for n in range(3)}
    left["model.layers.0.mlp.experts"] = "a MixtralExperts, no linear"

    text = Page(html_report(report(left=left))).text

    assert {"4 modules left as they are", "a router", "mlp.gate (3)"} <= set(text)
    assert "mlp.experts (1)" in text


def test_a_page_without_linears() -> None:
    assert "0 linears factored" in Page(html_report(report([]))).text
