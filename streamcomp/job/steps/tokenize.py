"""The step that turns the calibration text into windows of tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from streamcomp.calibration.corpus import load_windows, tokenizing_bytes
from streamcomp.job.files import Windows
from streamcomp.job.levers import Levers
from streamcomp.job.outline import Outline
from streamcomp.job.rows import StepResult
from streamcomp.job.steps.base import Phase, Step
from streamcomp.job.workspace import Stage, Workspace

__all__ = ["Tokenize"]

_SECONDS = 0.5  # a guess: it depends on the text, which is not read for a plan


@dataclass(frozen=True)
class Tokenize(Step):
    """Draws the windows of the recipe from its texts."""

    @classmethod
    def make(cls) -> Tokenize:
        return cls("tokenize", writes=(Windows(),))

    @property
    def on_host(self) -> bool:
        return True

    @property
    def after_capture(self) -> bool:
        return False

    def phases(self, outline: Outline, levers: Levers) -> Iterator[Phase]:
        held = tokenizing_bytes(outline.skeleton.index.folder, outline.tokens)
        yield Phase("reading", {"tokenizer": held}, _SECONDS)

    def run(self, work: Workspace, stage: Stage) -> StepResult:
        stage("reading text")
        recipe = work.recipe
        windows = load_windows(
            work.skeleton.index.folder,
            recipe.calibration,
            recipe.samples,
            recipe.seq_len,
            recipe.seed,
            chat=recipe.chat,
        )
        work.write_tokens(windows.tokens)
        return StepResult(windows=len(windows.tokens), notes=windows.notes)
