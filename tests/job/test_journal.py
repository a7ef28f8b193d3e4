"""Fingerprints of an older version are those of today with the defaults of newer settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from streamcomp import JobMismatchError
from streamcomp.job.journal import check_fingerprint, same_analysis

WANTED: dict[str, Any] = {"source": "ab", "ratio": 0.3, "samples": 64, "store_every": 1}


def test_a_setting_that_did_not_exist_yet_had_its_default() -> None:
    older = {name: value for name, value in WANTED.items() if name != "store_every"}

    check_fingerprint(older, WANTED, Path("out"))
    assert same_analysis(older, WANTED) and same_analysis(WANTED, older)

    other = WANTED | {"store_every": 2}
    with pytest.raises(JobMismatchError, match="store_every was 1, now 2"):
        check_fingerprint(older, other, Path("out"))
    assert not same_analysis(older, other)
