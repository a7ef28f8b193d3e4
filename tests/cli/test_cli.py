"""The command line: what goes to which stream, and the way of a job through it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import click
import pytest
import torch

from streamcomp import cli
from streamcomp.job.progress import SilentProgress
from tests.forks import in_a_fork
from tests.jobs import (
    SMALL,
    Finished,
    Interrupt,
    Interrupted,
    compress,
    config_of,
    products,
    quick_plan,
    run_cli,
    stored_tensors,
    tree,
    varied_text,
)

GROUP = cli.cli
LITTLE = ("--samples", SMALL["samples"], "--seq-len", SMALL["seq_len"], "--threads", 1)
STEPS = ["tokenize", "embed", "forward 0", "forward 1", "gradient of the loss", "reverse 1"]
STEPS += ["reverse 0", "ranks", "block 0", "block 1", "copy the rest"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return varied_text(tmp_path_factory.mktemp("text") / "text.txt", 2000)


@pytest.fixture(scope="module")
def model(pico: Callable[..., Path]) -> Path:
    return pico("llama")


@pytest.fixture(scope="module")
def done(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished job; not to be changed."""
    out = tmp_path_factory.mktemp("done") / "out"
    compress(model, out, text)
    return out


@pytest.fixture(autouse=True)
def quick() -> Iterator[None]:
    """The speed of this machine, only shown, is not measured for ``plan`` either."""
    with quick_plan():
        yield


def job(model: Path, out: Path, text: Path, *more: object) -> Finished:
    return run_cli("compress", model, out, "--calibration", text, *LITTLE, *more)


def stop_after(step: int) -> Any:
    """A patch: jobs of the command line are interrupted when ``step`` is durable."""
    return mock.patch(
        "streamcomp.job.progress.console_progress", side_effect=lambda quiet: Interrupt(step)
    )


# -- where options stand --------------------------------------------------------------------


def test_options_before_the_command_hold_for_it(model: Path) -> None:
    before = run_cli("--max-ram", "3G", "plan", model, *LITTLE, "--json")
    after = run_cli("plan", model, *LITTLE, "--max-ram", "3G", "--json")

    assert before.json["budget_bytes"] == after.json["budget_bytes"] == 3 * 2**30


def test_an_option_behind_the_command_goes_before_one_ahead_of_it(model: Path) -> None:
    both = run_cli("--max-ram", "1G", "plan", model, *LITTLE, "--max-ram", "2G", "--json")

    assert both.json["budget_bytes"] == 2 * 2**30


def test_an_option_ahead_of_a_command_without_it_does_no_harm(model: Path) -> None:
    assert run_cli("--max-ram", "1G", "--threads", 1, "inspect", model).code == 0


# -- which stream ---------------------------------------------------------------------------


def test_progress_is_plain_lines_where_no_terminal_is(
    model: Path, text: Path, tmp_path: Path
) -> None:
    finished = job(model, tmp_path / "out", text)

    assert finished.code == 0
    lines = finished.err.splitlines()
    assert lines[0] == f"{tmp_path / 'out'}: {len(STEPS)} steps"
    told = [line for line in lines if line.startswith("[")]
    for number, (line, step) in enumerate(zip(told, STEPS, strict=True), 1):
        assert line.startswith(f"[{number}/{len(STEPS)}] {step} ")
        assert "RSS" in line and line.endswith("left")
    assert "\x1b" not in finished.err + finished.out and "\r" not in finished.err
    assert "linear parameters" in finished.out
    assert not any(step in finished.out for step in STEPS[:3])


@pytest.mark.parametrize("flag", ["--quiet", "-q"])
def test_a_quiet_job_tells_its_result_alone(
    model: Path, text: Path, tmp_path: Path, flag: str
) -> None:
    finished = job(model, tmp_path / "behind", text, flag)
    assert (finished.code, finished.err) == (0, "")
    assert "linear parameters" in finished.out

    ahead = run_cli(flag, "compress", model, tmp_path / "ahead", "--calibration", text, *LITTLE)
    assert (ahead.code, ahead.err) == (0, "")


