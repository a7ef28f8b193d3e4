from __future__ import annotations

from pathlib import Path

import pytest

from streamcomp.evaluation.report import model_name


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
