"""Rows of journal and report: to JSON and back, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from streamcomp import OutputError
from streamcomp.job.levers import Levers
from streamcomp.job.publish import REPORT, read_report
from streamcomp.job.rows import (
    AnalysisRow,
    Header,
    JobLevers,
    LinearRow,
    Refined,
    RefinedBlock,
    Report,
    Row,
    StepResult,
    StepRow,
)
from tests.report.reports import report

LEVERS = JobLevers(4, 2, 256, 512, 1, 3, 1, "cpu", True, False)
HEADER = Header(
    version=5,
    fingerprint={"source": "abc", "ratio": [0.2, 0.4]},
    levers=LEVERS,
    total=2,
    planned_seconds=(0.5, 1.0),
)
ANALYSIS = AnalysisRow(
    name="h.0.w", rows=64, columns=32, energy=2.5, damping=0.01, condition=None, fallback=""
)
LINEAR = LinearRow(
    **vars(ANALYSIS), rank=12, relative_loss=0.25, loss=1.5, spec={"form": "uv", "rank": 12}
)
SHARED = LinearRow(
    **vars(replace(ANALYSIS, energy=None)),
    rank=0,
    relative_loss=0.25,
    numbers=600,
    bits_per_weight=4.5,
    spec={},
)
MEASURED: dict[str, Any] = {
    "step": "block 0",
    "seconds": 1.5,
    "stages": {"loading": 1.5},
    "limits": {},
    "peak_bytes": 300,
    "predicted_bytes": 400,
}
PLAIN = StepRow(**MEASURED)
FULL = StepRow(
    **vars(
        StepResult(
            block=0,
            output=1,
            digest="ff",
            detail="loss 1%",
            notes=("a note",),
            windows=8,
            nll=3.5,
            analysis=(ANALYSIS,),
            linears=(LINEAR, SHARED),
            unreached=("h.0.v",),
            ranks=({"h.0.w": 12, "h.0.v": None}, {}),
            refined=Refined(before=0.5, after=0.25, steps=8),
        )
    ),
    **MEASURED,
    device_peak_bytes=5,
    device_predicted_bytes=6,
)


REPORT_ROW = report(
    [LINEAR, SHARED],
    refined=(RefinedBlock(block=0, before=0.5, after=0.25, steps=8),),
    levers=LEVERS,
    left={"h.0.gate": "a router"},
    asked=0.2,
)


ROWS = [HEADER, ANALYSIS, LINEAR, SHARED, PLAIN, FULL, REPORT_ROW]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: type(row).__name__)
def test_a_row_comes_back_from_json(row: Row) -> None:
    text = json.dumps(row.to_dict())

    again = type(row).from_dict(json.loads(text))

    assert again == row
    assert json.dumps(again.to_dict()) == text


def test_fields_with_defaults_are_left_out() -> None:
    assert PLAIN.to_dict() == MEASURED
    assert next(iter(FULL.to_dict())) == "step"
    assert ANALYSIS.to_dict()["condition"] is None  # has no default: it says something
    assert "energy" not in SHARED.to_dict() and "numbers" not in LINEAR.to_dict()


def test_a_plan_takes_its_own_levers_of_those_of_a_job() -> None:
    assert LEVERS.planned == Levers(4, 2, 256, 512, 1, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"planned": 1}, r"StepRow has unknown keys: \['planned'\]"),
        ({"seconds": "1"}, "StepRow.seconds is '1'"),
        ({"seconds": None}, "StepRow.seconds is None"),
        ({"seconds": 10**400}, "StepRow.seconds is a number of 1329 bits"),
        ({"peak_bytes": 1.5}, "StepRow.peak_bytes is 1.5"),
        ({"peak_bytes": True}, "StepRow.peak_bytes is True"),
        ({"peak_bytes": 10**30}, "StepRow.peak_bytes is a number of 100 bits"),
        ({"stages": [1.0]}, "StepRow.stages is"),
        ({"stages": {"loading": {}}}, "StepRow.stages is {}"),
        ({"notes": "a"}, "StepRow.notes is 'a'"),
        ({"linears": {}}, "StepRow.linears is {}"),
        ({"linears": [{"name": "h.0.w"}]}, "StepRow.linears lacks rows, columns, damping"),
        ({"refined": {"before": 1.0, "after": 1.0, "steps": 1, "x": 1}}, "refined has unknown"),
        ({"ranks": [{"h.0.w": 0.5}]}, "StepRow.ranks is 0.5"),
    ],
    ids=str,
)
def test_what_is_no_row_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StepRow.from_dict(MEASURED | change)


def test_a_value_that_must_be_there_is_missed() -> None:
    with pytest.raises(ValueError, match="StepRow lacks seconds"):
        StepRow.from_dict({name: value for name, value in MEASURED.items() if name != "seconds"})
    levers = {name: value for name, value in vars(LEVERS).items() if name != "batch"}
    with pytest.raises(ValueError, match="Header.levers lacks batch"):
        Header.from_dict(HEADER.to_dict() | {"levers": levers})


def test_a_whole_number_is_a_float_too() -> None:
    seconds = StepRow.from_dict(MEASURED | {"seconds": 2}).seconds

    assert seconds == 2.0 and type(seconds) is float


# -- reports -----------------------------------------------------------------------------


def test_a_report_passes_over_what_another_version_told() -> None:
    plain = REPORT_ROW.to_dict()
    plain |= {"redone": [], "recipe": {"method": "svd-llm", "centred": False}}
    plain["linears"] = [linear | {"colour": "red"} for linear in plain["linears"]]

    read = Report.from_dict(plain)

    assert read == replace(REPORT_ROW, recipe=plain["recipe"])
    assert read.settings.method == "svd-llm"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": []}, r"Report.model is \[\]"),
        ({"seconds": "long"}, "Report.seconds is 'long'"),
        ({"linears": [{"name": 3}]}, "Report.linears lacks rows"),
        ({"recipe": {"ratio": "half"}}, "report: ratio = 'half'"),
        ({"recipe": {"method": "magic"}}, "method 'magic' unknown"),
        ({"steps": []}, "no steps"),
    ],
    ids=str,
)
def test_a_report_with_other_values_is_damaged(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / REPORT).write_text(json.dumps(REPORT_ROW.to_dict() | change))

    with pytest.raises(OutputError, match=f"is damaged .*{message}.*: remove .* and start again"):
        read_report(tmp_path)
