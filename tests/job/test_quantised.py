"""Sources in fp8 and mxfp4 go through every command as the bf16 models that they stand for."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import streamcomp
from streamcomp.errors import JobMismatchError, NonFiniteError
from tests.jobs import (
    RESOURCES,
    Interrupt,
    Interrupted,
    compress,
    config_of,
    quick_plan,
    run_cli,
    small_recipe,
)
from tests.pico import pico_tokens, whole_logits
from tests.quantised import deepseek_config, save_fp8, save_mxfp4

METHODS: dict[str, dict[str, Any]] = {
    "two-sided": {},
    "svd-llm": {"method": "svd-llm", "form": "uv"},
}


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """A quantised model and its bf16 twin, made once; not to be changed."""
    made: dict[str, tuple[Path, Path]] = {}

    def make(kind: str) -> tuple[Path, Path]:
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            made[kind] = save(kind, folder / "model", folder / "plain")
        return made[kind]

    return make


def save(kind: str, folder: Path, plain: Path) -> tuple[Path, Path]:
    if kind == "mxfp4":
        return save_mxfp4(folder, plain), plain
    return save_fp8(folder, plain, deepseek_config() if kind == "fp8 experts" else None), plain


def shards(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.glob("*.safetensors")}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["fp8", "fp8 experts", "mxfp4"])
def test_its_shards_are_those_of_the_decoded_model(
    kind: str,
    method: str,
    twins: Callable[[str], tuple[Path, Path]],
    text: Path,
    tmp_path: Path,
) -> None:
    source, plain = twins(kind)
    result = compress(source, tmp_path / "out", text, **METHODS[method])
    compress(plain, tmp_path / "expected", text, **METHODS[method])

    assert shards(tmp_path / "out") == shards(tmp_path / "expected")
    config, expected = config_of(tmp_path / "out"), config_of(tmp_path / "expected")
    assert config == expected
    assert config["quantization_config"]["quant_method"] == "streamcomp"
    tokens = pico_tokens()
    logits = whole_logits(tmp_path / "out", tokens)
    assert torch.equal(logits, whole_logits(tmp_path / "expected", tokens))
    assert all(step["peak_bytes"] <= step["predicted_bytes"] for step in result.report["steps"])


def test_a_config_inside_the_config_is_not_handed_on(text: Path, tmp_path: Path) -> None:
    source = save_fp8(tmp_path / "model", tmp_path / "plain")
    config = config_of(source)
    config["parts"] = {"quantization_config": config.pop("quantization_config"), "a": 1}
    (source / "config.json").write_text(json.dumps(config))

    compress(source, tmp_path / "out", text)

    after = config_of(tmp_path / "out")
    assert after["parts"] == {"a": 1}
    assert after["quantization_config"]["quant_method"] == "streamcomp"


@pytest.mark.parametrize("kind", ["fp8", "mxfp4"])
def test_a_plan_counts_decoded_bytes_and_says_so(
    kind: str, twins: Callable[[str], tuple[Path, Path]], text: Path
) -> None:
    source, plain = twins(kind)
    with quick_plan():
        made = streamcomp.plan(source, small_recipe(text), RESOURCES)
        expected = streamcomp.plan(plain, small_recipe(text), RESOURCES)

    assert made.outputs == expected.outputs
    assert made.notes == (
        f"the source is quantised ({kind}): its weights are decoded to bf16 as they are read",
    )
    assert [step.written_bytes for step in made.steps] == [
        step.written_bytes for step in expected.steps
    ]


@pytest.mark.parametrize("kind", ["fp8", "mxfp4"])
def test_inspect_tells_both_sizes(kind: str, twins: Callable[[str], tuple[Path, Path]]) -> None:
    source, plain = twins(kind)
    ours, expected = streamcomp.inspect(source), streamcomp.inspect(plain)

    assert ours.families == expected.families
    assert ours.parameters == expected.parameters
    assert ours.nbytes < ours.decoded_bytes == expected.nbytes
    assert "(decoded: " in run_cli("inspect", source).out
    assert "decoded" not in run_cli("inspect", plain).out


@pytest.mark.parametrize("kind", ["fp8", "fp8 experts", "mxfp4"])
def test_its_perplexity_is_that_of_the_decoded_model(
    kind: str, twins: Callable[[str], tuple[Path, Path]], text: Path
) -> None:
    values = []
    for folder in twins(kind):
        with quick_plan():
            made = streamcomp.evaluate(
                folder, str(text), seq_len=32, windows=4, resources=RESOURCES
            )
        values.append(made.nll)

    assert values[0] == values[1]


@pytest.mark.parametrize("after", [1, 3, 5, 6])
def test_an_interrupted_job_goes_on_to_the_same_bytes(
    after: int, twins: Callable[[str], tuple[Path, Path]], text: Path, tmp_path: Path
) -> None:
    source, _ = twins("fp8 experts")
    compress(source, tmp_path / "expected", text)
    with pytest.raises(Interrupted):
        compress(source, tmp_path / "out", text, progress=Interrupt(after))

    compress(source, tmp_path / "out", text)

    assert shards(tmp_path / "out") == shards(tmp_path / "expected")


def change_a_scale(folder: Path, name: str, value: float) -> None:
    """Another first scale of the tensor ``name``, and all else as it is, times of change too."""
    for shard in folder.glob("*.safetensors"):
        tensors = load_file(shard)
        if name in tensors:
            tensors[name].view(-1)[0] = value
            save_file(tensors, shard, metadata={"format": "pt"})
            return
    raise AssertionError(name)


def test_a_source_that_changes_meanwhile_is_noticed(text: Path, tmp_path: Path) -> None:
    """By the digest of what is stored, also where size and time of change are as they were."""

    source = save_fp8(tmp_path / "model", tmp_path / "plain")
    with pytest.raises(Interrupted):
        compress(source, tmp_path / "out", text, progress=Interrupt(3))
    times = {path: path.stat() for path in source.iterdir()}
    change_a_scale(source, "model.layers.0.mlp.up_proj.weight_scale_inv", 0.5)
    for path, before in times.items():
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))

    with pytest.raises(JobMismatchError, match=r"model\.layers\.0 has other bytes"):
        compress(source, tmp_path / "out", text)


def test_other_blocks_make_another_job(text: Path, tmp_path: Path) -> None:
    source = save_fp8(tmp_path / "model", tmp_path / "plain")
    with pytest.raises(Interrupted):
        compress(source, tmp_path / "out", text, progress=Interrupt(3))
    config = config_of(source)
    config["quantization_config"]["weight_block_size"] = [17, 16]  # grids are as large
    (source / "config.json").write_text(json.dumps(config))

    with pytest.raises(JobMismatchError):
        compress(source, tmp_path / "out", text)


def test_a_damaged_scale_is_refused_in_a_line(text: Path, tmp_path: Path) -> None:
    source = save_fp8(tmp_path / "model", tmp_path / "plain")
    change_a_scale(source, "model.layers.1.self_attn.o_proj.weight_scale_inv", float("nan"))

    with pytest.raises(NonFiniteError, match=r"layers\.1\.self_attn\.o_proj\.weight in .*damaged"):
        compress(source, tmp_path / "out", text)


def test_transformers_loads_what_comes_of_it_in_bf16(
    twins: Callable[[str], tuple[Path, Path]], text: Path, tmp_path: Path
) -> None:
    compress(twins("mxfp4")[0], tmp_path / "out", text)

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")

    assert {value.dtype for value in model.parameters()} == {torch.bfloat16}
