"""What the steps of a job share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from streamcomp.job import runner, workspace
from tests.jobs import compress, varied_text

MiB = 2**20


def test_each_step_reads_the_block_of_the_next_ahead(
    pico: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(
        workspace,
        "read_ahead",
        lambda infos: asked.extend(info.name.split(".")[2] for info in infos[:1]),
    )
    text = varied_text(tmp_path / "text", 2000)

    compress(pico("llama", blocks=3), tmp_path / "out", text)

    # forward up, gradient, reverse down, ranks, writing up
    assert asked == ["1", "2", "1", "0", "1", "2"]


@pytest.mark.parametrize(
    ("room", "store", "asks"),
    [(10 * MiB, None, True), (10 * MiB - 1, None, False), (10 * MiB - 1, "fetches shards", True)],
)
def test_nothing_is_read_ahead_for_which_the_budget_has_no_room(
    room: int, store: str | None, asks: bool
) -> None:
    infos = [SimpleNamespace(nbytes=4 * MiB), SimpleNamespace(nbytes=6 * MiB)]
    plan: Any = SimpleNamespace(
        steps=[
            SimpleNamespace(peak_bytes=100 * MiB, step=SimpleNamespace(block=k)) for k in (0, 1)
        ],
        budget_bytes=100 * MiB + room,
        outline=SimpleNamespace(
            blocks=[SimpleNamespace(read_bytes=10 * MiB)] * 2,
            skeleton=SimpleNamespace(
                block_tensors=lambda _: infos, index=SimpleNamespace(store=store)
            ),
        ),
    )

    assert runner._next_block(plan, 0) == (infos if asks else [])
