"""Perplexity streamed block by block is that of the whole model."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import streamcomp
from streamcomp import Evaluation, NonFiniteError, Resources
from streamcomp.calibration.corpus import HELD_OUT, load_windows
from tests.jobs import (
    BUDGET,
    RESOURCES,
    compress,
    load_dense,
    logits_of,
    run_python,
    set_levers,
    stored_tensors,
    varied_text,
)
from tests.model.folders import save_edited
from tests.pico import ARCHITECTURES, make_tokenizer

SEQ_LEN, WINDOWS = 24, 5


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return varied_text(tmp_path_factory.mktemp("text") / "test.txt", 2000, seed=1)


def evaluate(model: Path, text: Path | None, batch: int = 0, head: int = 0) -> Evaluation:
    """Streamed, with ``batch`` windows per forward and ``head`` tokens per call of the head."""
    levers = {"batch": batch, "head_tokens": head}
    with set_levers(**{name: value for name, value in levers.items() if value}):
        return streamcomp.evaluate(
            model,
            None if text is None else str(text),
            seq_len=SEQ_LEN,
            windows=WINDOWS,
            resources=RESOURCES,
        )


def windows_of(model: Path, text: Path) -> Tensor:
    return load_windows(model, [str(text)], WINDOWS, SEQ_LEN, None).tokens.long()


def whole_nll(model: PreTrainedModel, tokens: Tensor) -> float:
    """Mean -log p in nats, from the logits that transformers gives for one window at a time."""
    for parameter in model.parameters():
        # Views of the file's map lie at odd addresses, and BLAS rounds by the address.
        parameter.data = parameter.data.clone()
    total = 0.0
    for window in tokens:
        logits = logits_of(model, window[None])[0, :-1].float()
        loss = functional.cross_entropy(logits, window[1:], reduction="none")
        total += float(loss.double().sum())
    return total / (tokens.numel() - len(tokens))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_it_is_the_whole_model_s_bit_for_bit(
    architecture: str, pico: Callable[..., Path], text: Path
) -> None:
    folder = pico(architecture)

    found = evaluate(folder, text, batch=1)

    expected = whole_nll(load_dense(folder), windows_of(folder, text))
    assert found.nll == expected
    assert found.perplexity == math.exp(expected)
    assert found.perplexity > 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt_neox"])
def test_it_is_in_other_dtypes_too(
    architecture: str, dtype: torch.dtype, pico: Callable[..., Path], text: Path
) -> None:
    folder = pico(architecture, dtype=dtype, tie=True)

    found = evaluate(folder, text, batch=1)

    assert found.nll == whole_nll(load_dense(folder), windows_of(folder, text))


@pytest.mark.parametrize("form", ["pivot", "uv"])
@pytest.mark.parametrize("architecture", ["llama", "gemma3", "opt", "mixtral"])
def test_of_a_compressed_model_it_is_that_of_the_loaded_one(
    architecture: str, form: str, pico: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    folder, out = pico(architecture), tmp_path / "out"
    compress(folder, out, text, form=form, ratio=0.5)

    found = evaluate(out, text, batch=1)

    assert found.nll == whole_nll(load_dense(out), windows_of(out, text))
    assert found.nll != evaluate(folder, text, batch=1).nll


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "opt"])
def test_batches_and_chunks_of_the_head_do_not_matter(
    architecture: str, pico: Callable[..., Path], text: Path
) -> None:
    folder = pico(architecture)
    expected = evaluate(folder, text, batch=1).nll

    for batch, head in ((5, 0), (8, 0), (1, 7), (3, 23)):
        found = evaluate(folder, text, batch=batch, head=head).nll

        assert found == pytest.approx(expected, rel=1e-6), (batch, head)


def test_what_is_told_is_what_was_done(pico: Callable[..., Path], text: Path) -> None:
    folder = pico("llama")

    found = evaluate(folder, text)

    tensors = stored_tensors(folder)
    assert (found.windows, found.seq_len, found.tokens) == (WINDOWS, SEQ_LEN, WINDOWS * 23)
    assert found.text == str(text)
    assert found.parameters == sum(tensor.numel() for tensor in tensors.values())
    assert found.checkpoint_bytes == 4 * found.parameters
    assert 0 < found.peak_bytes <= found.budget_bytes
    assert found.to_dict()["perplexity"] == found.perplexity


def test_without_a_text_it_is_the_held_out_part_of_the_reference(
    pico: Callable[..., Path],
) -> None:
    folder = pico("llama")

    found = evaluate(folder, None)

    tokens = load_windows(folder, [HELD_OUT], WINDOWS, SEQ_LEN, None).tokens.long()
    assert found.text == HELD_OUT
    assert found.nll == pytest.approx(whole_nll(load_dense(folder), tokens), rel=1e-6)


def test_no_number_of_windows_is_all_of_them(pico: Callable[..., Path], text: Path) -> None:
    found = streamcomp.evaluate(
        pico("llama"), str(text), seq_len=SEQ_LEN, windows=0, resources=RESOURCES
    )

    assert found.windows == 2000 // SEQ_LEN


def test_nothing_is_left_in_the_work_folder(
    pico: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    work = tmp_path / "work"

    streamcomp.evaluate(
        pico("llama"),
        str(text),
        seq_len=SEQ_LEN,
        windows=WINDOWS,
        resources=Resources(BUDGET, threads=1, work_dir=work),
    )

    assert list(work.iterdir()) == []


def test_a_model_that_says_nothing_but_nan_is_an_error(text: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"][:] = float("nan")

    with pytest.raises(NonFiniteError, match="NaN"):
        evaluate(save_edited(tmp_path / "model", change), text)


# -- memory ------------------------------------------------------------------------------

MEASURE = """
import json, sys
from streamcomp import BudgetError, Resources, evaluate

folder, text, budget = sys.argv[1:]
try:
    resources = Resources(budget, threads=1)
    found = evaluate(folder, text, seq_len=128, windows=16, resources=resources)
    print(json.dumps(found.to_dict()))
except BudgetError as error:
    print(json.dumps({"least": error.minimum_bytes}))
"""


def measure(folder: Path, text: Path, budget: str) -> dict[str, Any]:
    """One evaluation in a process of its own, or the least budget that it names."""
    done = run_python("-c", MEASURE, folder, text, budget)
    assert done.code == 0, done.err[-2000:]
    told: dict[str, Any] = json.loads(done.out)
    return told


def test_no_more_memory_is_taken_than_was_predicted(tmp_path: Path) -> None:
    """A model of 512 channels and 32,000 tokens: its head is larger than its blocks."""
    text = varied_text(tmp_path / "text.txt", 20_000)
    config = LlamaConfig(
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=2,
        num_attention_heads=8,
        vocab_size=32_000,
        max_position_embeddings=128,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")

    refused = measure(tmp_path / "model", text, "64M")
    found = measure(tmp_path / "model", text, str(refused["least"]))

    assert found["peak_bytes"] <= found["predicted_bytes"] <= found["budget_bytes"]
