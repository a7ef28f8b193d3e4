"""What the steps of a job share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from streamcomp.job import workspace
from streamcomp.job.workspace import Workspace
from tests.jobs import compress, varied_text

MiB = 2**20


def test_each_step_reads_the_block_of_the_next_ahead(
    pico: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(
        workspace, "read_ahead", lambda infos: asked.append(infos[0].name.split(".")[2])
    )
    text = varied_text(tmp_path / "text", 2000)

    compress(pico("llama", blocks=3), tmp_path / "out", text)

    # forward up, gradient, reverse down, ranks, writing up
    assert asked == ["1", "2", "1", "0", "1", "2"]


@pytest.mark.parametrize(("room", "asks"), [(10 * MiB, True), (10 * MiB - 1, False)])
def test_nothing_is_read_ahead_for_which_the_budget_has_no_room(
    room: int, asks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(workspace, "read_ahead", asked.append)
    steps = [
        SimpleNamespace(peak_bytes=100 * MiB, step=SimpleNamespace(block=block)) for block in (4, 5)
    ]
    infos = [SimpleNamespace(nbytes=4 * MiB), SimpleNamespace(nbytes=6 * MiB)]
    space: Any = SimpleNamespace(
        plan=SimpleNamespace(steps=steps, budget_bytes=100 * MiB + room),
        journal=SimpleNamespace(steps=[]),
        skeleton=SimpleNamespace(block_tensors=lambda _: infos),
    )

    Workspace._read_ahead(space, 4)

    assert asked == ([infos] if asks else [])
