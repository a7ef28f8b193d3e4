"""Fingerprints of an older version are those of today with the defaults of newer settings."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from streamcomp import JobMismatchError, Recipe
from streamcomp.checkpoint.index import read_index
from streamcomp.job.journal import JOURNAL, check_fingerprint, fingerprint, same_analysis, same_job
from streamcomp.job.publish import REPORT
from streamcomp.settings import setting
from tests.jobs import Interrupt, Interrupted, Notes, compress, varied_text

WANTED: dict[str, Any] = {"source": "ab", "ratio": 0.3, "samples": 64, "store_every": 1}


def test_a_setting_that_did_not_exist_yet_had_its_default() -> None:
    older = {name: value for name, value in WANTED.items() if name != "store_every"}

    check_fingerprint(older, WANTED, Path("out"))
    assert same_analysis(older, WANTED) and same_analysis(WANTED, older)

    other = WANTED | {"store_every": 2}
    with pytest.raises(JobMismatchError, match="store_every was 1, now 2"):
        check_fingerprint(older, other, Path("out"))
    assert not same_analysis(older, other)


def test_a_new_setting_had_the_default_of_its_method() -> None:
    swsc = {"source": "ab", "method": "swsc"}

    assert same_job(swsc, swsc | {"form": "shared", "allocation": "uniform"})
    assert not same_job(swsc, swsc | {"form": "pivot"})


def test_a_recipe_that_is_refused_today_is_another_job_and_no_error() -> None:
    held = WANTED | {"method": "of another version"}

    assert same_job(held, held) and not same_job(held, WANTED)


def test_a_setting_that_affects_nothing_is_in_no_fingerprint(pico: Callable[..., Path]) -> None:
    @dataclass(frozen=True)
    class Longer(Recipe):
        colour: str = setting("red", section="output", help="Of the report.", affects="nothing")
        depth: int = setting(1, section="method", help="Of the search.")

    index = read_index(pico("llama"))
    longer, today = fingerprint(index, Longer()), fingerprint(index, Recipe())

    assert set(longer) - set(today) == {"depth"}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return varied_text(tmp_path / "text.txt", 2000)


def forget(path: Path, name: str) -> None:
    """Take a setting out of the report or the journal at ``path``, as if it did not exist then."""
    first, rest = path.read_text("utf-8"), ""
    if path.name == JOURNAL:
        first, _, rest = first.partition("\n")
    held = json.loads(first)
    del held["fingerprint"][name]
    held.get("recipe", {}).pop(name, None)
    held.pop("checksum", None)
    path.write_text(sealed(json.dumps(held)) + rest, "utf-8")


def sealed(text: str) -> str:
    """The line of a journal with the JSON object ``text``, and the checksum of that."""
    checksum = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    return f'{text[:-1]}, "checksum": "{checksum}"}}\n'


def test_a_finished_job_without_a_new_setting_is_done(
    pico: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    model, out = pico("llama"), tmp_path / "out"
    compress(model, out, text)
    forget(out / REPORT, "rate")

    assert compress(model, out, text).already_done
    forget(out / REPORT, "seed")
    with pytest.raises(JobMismatchError, match="seed was 0, now 1"):
        compress(model, out, text, seed=1)


def test_an_unfinished_job_without_a_new_setting_goes_on(
    pico: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    model, out = pico("llama"), tmp_path / "out"
    with pytest.raises(Interrupted):
        compress(model, out, text, progress=Interrupt(3))
    forget(out / ".streamcomp" / JOURNAL, "damping")

    with pytest.raises(JobMismatchError, match=r"damping was 0\.0, now 0\.1"):
        compress(model, out, text, damping=0.1)
    notes = Notes()
    assert not compress(model, out, text, progress=notes).already_done
    assert notes.done == 4
