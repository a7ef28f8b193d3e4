from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from streamcomp.recipe import METHODS, Recipe
from streamcomp.report.card import model_card
from streamcomp.report.summary import model_name
from tests.jobs import REPOSITORY
from tests.report.reports import MODEL, report


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("/hub/models--org--tiny-7b/snapshots/0123abcd", "org/tiny-7b"),
        ("/models/tiny", "tiny"),
        ("/models/tiny/", "tiny"),
    ],
)
def test_a_checkpoint_is_called_by_its_model_not_by_its_path(folder: str, name: str) -> None:
    assert model_name(Path(folder)) == name


PAPERS = {
    "two-sided": ["2604.00821", "2605.15626"],
    "svd-llm": ["2403.07378"],
    "rom": ["2312.07046"],
    "swsc": ["2501.08631"],
}


def cited(text: str) -> list[str]:
    return re.findall(r"arXiv (\d{4}\.\d{5})", text)


@pytest.mark.parametrize("method", METHODS)
def test_a_card_cites_what_its_model_was_made_by(method: str) -> None:
    form = "shared" if method == "swsc" else "uv"

    assert cited(model_card(report(), Recipe(method=method, form=form))) == PAPERS[method]


def test_a_card_cites_the_form_and_what_follows_the_closed_form() -> None:
    def papers(**settings: Any) -> list[str]:
        return cited(model_card(report(), Recipe(method="svd-llm", **settings)))

    assert papers() == ["2403.07378", "2501.19090"]
    assert papers(update=True, refine=10) == ["2403.07378", "2501.19090", "2604.02119"]


def test_the_readme_cites_what_cards_do() -> None:
    last = (REPOSITORY / "README.md").read_text("utf-8").rpartition("## Licence")[2]

    wanted = {paper for papers in PAPERS.values() for paper in papers}
    assert set(cited(last)) == wanted | {"2501.19090", "2604.02119"}


def test_a_name_in_a_card_is_text_of_one_line() -> None:
    name = "a<script>*b*\n# [c](d)|_e_`f`\\&\udcff"

    card = model_card(report(model=replace(MODEL, source=name)), Recipe())

    title = next(line for line in card.splitlines() if line.endswith(", compressed"))
    told = r"# a&lt;script&gt;\*b\* # \[c\](d)\|\_e\_\`f\`\\&amp;?, compressed"
    assert title == told
    assert card.encode("utf-8")
