from __future__ import annotations

import math
from html.parser import HTMLParser
from typing import Any

import pytest

from streamcomp.evaluation.html import html_report

HOSTILE = '<script>alert("1")</script>&\'\udcff'
MIB = 2**20


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


def linear(name: str, loss: float = 0.01, **more: Any) -> dict[str, Any]:
    return {
        "name": name,
        "rows": 64,
        "columns": 32,
        "rank": 12,
        "relative_loss": loss,
        "damping": 0.0,
    } | more


def step(name: str, peak: int = 300 * MIB) -> dict[str, Any]:
    return {
        "step": name,
        "seconds": 1.5,
        "stages": {"loading": 0.5, "observing": 1.0},
        "peak_bytes": peak,
        "predicted_bytes": 400 * MIB,
    }


def report(
    linears: list[dict[str, Any]] | None = None, blocks: int = 2, **more: Any
) -> dict[str, Any]:
    if linears is None:
        names = ("self_attn.q_proj", "mlp.down_proj")
        linears = [linear(f"model.layers.{n}.{name}") for n in range(blocks) for name in names]
    return {
        "model": {
            "source": "/models/pico",
            "type": "llama",
            "linear_parameters": 8_000_000,
            "linear_parameters_kept": 6_000_000,
            "ratio": 0.25,
            "parameters": 10_000_000,
            "parameters_kept": 8_000_000,
            "model_ratio": 0.2,
            "bytes": 20_000_000,
            "bytes_kept": 16_000_000,
        },
        "memory": {
            "budget_bytes": 1024 * MIB,
            "minimum_bytes": 350 * MIB,
            "predicted_bytes": 400 * MIB,
            "peak_bytes": 300 * MIB,
        },
        "seconds": 12.5,
        "steps": [step("tokenize"), *(step(f"block {n}") for n in range(blocks))],
        "linears": linears,
    } | more


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


def test_names_from_a_checkpoint_stay_text() -> None:
    hostile = report(
        [linear(f"model.layers.0.{HOSTILE}", damping=0.1)],
        model=report()["model"] | {"source": f"/models/{HOSTILE}", "type": HOSTILE},
        steps=[step(HOSTILE, peak=2000 * MIB)],
        notes=[HOSTILE],
        left={f"model.layers.0.{HOSTILE}": HOSTILE},
        recipe={HOSTILE: HOSTILE, "method": HOSTILE},
        levers={HOSTILE: [HOSTILE]},
        versions={HOSTILE: HOSTILE},
    )
    hostile["steps"][0]["stages"] = {HOSTILE: 1.0}

    page = html_report(hostile)

    assert "<script" not in page
    assert page.encode("utf-8")
    assert "script" not in Page(page).tags


def test_every_family_is_in_the_legend_and_in_the_table() -> None:
    families = ["attn.qkv", *(f"mlp.w{n}" for n in range(40))]
    linears = [linear(f"h.{block}.{name}") for block in range(3) for name in families]

    text = Page(html_report(report(linears))).text

    assert all(text.count(family) == 2 for family in families)


def test_experts_of_a_block_are_one_family() -> None:
    names = [f"model.layers.{b}.mlp.experts.{e}.w1" for b in range(2) for e in range(4)]

    page = Page(html_report(report([linear(name) for name in names])))

    assert page.text.count("mlp.experts.*.w1") == 2
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


def test_a_log_axis_where_the_range_asks_for_it() -> None:
    narrow, wide = ([linear("h.0.w", low), linear("h.1.w", 0.1)] for low in (0.01, 0.001))

    assert "log scale" not in html_report(report(narrow))
    assert "log scale" in html_report(report(wide))


def test_a_budget_far_above_the_peaks_leaves_them_readable() -> None:
    memory = report()["memory"] | {"budget_bytes": 64 * 1024 * MIB}

    page = Page(html_report(report(memory=memory)))

    assert "budget 64.0 GiB, above the plot" in page.text
    assert "512 MiB" in page.text


def test_warnings_name_the_worst() -> None:
    linears = [linear(f"h.{n}.w", damping=damping) for n, damping in enumerate((0, 1e-6, 1e-3))]
    steps = [step("block 0", 401 * MIB), step("block 1", 1025 * MIB), step("block 2")]

    text = "\n".join(Page(html_report(report(linears, steps=steps))).text)

    assert "1 of 3 steps peaked above the budget; most of all block 1, by 1.00 MiB." in text
    assert "2 of 3 steps peaked above their prediction; most of all block 1, by 625 MiB." in text
    assert "2 of 3 linears needed damping" in text
    assert "most of all h.2.w, by 0.001." in text


def test_nothing_to_warn_of() -> None:
    page = html_report(report())

    assert "None." in page
    assert 'class="warning"' not in page


def test_modules_left_are_counted_by_reason() -> None:
    left = {f"model.layers.{n}.mlp.gate": "a router" for n in range(3)}
    left["model.layers.0.mlp.experts"] = "a MixtralExperts, no linear"

    text = Page(html_report(report(left=left))).text

    assert {"4 modules left as they are", "a router", "mlp.gate (3)"} <= set(text)
    assert "mlp.experts (1)" in text


def test_no_linears_and_keys_that_are_not_known() -> None:
    bare = report([])
    del bare["linears"]
    strange = report([linear("h.0.w", condition=3.0, method={"a": [1]})], condition={"x": 1})
    del strange["linears"][0]["rank"], strange["linears"][0]["relative_loss"]

    assert "0 linears factored" in Page(html_report(bare)).text
    assert "1 linear factored" in Page(html_report(strange)).text