def test_a_job_in_json_prints_one_document_and_nothing_else(model: Path, tmp_path: Path) -> None:
    short = varied_text(tmp_path / "short.txt", 100)  # six windows of the eight, hence a note

    finished = job(model, tmp_path / "out", short, "--json")

    assert (finished.code, finished.err) == (0, "")
    assert finished.json["notes"]
    assert finished.json["out"] == str(tmp_path / "out")
    assert finished.json["already_done"] is False
    report = json.loads((tmp_path / "out" / "streamcomp_report.json").read_text("utf-8"))
    del report["checksum"]
    assert {k: v for k, v in finished.json.items() if k not in ("out", "already_done")} == report


def test_several_ratios_give_a_folder_each(model: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    finished = job(model, out, text, "--ratio", "0.2,0.4", "--json")

    assert (finished.code, finished.err) == (0, "")
    found = finished.json
    assert found["out"] == str(out / "ratio-0.2") and found["asked"] == 0.2
    (other,) = found["others"]
    assert other["out"] == str(out / "ratio-0.4") and other["asked"] == 0.4
    for made in (found, other):
        report = json.loads((Path(made["out"]) / "streamcomp_report.json").read_text("utf-8"))
        assert made["model"] == report["model"]
        assert report["model"]["ratio"] >= made["asked"]
    again = job(model, out, text, "--ratio", "0.2,0.4")
    assert again.code == 0 and "already done" in again.out
    assert again.out.count("linear parameters") == 2
    status = run_cli("status", out)
    assert status.code == 0 and "finished" in status.out
    refused = job(model, out, text, "--ratio", "0.2,0.5")
    assert refused.code == 7 and "ratio was [0.2, 0.4], now [0.2, 0.5]" in refused.err
    assert "Traceback" not in refused.err


def test_plan_shows_the_sweeps(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")

    made = run_cli("plan", model, *LITTLE, "--ratio", "0.2,0.4", "--json").json
    shown = run_cli("plan", model, *LITTLE, "--ratio", "0.2,0.4")

    assert [step["name"] for step in made["steps"]] == [
        *STEPS[:8],
        *(f"ratio {ratio}: {step}" for ratio in (0.2, 0.4) for step in STEPS[8:]),
    ]
    assert [output["asked"] for output in made["outputs"]] == [0.2, 0.4]
    for row in ("forward 0 to 1", "gradient of the loss", "reverse 1 to 0", "ranks"):
        assert row in shown.out
    for ratio in (0.2, 0.4):
        assert f"ratio {ratio}: block 0 to 1" in shown.out


def test_every_other_command_prints_one_json_document_and_nothing_else(
    model: Path, done: Path, text: Path, tmp_path: Path
) -> None:
    commands: list[tuple[tuple[object, ...], str]] = [
        (("plan", model, *LITTLE), "minimum_bytes"),
        (("status", done), "finished"),
        (("eval", done, "--text", text, "--seq-len", 16, "--windows", 4), "perplexity"),
        (("export", done, tmp_path / "dense"), "form"),
        (("inspect", done), "families"),
        (("verify", done), "checked"),
    ]
    assert {arguments[0] for arguments, _ in commands} == {*GROUP.commands} - {"compress"}
    for arguments, key in commands:
        finished = run_cli(*arguments, "--json")
        assert (finished.code, finished.err) == (0, ""), arguments
        assert key in finished.json, arguments


def test_an_error_in_json_leaves_stdout_empty(model: Path, tmp_path: Path) -> None:
    refused = run_cli("plan", model, *LITTLE, "--max-ram", "1M", "--json")

    assert refused.code == 5 and refused.out == ""
    assert refused.err.startswith("error: ") and len(refused.err.splitlines()) == 1


# -- settings from a file -------------------------------------------------------------------


def write_toml(path: Path, **settings: object) -> Path:
    path.write_text("".join(f"{k} = {json.dumps(v)}\n" for k, v in settings.items()), "utf-8")
    return path


def test_settings_are_read_from_a_file_and_those_of_the_command_line_go_first(
    model: Path, tmp_path: Path
) -> None:
    recipe = write_toml(
        tmp_path / "recipe.toml", ratio=0.5, form="uv", **{"seq-len": 32}, samples=4, batch=2
    )

    made = run_cli("plan", model, "--config", recipe, "--json").json
    assert made["ratio"] == pytest.approx(0.5, abs=0.02)
    assert (made["windows"], made["seq_len"], made["batch"]) == (4, 32, 2)

    made = run_cli("plan", model, "--config", recipe, "--samples", 6, "--ratio", 0.3, "--json").json
    assert made["ratio"] == pytest.approx(0.3, abs=0.02)
    assert (made["windows"], made["seq_len"], made["batch"]) == (6, 32, 2)


def test_a_job_follows_its_file(model: Path, text: Path, tmp_path: Path) -> None:
    recipe = write_toml(tmp_path / "recipe.toml", calibration=[str(text)], form="uv", **SMALL)

    finished = run_cli(
        "compress", model, tmp_path / "out", "--config", recipe, "--json", "--threads", 1
    )

    settings = finished.json["recipe"]
    assert settings["form"] == "uv" and settings["samples"] == SMALL["samples"]
    assert settings["calibration"] == [str(text)]


def test_a_setting_of_a_file_that_nobody_knows_is_refused(model: Path, tmp_path: Path) -> None:
    recipe = write_toml(tmp_path / "recipe.toml", ratios=0.5)

    refused = run_cli("plan", model, "--config", recipe)

    assert refused.code == 2 and refused.out == ""
    assert f"{recipe}: unknown setting 'ratios'; known: ratio, " in refused.err


# -- the way of a job -----------------------------------------------------------------------


def test_status_follows_a_job(model: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    nothing = run_cli("status", out)
    assert nothing.code == 6 and "holds no job" in nothing.err

    with stop_after(8), pytest.raises(Interrupted):
        job(model, out, text)
    found = run_cli("status", out, "--json").json
    assert found["finished"] is False
    assert (found["steps_done"], found["steps_total"], found["last_step"]) == (9, 11, "block 0")
    assert found["recipe"]["samples"] == SMALL["samples"]
    assert found["peak_bytes"] > 0 and found["seconds"] > 0 and found["seconds_left"] > 0
    table = run_cli("status", out)
    assert table.code == 0
    assert "unfinished" in table.out and "9 of 11, last block 0" in table.out

    goes_on = job(model, out, text)
    assert goes_on.code == 0
    assert goes_on.err.startswith(f"{out}: 11 steps, continued after step 9\n[10/11] block 1")
    found = run_cli("status", out, "--json").json
    assert found["finished"] is True
    assert (found["steps_done"], found["steps_total"], found["seconds_left"]) == (11, 11, 0)
    table = run_cli("status", out)
    assert "finished" in table.out and "unfinished" not in table.out


def test_status_finds_the_work_in_another_folder(model: Path, text: Path, tmp_path: Path) -> None:
    out, work = tmp_path / "out", tmp_path / "work"
    with stop_after(1), pytest.raises(Interrupted):
        job(model, out, text, "--work-dir", work)

    lost = run_cli("status", out)
    assert lost.code == 6 and "--work-dir" in lost.err
    assert run_cli("status", out, "--work-dir", work, "--json").json["steps_done"] == 2


def test_a_finished_job_is_not_done_again(model: Path, text: Path, done: Path) -> None:
    before = tree(done)

    again = job(model, done, text)
    assert (again.code, again.err) == (0, "")
    assert again.out.startswith(f"{done} is already done; to compress anew, remove it or give")
    assert "linear parameters" in again.out
    assert job(model, done, text, "--json").json["already_done"] is True
    assert tree(done) == before


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, click.Abort])
def test_an_interrupted_job_says_that_it_goes_on(
    model: Path, text: Path, tmp_path: Path, interruption: type[BaseException]
) -> None:
    with (
        stop_after(2),
        mock.patch("tests.jobs.Interrupted", side_effect=interruption),
    ):
        stopped = job(model, tmp_path, text)

    assert stopped.code == 130
    told = "interrupted: the finished steps are kept, the same command goes on"
    assert stopped.err.strip() == told  # click ends the line of ^C
    assert stopped.out == ""
    assert run_cli("status", tmp_path, "--json").json["steps_done"] == 3


class SignalAt(SilentProgress):
    """Sends this process a signal as soon as a step is durable."""

    def __init__(self, number: signal.Signals) -> None:
        self.number = number

    def finish_step(self, step: int, name: str, seconds: float, detail: str) -> None:
        if step == 1:
            os.kill(os.getpid(), self.number)


def signalled(model: Path, text: Path, out: Path, name: str, ignored: bool) -> list[Any]:
    number = signal.Signals[name]
    signal.signal(number, signal.SIG_IGN if ignored else signal.SIG_DFL)
    progress = mock.patch(
        "streamcomp.job.progress.console_progress", side_effect=lambda quiet: SignalAt(number)
    )
    with progress:
        done = job(model, out, text)
    return [done.code, done.err.strip()]


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_signal_to_end_is_answered_in_a_line(
    model: Path, text: Path, tmp_path: Path, name: str, code: int
) -> None:
    by = "" if name == "SIGINT" else f" by {name}"

    stopped = in_a_fork(signalled, model, text, tmp_path, name, False)

    told = f"interrupted{by}: the finished steps are kept, the same command goes on"
    assert stopped == [code, told]
    assert run_cli("status", tmp_path, "--json").json["steps_done"] == 2


def test_a_job_that_shall_outlive_its_terminal_does(
    model: Path, text: Path, tmp_path: Path
) -> None:
    assert in_a_fork(signalled, model, text, tmp_path, "SIGHUP", True) == [0, ""]


def test_a_job_whose_words_cannot_be_written_is_done_all_the_same(
    model: Path, text: Path, done: Path, tmp_path: Path
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "streamcomp", "compress", model, tmp_path, *LITTLE]
    command += ["--max-ram", "4G", "--calibration", text]
    with Path("/dev/full").open("w") as full:
        ended = subprocess.run(list(map(str, command)), stdout=full, stderr=writer, check=False)
    os.close(writer)

    assert ended.returncode == 0
    made, expected = stored_tensors(tmp_path), stored_tensors(done)
    assert made.keys() == expected.keys()
    assert all(torch.equal(made[name], expected[name]) for name in made)


# -- tables ---------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", ["60", "200"])
def test_tables_fit_into_a_narrow_terminal(
    model: Path, done: Path, monkeypatch: pytest.MonkeyPatch, columns: str
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    for arguments, known in [
        (("inspect", model), "q_proj"),
        (("inspect", done), "down_proj"),
        (("plan", model, *LITTLE), "block"),
        (("status", done), "finished"),
    ]:
        shown = run_cli(*arguments)
        assert shown.code == 0 and known in shown.out
        rows = [line for line in shown.out.splitlines() if line[:1] in "┏┃┡│└┌├"]
        assert rows and max(map(len, rows)) <= int(columns)


def test_plan_shows_what_its_json_holds(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")

    settings = ("--batch", 2, "--ratio", 0.5, "--form", "uv", "--include", "q_proj")
    shown = run_cli("plan", model, *LITTLE, *settings)

    assert "block 0 to 1" in shown.out  # alike, hence one row
    assert "2 windows of 16 tokens at a time" in shown.out
    assert "2 eligible, ratio 0.5000" in shown.out  # rank 8 of 32 x 32
    assert re.search(r"\d+\.\d% of the model's parameters: the ratio takes", shown.out)
    assert "(--max-ram " in shown.out


def test_inspect_lists_the_families_of_a_model(
    model: Path, done: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    dense, factored = run_cli("inspect", model), run_cli("inspect", done)

    for leaf, shape in [("q_proj", "32 x 32"), ("k_proj", "16 x 32"), ("down_proj", "32 x 48")]:
        for shown, form in ((dense, "dense"), (factored, "pivot")):
            row = next(line for line in shown.out.splitlines() if f"{leaf} " in line)
            assert shape in row and form in row


# -- export ---------------------------------------------------------------------------------


def test_an_exported_model_is_the_product_of_the_factors(done: Path, tmp_path: Path) -> None:
    dense = tmp_path / "dense"

    exported = run_cli("export", done, dense, "--quiet")

    assert (exported.code, exported.err) == (0, "")
    assert exported.out == f"{dense} holds {done} in form dense\n"
    assert "quantization_config" not in config_of(dense)
    tensors = stored_tensors(dense)
    for name, wanted in products(done).items():
        torch.testing.assert_close(tensors[f"{name}.weight"].double(), wanted, rtol=1e-5, atol=1e-6)


def test_an_exported_pair_of_factors_has_the_same_product(done: Path, tmp_path: Path) -> None:
    pair = tmp_path / "uv"

    assert run_cli("export", done, pair, "--form", "uv").code == 0

    found, wanted = products(pair), products(done)
    assert found.keys() == wanted.keys()
    for name, product in found.items():
        torch.testing.assert_close(product, wanted[name], rtol=1e-4, atol=1e-5)


def test_an_export_touches_no_folder_in_use(done: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")

    refused = run_cli("export", done, tmp_path)

    assert refused.code == 6 and "is not an empty folder" in refused.err
    assert (tmp_path / "mine.txt").read_text() == "mine"
