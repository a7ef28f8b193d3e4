"""What is predicted is enough: for each step, for the least budget, for the disk."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

import streamcomp
from streamcomp import BudgetError, Recipe, RecipeError, Resources
from streamcomp.calibration.hidden_states import StreamShape
from streamcomp.checkpoint.index import read_index
from streamcomp.forms import find_form
from streamcomp.job.block_plan import plan_blocks
from streamcomp.job.levers import Levers
from streamcomp.job.plan import Plan, make_evaluation_plan, make_plan
from streamcomp.job.planner import Conditions
from streamcomp.job.progress import SilentProgress
from streamcomp.job.steps.follow import refining
from streamcomp.job.steps.write_block import WriteBlock
from streamcomp.machine.device import CONTEXT_BYTES, WORKSPACE_BYTES
from streamcomp.machine.session import probed
from streamcomp.model.skeleton import Skeleton
from tests.jobs import (
    BUDGET,
    RATES,
    REPOSITORY,
    RESOURCES,
    SMALL,
    FakeProbe,
    compress,
    run_python,
    stored_tensors,
    varied_text,
)
from tests.pico import BOS, EOS, LONGEST, VOCABULARY, make_tokenizer

MiB = 2**20
PLENTY = 2**40
BASELINE = 300 * MiB  # of a process that is not this one, which runs other tests too

FORKS = 16 * MiB  # by which the baselines of two forks may differ

# Enough tokens (2048) for the widest input of the mid-size model, 1408 channels.
SETTINGS: dict[str, Any] = {"samples": 16, "seq_len": LONGEST}
FORMS = ("pivot", "uv")
MODELS = ("pico", "mid-size")
# Every method, stream and sweep.
JOBS_OF: dict[str, dict[str, Any]] = {
    "two-sided": {},
    "two-sided uv": {"form": "uv", "allocation": "uniform"},
    "two-sided, every second": {"store_every": 2},
    "two-sided, updated and refined": {"update": True, "anchor": 0.5, "refine": 4},
    "two-sided, two ratios": {"ratio": [0.2, 0.4]},
    "svd-llm": {"method": "svd-llm"},
    "svd-llm compressed": {"method": "svd-llm", "statistics": "compressed"},
    "svd-llm, no text": {"method": "svd-llm", "statistics": "none"},
    "svd-llm, updated": {"method": "svd-llm", "update": True},
    "svd-llm, refined": {"method": "svd-llm", "refine": 4},
    "svd-llm, two ratios": {"method": "svd-llm", "ratio": [0.2, 0.4], "form": "uv"},
    "rom": {"method": "rom"},
    "swsc": {"method": "swsc", "ratio": 0.3, "clusters": 4, "axis": "rows"},
    "swsc, no text": {"method": "swsc", "ratio": 0.3, "statistics": "none"},
}
MEASURED = JOBS_OF | {
    "two-sided, in passes": {"groups": 1},
    "svd-llm, in passes": {"method": "svd-llm", "groups": 2},
    "two-sided, in chunks": {"seq_len": 128, "feed_forward_tokens": 16},
    "svd-llm, in chunks": {"method": "svd-llm", "seq_len": 128, "feed_forward_tokens": 16},
}
KINDS = [("pico", "two-sided"), *(("mid-size", kind) for kind in MEASURED)]

# Models of which something else than a block's weights is large: config, dtype and settings.
_TINY: dict[str, Any] = {
    "intermediate_size": 64,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "max_position_embeddings": 4096,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}
_GEMMA = _TINY | {"head_dim": 32, "sliding_window": 512, "num_hidden_layers": 2}
LARGE_PARTS: dict[str, tuple[Any, torch.dtype, dict[str, Any]]] = {
    "masks": (
        transformers.Gemma2Config(**_GEMMA, vocab_size=VOCABULARY, hidden_size=64),
        torch.float32,
        {"samples": 2, "seq_len": 4096},
    ),
    "capped logits": (
        transformers.Gemma2Config(**_GEMMA, vocab_size=200_000, hidden_size=64),
        torch.float32,
        {"samples": 2, "seq_len": 400},
    ),
    "a cast head": (
        transformers.LlamaConfig(**_TINY, vocab_size=200_000, hidden_size=512, num_hidden_layers=1),
        torch.float16,
        {"samples": 2, "seq_len": 4},
    ),
    "positions": (
        transformers.LlamaConfig(
            **_TINY, vocab_size=VOCABULARY, hidden_size=64, head_dim=512, num_hidden_layers=12
        ),
        torch.float16,
        {"samples": 1, "seq_len": 4096},
    ),
}

# Runs each job of a list in a fork of its own, so that none finds memory that another one left
# behind, and prints the list of what came of them. Levers among the settings are set to that.
JOBS = """
import json, sys
from dataclasses import replace
from pathlib import Path
import contextlib
import streamcomp.api
from streamcomp import BudgetError
from tests.forks import in_a_fork
from tests.jobs import compress, set_levers

