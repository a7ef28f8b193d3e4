"""Jobs that fetch the shards of a hub model as they go, on a disk smaller than the model."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import streamcomp
from streamcomp import CompressResult, Resources
from streamcomp.checkpoint.index import read_index
from streamcomp.errors import JobMismatchError, OutputError, RecipeError, SourceError
from streamcomp.job.fetching import allow_shards
from streamcomp.model.skeleton import Skeleton
from tests.fake_hub import NAME, FakeHub, fake_hub
from tests.jobs import (
    BUDGET,
    Interrupt,
    Interrupted,
    Notes,
    compress,
    quick_plan,
    run_cli,
    small_recipe,
    tree,
)
from tests.pico import save_pico

TOLD = ("streamcomp_report.json", "streamcomp_report.html", "README.md")  # of times
STREAMED = Resources(BUDGET, threads=1, stream_download=True)
CACHED = Resources(BUDGET, threads=1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pico(tmp_path_factory.mktemp("model"), shard_size="30KB", blocks=4)


@pytest.fixture(scope="module")
def newer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pico(tmp_path_factory.mktemp("newer"), shard_size="30KB", blocks=4, seed=1)


@pytest.fixture
def hub(tmp_path: Path, model: Path) -> Iterator[FakeHub]:
    with fake_hub(tmp_path / "cache") as hub:
        hub.add(model)
        yield hub


@pytest.fixture(scope="module")
def expected(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a job on the folder of the model writes."""
    out = tmp_path_factory.mktemp("expected") / "out"
    compress(model, out, text)
    return files(out)


def files(out: Path) -> dict[str, bytes]:
    return {name: data for name, data in tree(out).items() if name not in TOLD}


def run(
    out: Path, text: Path, resources: Resources = STREAMED, progress: Any = None, **settings: Any
) -> CompressResult:
    with quick_plan():
        return streamcomp.compress(
            NAME, out, small_recipe(text, **settings), resources, progress=progress
        )


