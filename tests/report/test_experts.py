"""The section on experts counts tokens by block, and names experts that saw few or none."""

from __future__ import annotations

from streamcomp.job.rows import LinearRow
from streamcomp.report.experts import experts_section


def row(block: int, expert: int, tokens: int | None, columns: int = 32) -> LinearRow:
    within = f"model.layers.{block}.mlp.experts"
    return LinearRow(
        name=f"{within}.{expert}.down_proj",
        rows=48,
        columns=columns,
        damping=0.0,
        condition=None,
        fallback="",
        rank=4,
        relative_loss=0.1,
        spec={"form": "uv", "rank": 4},
        tokens=tokens,
        within=within,
    )


def test_experts_are_counted_by_block() -> None:
    rows = [row(0, 0, 100), row(0, 1, 31), row(0, 2, 0), row(3, 0, 32), row(3, 0, 32, columns=64)]

    section = experts_section(rows)

    assert section is not None
    assert section.explanation.startswith("3 of 4 experts saw fewer")
    assert section.tables[0].rows == [
        (0, 3, "0–100", "31", "1", "2"),
        (3, 1, "32", "32", "0", "–"),
    ]


def test_a_model_without_experts_has_no_such_section() -> None:
    assert experts_section([row(0, 0, None)]) is None
    assert experts_section([]) is None