def high_water():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

def run(model, out, text, max_ram, **settings):
    if isinstance(settings.get("ratio"), list):
        settings["ratio"] = tuple(settings["ratio"])
    if "work_dir" in settings:
        settings["work_dir"] = Path(settings["work_dir"])
    levers = ("feed_forward_tokens", "groups")
    fewer = {lever: settings.pop(lever) for lever in levers if lever in settings}
    if "groups" in fewer:
        fewer["linears"] = fewer["groups"]
    try:
        with set_levers(**fewer) if fewer else contextlib.nullcontext():
            report = compress(Path(model), Path(out), text, max_ram=max_ram, **settings).report
    except BudgetError as error:
        return {"minimum": error.minimum_bytes, "message": str(error)}
    return {"report": report, "high_water": high_water()}

found = []
for job in json.loads(sys.argv[1]):
    if job["max_ram"] == "least":
        job["max_ram"] = str(found[-1]["minimum"] + int(sys.argv[2]))
    found.append(in_a_fork(run, **job))
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return varied_text(tmp_path_factory.mktemp("text") / "text.txt", 20_000)


@pytest.fixture(scope="module")
def models(pico: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The pico llama, and one whose blocks weigh more than what a process varies by."""
    folder = tmp_path_factory.mktemp("mid-size")
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=512,
        intermediate_size=1408,
        num_attention_heads=8,
        num_key_value_heads=4,
        num_hidden_layers=2,
        max_position_embeddings=LONGEST,
        bos_token_id=BOS,
        eos_token_id=EOS,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return {"pico": pico("llama"), "mid-size": folder}


@pytest.fixture(scope="module")
def finished(
    models: dict[str, Path], text: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, ...], dict[str, Any]]:
    """Jobs with plenty of memory, by model and kind; and those of each model with nearly none,
    "refused", and with the least that this one named, "least"."""
    folder = tmp_path_factory.mktemp("jobs")

    def job(model: str, max_ram: str, **settings: Any) -> dict[str, Any]:
        name = f"{model} {len(settings)} {max_ram} {settings}".replace("/", "")[:200]
        files = {"model": str(models[model]), "out": str(folder / name), "text": str(text)}
        return {**files, "max_ram": max_ram, **SETTINGS, **settings}

    jobs: dict[tuple[str, ...], dict[str, Any]] = {
        (model, kind): job(model, BUDGET, **MEASURED[kind]) for model, kind in KINDS
    }
    for model in MODELS:
        jobs[model, "refused"] = job(model, "1M")
        jobs[model, "least"] = job(model, "least")
        jobs[model, "svd-llm refused"] = job(model, "1M", method="svd-llm")
        jobs[model, "svd-llm least"] = job(model, "least", method="svd-llm")
    return dict(zip(jobs, run_jobs(list(jobs.values())), strict=True))


def run_jobs(jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    done = run_python("-c", JOBS, json.dumps(jobs), FORKS, cwd=REPOSITORY)
    assert done.code == 0, done.err
    found: list[dict[str, Any]] = done.json
    return found


def planned(
    folder: Path,
    budget: int = PLENTY,
    *,
    kernel_bytes: int = 0,
    memory_backed: bool = False,
    output_in_memory: bool = False,
    keep_work: bool = False,
    device_budget: int = 0,
    levers: Levers | None = None,
    **settings: Any,
) -> Plan:
    """The plan of a process of ``BASELINE`` bytes, of method svd-llm unless another is given."""
    settings = {**SETTINGS, "method": "svd-llm", **settings}
    if isinstance(settings.get("ratio"), list):
        settings["ratio"] = tuple(settings["ratio"])
    conditions = Conditions(
        budget_bytes=budget,
        rates=RATES,
        device_budget=device_budget,
        kernel_bytes=kernel_bytes,
        work_in_memory=memory_backed,
        outputs_in_memory=output_in_memory,
        keeps_work=keep_work,
        keeps_analysis=keep_work,
    )
    with probed(FakeProbe(baseline=BASELINE)):
        skeleton = Skeleton(read_index(folder))
        return make_plan(skeleton, Recipe(**settings), conditions, levers=levers)


def planned_evaluation(
    folder: Path, budget: int = PLENTY, *, kernel_bytes: int = 0, device_budget: int = 0
) -> Plan:
    """The plan of an evaluation on 64 windows, in a process of ``BASELINE`` bytes."""
    skeleton = Skeleton(read_index(folder))
    shape = StreamShape(64, LONGEST, skeleton.hidden_size, skeleton.dtype)
    with probed(FakeProbe(baseline=BASELINE)):
        return make_evaluation_plan(
            skeleton, shape, Conditions(budget, RATES, device_budget, kernel_bytes)
        )


# -- memory ---------------------------------------------------------------------------------


TWO_SIDED = ["tokenize", "embed", "forward 0", "forward 1", "gradient of the loss"]
TWO_SIDED += ["reverse 1", "reverse 0", "ranks", "block 0", "block 1", "copy the rest"]


@pytest.mark.parametrize(("model", "kind"), KINDS)
def test_no_step_takes_more_than_was_predicted(
    finished: dict[tuple[str, ...], dict[str, Any]], model: str, kind: str
) -> None:
    steps = finished[model, kind]["report"]["steps"]

    names = [step["step"] for step in steps]
    if kind.startswith("two-sided") and "ratios" not in kind:
        assert names == TWO_SIDED
    else:
        assert names[-1].endswith("copy the rest")
    over = [step for step in steps if not 0 < step["peak_bytes"] <= step["predicted_bytes"]]
    assert not over


@pytest.mark.parametrize("kind", ["two-sided", "svd-llm", "two-sided, in passes"])
def test_kept_moments_are_decomposed_in_what_was_predicted(
    kind: str, models: dict[str, Path], text: Path, tmp_path: Path
) -> None:
    settings = {"max_ram": BUDGET, **SETTINGS, **MEASURED[kind], "work_dir": str(tmp_path / "work")}
    files = {"model": str(models["mid-size"]), "text": str(text), **settings}
    first = {**files, "out": str(tmp_path / "first"), "keep_work": True}

    _, done = run_jobs([first, {**files, "out": str(tmp_path / "second"), "damping": 0.1}])

    steps = {step["step"]: step for step in done["report"]["steps"]}
    for name in ("decompose 0", "decompose 1"):
        peak, predicted = steps[name]["peak_bytes"], steps[name]["predicted_bytes"]
        assert peak <= predicted < peak + 200 * MiB


@pytest.mark.parametrize("kind", LARGE_PARTS)
def test_what_is_no_block_s_weight_is_predicted_too(kind: str, text: Path, tmp_path: Path) -> None:
    """Masks of eager attention, capped logits, a head that is cast, positions of many blocks."""
    config, dtype, settings = LARGE_PARTS[kind]
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    files = {"model": str(tmp_path / "model"), "out": str(tmp_path / "out"), "text": str(text)}

    (done,) = run_jobs([{**files, "max_ram": BUDGET, "method": "two-sided", **settings}])

    steps = done["report"]["steps"]
    assert not [step["step"] for step in steps if step["peak_bytes"] > step["predicted_bytes"]]


def test_what_is_predicted_for_a_block_is_not_far_from_what_it_takes(
    finished: dict[tuple[str, ...], dict[str, Any]],
) -> None:
    """Else a budget that would do is refused."""
    for kind in MEASURED:
        for step in finished["mid-size", kind]["report"]["steps"][2:-1]:
            assert step["predicted_bytes"] < step["peak_bytes"] + 200 * MiB, (kind, step["step"])


@pytest.mark.parametrize(("dtype", "times"), [("float16", 3), ("bfloat16", 1), ("float32", 1)])
def test_refining_counts_a_block_that_is_cast_beside_what_was_read(
    dtype: str, times: int, pico: Callable[..., Path]
) -> None:
    """fp16 is trained in fp32: 2 bytes a weight as it is read, and 4 as it runs."""
    made = planned(pico("llama", dtype=getattr(torch, dtype)), refine=4)

    block = made.outline.blocks[0]
    ranks = dict.fromkeys(block.sites.linears, 1)
    for phase in refining(made.outline, block, ranks, ranks, 0):
        assert phase.parts["weights"] == times * block.weight_bytes


@pytest.mark.parametrize("method", ["", "svd-llm "])
@pytest.mark.parametrize("model", MODELS)
def test_a_job_finishes_within_the_least_budget_it_was_told(
    finished: dict[tuple[str, ...], dict[str, Any]], model: str, method: str
) -> None:
    refused, least = finished[model, f"{method}refused"], finished[model, f"{method}least"]

    assert f"--max-ram {refused['minimum'] // MiB}M fits" in refused["message"]
    memory = least["report"]["memory"]
    assert memory["budget_bytes"] == refused["minimum"] + FORKS
    assert memory["peak_bytes"] <= memory["budget_bytes"]
    # Since the last step began, publication included.
    assert 0 < least["high_water"] <= memory["budget_bytes"]


@pytest.mark.parametrize("model", MODELS)
def test_the_least_budget_fits_and_what_is_below_the_least_peak_does_not(
    models: dict[str, Path], model: str
) -> None:
    peak = planned(models[model], levers=Levers(1, 1, 1, 1, 1, 1)).peak_bytes
    minimum = planned(models[model]).minimum_bytes

    assert minimum % MiB == 0
    assert peak <= minimum < peak + 6 * MiB
    assert planned(models[model], minimum).peak_bytes <= minimum
    assert planned(models[model], peak).peak_bytes == peak
    with pytest.raises(BudgetError) as caught:
        planned(models[model], peak - 1)
    assert caught.value.minimum_bytes == minimum
    assert caught.value.budget_bytes == peak - 1


def test_a_plan_names_the_same_least_budget_whatever_it_is_given(models: dict[str, Path]) -> None:
    least = planned(models["mid-size"]).minimum_bytes

    assert planned(models["mid-size"], least + 100 * MiB).minimum_bytes == least
    with pytest.raises(BudgetError) as caught:
        planned(models["mid-size"], 1)
    assert caught.value.minimum_bytes == least


def test_the_micro_batch_is_halved_until_the_budget_is_kept(models: dict[str, Path]) -> None:
    many: dict[str, Any] = {"samples": 64}
    peaks = {
        batch: planned(models["mid-size"], batch=batch, **many).peak_bytes
        for batch in (64, 32, 16, 8)
    }
    assert len(set(peaks.values())) == len(peaks)

    for batch, peak in peaks.items():
        made = planned(models["mid-size"], peak, **many)
        assert (made.levers.batch, made.peak_bytes) == (batch, peak)
    assert planned(models["mid-size"], peaks[64] - 1, **many).levers.batch == 32


def test_a_micro_batch_is_no_larger_than_is_useful(models: dict[str, Path]) -> None:
    assert planned(models["pico"], samples=512).levers.batch == 64  # 8192 tokens
    assert planned(models["pico"], samples=6).levers.batch == 4


def test_each_sweep_has_a_lever_of_its_own(models: dict[str, Path]) -> None:
    def peaks(made: Plan) -> dict[str, int]:
        return {step.name.partition(" ")[0]: step.peak_bytes for step in made.steps}

    many: dict[str, Any] = {"samples": 64, "method": "two-sided"}
    ample = planned(models["mid-size"], **many)
    assert (ample.levers.batch, ample.levers.reverse_batch) == (64, 64)
    assert peaks(ample)["reverse"] > peaks(ample)["forward"]

    tight = planned(models["mid-size"], peaks(ample)["reverse"] - 1, **many)

    assert (tight.levers.batch, tight.levers.reverse_batch) == (64, 32)
    assert tight.levers.head_tokens == ample.levers.head_tokens == LONGEST
    assert peaks(tight)["reverse"] < peaks(ample)["reverse"]
    assert peaks(tight)["forward"] == peaks(ample)["forward"]


@pytest.mark.parametrize("method", ["svd-llm", "two-sided"])
def test_the_memory_of_a_gpu_pulls_the_levers_too(models: dict[str, Path], method: str) -> None:
    many: dict[str, Any] = {"samples": 64, "method": method}
    on_cpu = planned(models["mid-size"], **many)
    ample = planned(models["mid-size"], device_budget=PLENTY, **many)
    assert on_cpu.device_peak_bytes == on_cpu.device_minimum_bytes == 0
    assert ample.levers == on_cpu.levers
    for step in ample.steps:  # nothing of the process, but the driver
        on_host = step.name in ("tokenize", "ranks", "copy the rest")
        libraries = CONTEXT_BYTES + WORKSPACE_BYTES
        expected = 0 if on_host else step.peak_bytes - BASELINE + libraries
        assert step.device_bytes == expected

    least = ample.device_minimum_bytes
    tight = planned(models["mid-size"], device_budget=least, **many)

    assert tight.device_peak_bytes <= least < ample.device_peak_bytes
    assert tight.levers.batch < ample.levers.batch
    assert tight.device_minimum_bytes == least
    with pytest.raises(
        BudgetError, match=f"of the GPU while .*--max-vram {least // MiB}M fits"
    ) as no:
        planned(models["mid-size"], device_budget=least - 6 * MiB, **many)
    assert (no.value.budget_bytes, no.value.minimum_bytes) == (least - 6 * MiB, least)


@pytest.mark.parametrize(
    ("dtype", "forward", "back"),
    [("bfloat16", 0, 0), ("float16", 0, 6 * 2), ("float32", 3 * 4, 6 * 4)],
)
def test_attention_on_a_gpu_keeps_its_scores_where_no_kernel_spares_them(
    pico: Callable[..., Path], dtype: str, forward: int, back: int
) -> None:
    skeleton = Skeleton(read_index(pico("llama", dtype=getattr(torch, dtype))))
    stream = StreamShape(4, LONGEST, skeleton.hidden_size, skeleton.dtype)
    scores = skeleton.text_config.num_attention_heads * LONGEST**2

    on_cpu, on_gpu = (
        plan_blocks(skeleton, Recipe(**SETTINGS), stream, on_device=gpu) for gpu in (False, True)
    )

    for cpu, gpu in zip(on_cpu, on_gpu, strict=True):
        for mine, other in ((gpu.trace, cpu.trace), (gpu.retrace(16), cpu.retrace(16))):
            assert mine.activation_bytes - other.activation_bytes == forward * scores
            assert mine.autograd_bytes - other.autograd_bytes == back * scores
        assert (gpu.groups, gpu.trace.flops) == (cpu.groups, cpu.trace.flops)


def test_blocks_are_traced_once(models: dict[str, Path], tmp_path: Path) -> None:
    # When ranks are known, outer weights are on the device already, where no trace runs.
    text = varied_text(tmp_path / "text.txt", 4096)
    with mock.patch("streamcomp.job.plan.plan_blocks", wraps=plan_blocks) as traced:
        compress(models["pico"], tmp_path / "out", text)

    traced.assert_called_once()


def test_an_evaluation_keeps_to_the_memory_of_a_gpu_too(models: dict[str, Path]) -> None:
    model = models["mid-size"]
    ample = planned_evaluation(model, device_budget=PLENTY)
    assert ample.levers == planned_evaluation(model).levers
    with pytest.raises(BudgetError, match="needs .* of the GPU while .*--max-vram") as caught:
        planned_evaluation(model, device_budget=1)

    least = caught.value.minimum_bytes

    assert planned_evaluation(model, device_budget=least).levers.batch < ample.levers.batch
    with pytest.raises(BudgetError):
        planned_evaluation(model, device_budget=least - 6 * MiB)


def test_a_batch_that_is_asked_for_is_kept(models: dict[str, Path]) -> None:
    assert planned(models["mid-size"], samples=64, batch=3).levers.batch == 3
    least = planned(models["mid-size"], samples=64).minimum_bytes

    fixed = planned(models["mid-size"], samples=64, batch=64)

    assert fixed.minimum_bytes > least
    with pytest.raises(BudgetError) as caught:
        planned(models["mid-size"], fixed.peak_bytes - 1, samples=64, batch=64)
    assert caught.value.minimum_bytes == fixed.minimum_bytes


def test_hidden_states_in_memory_raise_every_peak_by_two_streams(models: dict[str, Path]) -> None:
    on_disk = planned(models["mid-size"])
    in_memory = planned(models["mid-size"], memory_backed=True)

    stream = 16 * LONGEST * 512 * 4  # windows x tokens x hidden size in fp32
    for before, after in zip(on_disk.steps, in_memory.steps, strict=True):
        assert after.peak_bytes - before.peak_bytes == 2 * stream + 4 * 16 * LONGEST  # and tokens


def test_an_output_in_memory_raises_every_peak_by_what_it_holds(models: dict[str, Path]) -> None:
    on_disk = planned(models["mid-size"])
    in_memory = planned(models["mid-size"], output_in_memory=True)

    for before, after in zip(on_disk.steps, in_memory.steps, strict=True):
        assert after.peak_bytes - before.peak_bytes == on_disk.disk_bytes - on_disk.work_bytes
    assert on_disk.disk_bytes - on_disk.work_bytes > on_disk.output_bytes


def test_what_products_take_on_this_machine_raises_every_peak(models: dict[str, Path]) -> None:
    without, counted = (planned(models["mid-size"], kernel_bytes=n) for n in (0, 7 * MiB))
    for before, after in zip(without.steps, counted.steps, strict=True):
        assert after.peak_bytes - before.peak_bytes == 7 * MiB

    peaks = [
        planned_evaluation(models["mid-size"], kernel_bytes=n).peak_bytes for n in (0, 7 * MiB)
    ]
    assert peaks[1] - peaks[0] == 7 * MiB


@pytest.mark.parametrize("caller", ["compress", "plan", "evaluate"])
def test_what_was_measured_of_products_is_planned_for(
    caller: str, models: dict[str, Path], tmp_path: Path
) -> None:
    model, out, text = models["pico"], tmp_path / "out", varied_text(tmp_path / "text.txt", 4096)
    calls: dict[str, Callable[[], object]] = {
        "compress": lambda: compress(model, out, text),
        "plan": lambda: streamcomp.plan(model, Recipe(**SETTINGS), RESOURCES),
        "evaluate": lambda: streamcomp.evaluate(
            model, str(text), seq_len=16, windows=2, resources=RESOURCES
        ),
    }
    calls[caller]()  # it fits

    if caller == "compress":
        shutil.rmtree(out)
    with probed(FakeProbe(kernels=PLENTY)), pytest.raises(BudgetError):
        calls[caller]()


def test_a_plan_counts_a_work_folder_that_is_in_memory(
    models: dict[str, Path], tmp_path: Path
) -> None:
    resources = Resources(BUDGET, threads=1, work_dir=tmp_path)

    def peak(in_memory: bool) -> int:
        with probed(FakeProbe(BASELINE, in_memory=lambda folder: in_memory and folder == tmp_path)):
            return streamcomp.plan(models["pico"], Recipe(**SETTINGS), resources).peak_bytes

    assert peak(True) > peak(False)


def test_a_job_counts_outputs_that_are_in_memory(models: dict[str, Path], tmp_path: Path) -> None:
    out, text = tmp_path / "out", varied_text(tmp_path / "text.txt", 4096)

    def predicted(in_memory: Callable[[Path], bool]) -> int:
        with probed(FakeProbe(BASELINE, in_memory=in_memory)):
            memory = compress(models["pico"], out, text).report["memory"]
        shutil.rmtree(out)
        return int(memory["predicted_bytes"])

    ample = predicted(lambda folder: False)
    work = predicted(lambda folder: folder == out / ".streamcomp")
    outputs = predicted(lambda folder: folder == out)

    made = planned(models["pico"], method="two-sided", calibration=(str(text),), **SMALL)
    assert outputs - ample == made.disk_bytes - made.work_bytes
    assert work - ample == made.work_bytes


# -- headers --------------------------------------------------------------------------------

LARGE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "num_hidden_layers": 80,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}

PLAN = """
import sys
from pathlib import Path
from unittest import mock
from streamcomp import cli

sys.argv[0] = "streamcomp"
with mock.patch("streamcomp.machine.memory.machine_bytes", return_value=64 * 2**30):
    cli.main()
lines = Path("/proc/self/status").read_text().splitlines()
print(next(line.split()[1] for line in lines if line.startswith("VmHWM")), file=sys.stderr)
"""


def large_tensors(blocks: int = 80) -> dict[str, list[int]]:
    """Names and shapes of Llama-3-70B, or of one with fewer blocks."""
    hidden, inner, grouped = 8192, 28672, 1024
    shapes = {"model.embed_tokens.weight": [128256, hidden]}
    for number in range(blocks):
        block = {
            "self_attn.q_proj": [hidden, hidden],
            "self_attn.k_proj": [grouped, hidden],
            "self_attn.v_proj": [grouped, hidden],
            "self_attn.o_proj": [hidden, hidden],
            "mlp.gate_proj": [inner, hidden],
            "mlp.up_proj": [inner, hidden],
            "mlp.down_proj": [hidden, inner],
            "input_layernorm": [hidden],
            "post_attention_layernorm": [hidden],
        }
        shapes |= {f"model.layers.{number}.{name}.weight": s for name, s in block.items()}
    return {**shapes, "model.norm.weight": [hidden], "lm_head.weight": [128256, hidden]}


def write_headers(folder: Path, shapes: dict[str, list[int]], shards: int) -> int:
    """A checkpoint of bf16 zeros of which only the headers take any disk; its bytes."""
    names, where, total = list(shapes), {}, 0
    for number in range(shards):
        shard = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        header, offset = {}, 0
        for name in names[number::shards]:
            end = offset + 2 * torch.Size(shapes[name]).numel()
            header[name] = {
                "dtype": "BF16",
                "shape": shapes[name],
                "data_offsets": [offset, end],
            }
            where[name], offset = shard, end
        text = json.dumps(header).encode()
        with (folder / shard).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + offset)
        total += offset
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def test_groups_share_a_pass_unless_only_several_passes_fit(tmp_path: Path) -> None:
    # A ratio that leaves factors too small to need the most.
    settings: dict[str, Any] = {"ratio": 0.8, "method": "two-sided", "allocation": "uniform"}
    write_headers(tmp_path, large_tensors(2), 1)
    (tmp_path / "config.json").write_text(json.dumps(LARGE | {"num_hidden_layers": 2}))
    make_tokenizer().save_pretrained(tmp_path)
    ample = planned(tmp_path, samples=64, seq_len=512, **settings)
    most = ample.levers.groups
    assert most == len(ample.outline.blocks[0].groups) > 2
    assert ample.levers_seconds == 0
    together = [
        planned(tmp_path, samples=64, seq_len=512, levers=Levers(1, 1, 1, 512, 7, n), **settings)
        for n in (most, 2, 1)
    ]

    seconds = [made.seconds for made in together]
    peaks = [
        max(step.peak_bytes for step in made.steps if step.name.startswith("reverse"))
        for made in together
    ]
    assert [len(made.outline.blocks[0].passes(made.levers)) for made in together] == [
        1,
        -(-most // 2),
        most,
    ]
    assert peaks[0] > peaks[1] > peaks[2]
    assert seconds[0] < seconds[1] < seconds[2]
    for made in together:
        assert made.levers_seconds == pytest.approx(made.seconds - seconds[0])
    for made in together:
        tight = planned(tmp_path, made.peak_bytes, samples=64, seq_len=512, **settings)
        assert tight.levers.groups >= made.levers.groups
        assert tight.peak_bytes <= made.peak_bytes
    assert planned(tmp_path, max(peaks) - 1, samples=64, seq_len=512, **settings).levers.groups < 6


def test_factors_take_the_seconds_of_their_ranks(models: dict[str, Path]) -> None:
    made = planned(models["mid-size"], method="two-sided", ratio=(0.2, 0.6))
    blocks = [step for step in made.steps if isinstance(step.step, WriteBlock)]

    for step in blocks:
        output, block = made.outputs[step.step.output], made.outline.blocks[step.step.block]
        ranks = {m: output.ranks[m.full_name] for m in block.targets}
        wanted = sum(
            RATES.seconds(find_form("pivot")().encoding_flops(m.rows, m.columns, rank))
            for m, rank in ranks.items()
            if rank is not None
        )
        assert step.limits["factorizing"] == pytest.approx(wanted)
    of_output = [
        [step.limits["factorizing"] for step in blocks if step.step.output == n] for n in (0, 1)
    ]
    assert min(of_output[0]) > max(of_output[1])


@pytest.mark.parametrize("method", ["two-sided", "svd-llm"])
def test_a_long_window_goes_through_feed_forwards_in_chunks(tmp_path: Path, method: str) -> None:
    write_headers(tmp_path, large_tensors(2), 1)
    (tmp_path / "config.json").write_text(json.dumps(LARGE | {"num_hidden_layers": 2}))
    make_tokenizer().save_pretrained(tmp_path)
    settings: dict[str, Any] = {"samples": 4, "seq_len": 8192, "method": method, "batch": 1}
    ample = planned(tmp_path, **settings)
    assert ample.levers.feed_forward_tokens == 8192

    chunked = planned(tmp_path, levers=replace(ample.levers, feed_forward_tokens=1024), **settings)

    kind = "reverse" if method == "two-sided" else "block"
    peaks = [
        max(step.peak_bytes for step in made.steps if step.name.startswith(kind))
        for made in (ample, chunked)
    ]
    assert peaks[1] < peaks[0]
    assert (chunked.levers_seconds > 0) == (method == "two-sided")  # a backward runs them again
    tight = planned(tmp_path, peaks[0] - 1, **settings)
    assert tight.levers.feed_forward_tokens < 8192
    assert tight.levers.groups == ample.levers.groups


@pytest.mark.parametrize("method", ["two-sided", "svd-llm"])
def test_a_model_of_70_billion_parameters_is_planned_from_headers(
    tmp_path: Path, method: str
) -> None:
    total = write_headers(tmp_path, large_tensors(), 30)
    assert total == 2 * 70_553_706_496
    (tmp_path / "config.json").write_text(json.dumps(LARGE))
    make_tokenizer().save_pretrained(tmp_path)

    settings = ("--max-ram", "64G", "--json", "--threads", 1, "--method", method)
    done = run_python("-c", PLAN, "plan", tmp_path, *settings)

    assert done.code == 0, done.err
    plan = done.json
    # tokenize, embed, 80 forward, the loss, 80 in reverse, ranks, 80 blocks, copy the rest
    assert len(plan["steps"]) == (245 if method == "two-sided" else 83)
    assert len(plan["ranks"]) == 80 * 7
    assert plan["budget_bytes"] == 64 * 2**30
    # A block weighs 1.6 GiB; beside it lie the moments, and a decomposition's workspace.
    # Two-sided, ranks are not known beforehand: at most all that make a linear smaller.
    assert 4 * 2**30 < plan["minimum_bytes"] < 5.5 * 2**30
    assert 0.79 * total < plan["output_bytes"] < 0.83 * total
    assert int(done.err.split()[-1]) * 1024 < 700 * 10**6


def test_windows_longer_than_the_positions_are_refused(models: dict[str, Path]) -> None:
    with pytest.raises(RecipeError, match=f"--seq-len {LONGEST + 1}: the model has {LONGEST} pos"):
        planned(models["pico"], seq_len=LONGEST + 1)


# -- ranks ----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("ratio", [0.2, 0.5])
@pytest.mark.parametrize("model", MODELS)
def test_the_ratio_of_a_plan_is_counted_from_its_ranks(
    models: dict[str, Path], model: str, ratio: float, form: str
) -> None:
    made = planned(models[model], ratio=ratio, form=form)

    dense = kept = 0
    for linear in made.outline.eligible:
        m, n, r = linear.rows, linear.columns, made.ranks[linear.full_name]
        dense += m * n
        if r is None:
            kept += m * n
        else:
            kept += r * n + (m - r) * r if form == "pivot" else r * n + m * r
    assert made.ratio == pytest.approx(1 - kept / dense, abs=1e-12)
    assert ratio - 1e-12 < made.ratio < ratio + 0.01


def test_include_and_exclude_change_what_is_eligible(models: dict[str, Path]) -> None:
    def kinds(**settings: Any) -> list[str]:
        made = planned(models["pico"], **settings)
        return sorted(linear.full_name.rpartition(".")[2] for linear in made.outline.eligible)

    feed_forward = sorted(2 * ["gate_proj", "up_proj", "down_proj"])
    attention = sorted(2 * ["q_proj", "k_proj", "v_proj", "o_proj"])
    assert kinds() == sorted(feed_forward + attention)
    assert kinds(include=r"mlp\.") == feed_forward
    assert kinds(exclude=r"mlp\.") == attention
    assert kinds(include=r"mlp\.", exclude="up_proj|gate") == 2 * ["down_proj"]
    with pytest.raises(RecipeError, match="leave no linear"):
        planned(models["pico"], include="nothing")


# -- disk -----------------------------------------------------------------------------------


class Disk(SilentProgress):
    """Adds up the files below ``folder`` whenever the job says something."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.sizes = folder, [0]

    def stage(self, step: int, name: str, stage: str, share: float) -> None:
        self._sample()

    def finish_step(self, step: int, name: str, seconds: float, detail: str) -> None:
        self._sample()

    def end(self) -> None:
        self._sample()

    def _sample(self) -> None:
        self.sizes.append(sum(p.stat().st_size for p in self.folder.rglob("*") if p.is_file()))


# More states (128 KiB) than a pico model, so that they show in the bytes.
LONG: dict[str, Any] = {"samples": 64, "seq_len": 16}
DISK = [("pico", kind, LONG, False) for kind in JOBS_OF]
DISK += [("pico", "two-sided", LONG, True), ("pico", "svd-llm", LONG, True)]
DISK += [("mid-size", kind, SETTINGS, False) for kind in ("two-sided", "svd-llm", "rom")]


def with_tuples(kind: str) -> dict[str, Any]:
    found = {"method": "two-sided", **JOBS_OF[kind]}
    return {k: tuple(v) if isinstance(v, list) else v for k, v in found.items()}


@pytest.mark.parametrize(
    ("model", "kind", "settings", "keep"), DISK, ids=lambda value: str(value)[:40]
)
def test_a_job_never_takes_more_disk_than_was_predicted(
    models: dict[str, Path],
    text: Path,
    tmp_path: Path,
    model: str,
    kind: str,
    settings: dict[str, Any],
    keep: bool,
) -> None:
    out, settings = tmp_path / "out", settings | with_tuples(kind)
    disk = Disk(out)

    compress(models[model], out, text, progress=disk, keep_work=keep, **settings)

    disk.end()  # published
    made = planned(models[model], keep_work=keep, **settings)
    assert made.output_bytes < max(disk.sizes) <= made.disk_bytes


@pytest.mark.parametrize("kind", JOBS_OF)
def test_no_file_is_kept_that_no_later_step_reads(
    models: dict[str, Path], text: Path, tmp_path: Path, kind: str
) -> None:
    work, settings = tmp_path / "work", LONG | with_tuples(kind)
    made = planned(models["pico"], **settings)
    steps = [step.step for step in made.steps]
    kept: list[set[str]] = []

    class Look(SilentProgress):
        def finish_step(self, step: int, name: str, seconds: float, detail: str) -> None:
            kept.append({path.name.partition(".")[0] for path in work.iterdir()} - {"journal"})

    compress(models["pico"], tmp_path / "out", text, work_dir=work, progress=Look(), **settings)

    assert len(kept) == len(steps)
    for number, found in enumerate(kept):
        later = {file.key for step in steps[number + 1 :] for file in step.reads}
        assert found - {"windows"} <= later, steps[number].name
        # and what the next step reads is there
        following = steps[number + 1 : number + 2]
        assert {file.key for step in following for file in step.reads} <= found
    assert kept[-1] <= {"windows"}


def test_states_stored_at_every_second_block_take_less_disk_and_give_the_same(
    pico: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    dense = pico("llama", blocks=4)
    made = [planned(dense, method="two-sided", store_every=k, **LONG) for k in (1, 2, 4)]
    disks = [Disk(tmp_path / str(k)) for k in (1, 2, 4)]
    for disk, k in zip(disks, (1, 2, 4), strict=True):
        compress(dense, disk.folder, text, progress=disk, store_every=k, **LONG)

    assert made[0].disk_bytes > made[1].disk_bytes
    assert max(disks[0].sizes) > max(disks[1].sizes)
    for plan, disk in zip(made, disks, strict=True):
        assert max(disk.sizes) <= plan.disk_bytes
    first, *others = (stored_tensors(disk.folder) for disk in disks)
    for other in others:
        assert first.keys() == other.keys()
        assert all(torch.equal(first[name], other[name]) for name in first)


FIXED = [kind for kind in JOBS_OF if "swsc" not in kind]


@pytest.mark.parametrize("kind", FIXED)
def test_the_bytes_of_the_result_are_known_beforehand(
    models: dict[str, Path], text: Path, tmp_path: Path, kind: str
) -> None:
    settings = {"allocation": "uniform", **with_tuples(kind), **SMALL}
    compress(models["pico"], tmp_path, text, **settings)

    tensors = 0
    for shard in tmp_path.rglob("*.safetensors"):
        with shard.open("rb") as file:
            tensors += shard.stat().st_size - 8 - int.from_bytes(file.read(8), "little")
    made = planned(models["pico"], **settings)
    assert tensors == made.output_bytes