def test_the_result_is_that_of_a_local_folder_and_the_disk_is_never_fuller(
    hub: FakeHub, model: Path, text: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    out, sizes = tmp_path / "out", {p.name: p.stat().st_size for p in model.glob("*.safetensors")}
    with quick_plan():
        planned = streamcomp.plan(NAME, small_recipe(text), STREAMED)
    most = planned.shard_bytes
    assert hub.shards() == [] and most < sum(sizes.values()) / 2
    seen = []

    def look(name: str) -> None:
        held = list((out / ".streamcomp").rglob("model-*.safetensors"))
        seen.append(sizes.get(name, 0) + sum(path.stat().st_size for path in held))

    hub.before = look
    notes = Notes()

    report = run(out, text, progress=notes).report

    assert files(out) == expected
    assert max(seen) <= most
    assert not list(hub.cache.rglob("*.safetensors"))
    record = {"model": NAME, "revision": "main", "commit": hub.branch}
    assert report["fingerprint"]["hub"] == record
    told = [note.split()[1] for note in notes.texts if note.startswith("fetching ")]
    assert told == hub.shards()
    counted = [name for step in report["steps"] for name in step.get("fetched", {})]
    assert set(counted) == set(sizes)
    of_blocks = [
        sum(step.get("fetched", {}).values())
        for step in report["steps"]
        if step["step"].split()[0] in ("forward", "reverse", "block")
    ]
    assert planned.fetched_bytes == pytest.approx(sum(of_blocks), rel=0.3)


@pytest.mark.parametrize("after", [3, 12])
def test_a_job_goes_on_with_its_commit_after_the_branch_has_moved(
    after: int, hub: FakeHub, newer: Path, text: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(Interrupted):
        run(out, text, progress=Interrupt(after))
    hub.add(newer)

    result = run(out, text)

    assert not result.already_done and files(out) == expected
    assert run(out, text).already_done


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_job_killed_while_it_fetches_goes_on(
    hub: FakeHub, text: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    child = 0

    def kill(name: str) -> None:
        if len(hub.shards()) == 9:
            os.kill(child, signal.SIGKILL)

    hub.before = kill
    child = os.fork()
    if child == 0:
        run(out, text)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    hub.before = lambda name: None
    notes = Notes()

    run(out, text, progress=notes)

    assert notes.done > 0 and files(out) == expected


def test_a_network_that_fails_loses_nothing(
    hub: FakeHub, model: Path, text: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    out, shard = tmp_path / "out", read_index(model).tensors["model.layers.2.mlp.up_proj.weight"]
    hub.broken = {shard.shard.name}
    with pytest.raises(SourceError, match="the same command goes on"):
        run(out, text)
    hub.broken = set()
    notes = Notes()

    run(out, text, progress=notes)

    assert notes.done > 1 and files(out) == expected


@pytest.mark.parametrize("resources", [(STREAMED, CACHED), (CACHED, STREAMED)])
def test_a_job_may_go_on_with_or_without_the_option(
    resources: tuple[Resources, Resources],
    hub: FakeHub,
    newer: Path,
    text: Path,
    expected: dict[str, bytes],
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    with pytest.raises(Interrupted):
        run(out, text, resources[0], Interrupt(3))
    hub.add(newer)
    notes = Notes()

    run(out, text, resources[1], notes)

    assert notes.done == 4 and files(out) == expected


def test_another_commit_is_another_job(
    hub: FakeHub, newer: Path, text: Path, tmp_path: Path
) -> None:
    first = hub.branch
    with pytest.raises(Interrupted):
        run(tmp_path / "out", text, progress=Interrupt(3))
    hub.add(newer)

    with pytest.raises(JobMismatchError) as raised, quick_plan():
        streamcomp.compress(
            NAME, tmp_path / "out", small_recipe(text), STREAMED, revision=hub.branch
        )

    assert raised.value.field == "source" and first != hub.branch


def test_kept_work_keeps_no_shards(hub: FakeHub, text: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    resources = Resources(BUDGET, threads=1, stream_download=True, work_dir=work, keep_work=True)

    run(tmp_path / "out", text, resources)

    assert (work / "journal.jsonl").exists() and not list(work.rglob("model-*"))


# -- the disk ----------------------------------------------------------------------------


def test_a_disk_too_small_is_refused_before_any_work(
    hub: FakeHub, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with quick_plan():
        planned = streamcomp.plan(NAME, small_recipe(text), STREAMED)
        without = streamcomp.plan(NAME, small_recipe(text), CACHED)
    assert planned.disk_bytes == without.disk_bytes + planned.shard_bytes
    assert planned.work_bytes == without.work_bytes + planned.shard_bytes
    assert without.to_dict()["shard_bytes"] == 0
    free = planned.disk_bytes - 1
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))

    with pytest.raises(OutputError, match="give another OUT"):
        run(tmp_path / "out", text)

    assert hub.shards() == [] and not (tmp_path / "out").exists()


def test_shards_that_are_there_count_as_room(
    hub: FakeHub, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with pytest.raises(Interrupted):
        run(out, text, progress=Interrupt(3))
    there = sum(path.stat().st_size for path in out.rglob("model-*.safetensors"))
    with quick_plan():
        needed = streamcomp.plan(NAME, small_recipe(text), STREAMED).disk_bytes
    assert there
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=needed - there))

    run(out, text)


def test_two_neighbouring_blocks_have_room(model: Path, hub: FakeHub) -> None:
    skeleton = Skeleton(read_index(model))
    sizes = {path: path.stat().st_size for path in skeleton.index.shards}

    def of(*blocks: int) -> int:
        return sum(
            sizes[path]
            for path in {i.shard for block in blocks for i in skeleton.block_tensors(block)}
        )

    assert allow_shards(skeleton, STREAMED) == max(of(0, 1), of(1, 2), of(2, 3))
    assert allow_shards(skeleton, CACHED) == 0
    all_of_them = Resources(stream_download=True, max_shards="1G")
    assert allow_shards(skeleton, all_of_them) == sum(sizes.values())
    least = max(of(0), of(1), of(2), of(3), *sizes.values())
    assert allow_shards(skeleton, Resources(stream_download=True, max_shards=str(least))) == least
    with pytest.raises(RecipeError, match="a block needs .* --max-shards 1M fits"):
        allow_shards(skeleton, Resources(stream_download=True, max_shards=str(least - 1)))


@pytest.mark.parametrize("command", ["plan", "compress", "eval"])
def test_a_folder_is_not_fetched(command: str, model: Path, tmp_path: Path) -> None:
    arguments = [command, model, *[tmp_path / "out"] * (command == "compress")]

    told = run_cli(*arguments, "--stream-download")

    assert told.code == 2
    assert told.err == f"error: stream_download is for a model on the hub, {model} is a folder\n"


# -- commands ----------------------------------------------------------------------------


def test_a_job_says_what_it_fetches(
    hub: FakeHub, text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = ("--samples", 8, "--seq-len", 16, "--calibration", text, "--stream-download")

    planned = run_cli("plan", NAME, *settings)
    told = run_cli("compress", NAME, tmp_path / "out", *settings)
    hub.fetched.clear()
    as_json = run_cli("compress", NAME, tmp_path / "json", *settings, "--json")

    assert "KiB on disk at a time" in planned.out and "fetched" in told.out
    assert planned.code == told.code == 0
    assert "note: fetching model-00001-of-00007.safetensors (33.1 KiB)" in told.err
    steps = json.loads(as_json.out)["steps"]
    assert as_json.err == ""
    counted = [name for step in steps for name in step.get("fetched", {})]
    assert set(counted) == set(hub.shards())


def test_an_evaluation_fetches_as_it_goes(
    hub: FakeHub, model: Path, text: Path, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"text": str(text), "seq_len": 16, "windows": 4}
    resources = Resources(BUDGET, threads=1, stream_download=True, work_dir=tmp_path / "streams")

    with quick_plan():
        one = streamcomp.evaluate(NAME, **settings, resources=resources)
        other = streamcomp.evaluate(model, **settings, resources=CACHED)

    assert one.nll == other.nll
    assert set(hub.shards()) == {path.name for path in model.glob("*.safetensors")}
    assert list((tmp_path / "streams").iterdir()) == []
    assert not list(hub.cache.rglob("*.safetensors"))
