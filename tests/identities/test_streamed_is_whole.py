"""A model run block by block gives the bits of the whole model, on any architecture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.families.tiny import save_tiny
from tests.jobs import compress, factored_modules
from tests.model.folders import streamed_logits
from tests.pico import ARCHITECTURES, TUPLES, pico_text, pico_tokens, whole_logits


@pytest.mark.parametrize("shard_size", ["20KB", "1GB"], ids=["sharded", "single"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_streamed_logits_are_those_of_the_whole_model(
    architecture: str, shard_size: str, pico: Callable[..., Path]
) -> None:
    folder = pico(architecture, shard_size=shard_size)
    files = len(list(folder.glob("*.safetensors")))
    assert files == 1 if shard_size == "1GB" else files > 3

    expected = whole_logits(folder, pico_tokens())

    assert expected.std() > 0.1
    assert torch.equal(streamed_logits(folder, pico_tokens()), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_they_are_also_in_half_precision(
    architecture: str, dtype: torch.dtype, pico: Callable[..., Path]
) -> None:
    folder = pico(architecture, dtype=dtype)

    streamed = streamed_logits(folder, pico_tokens())

    assert streamed.dtype == dtype
    assert streamed.isfinite().all()
    assert torch.equal(streamed, whole_logits(folder, pico_tokens()))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_they_are_also_where_the_head_is_tied_to_the_embedding(
    architecture: str, pico: Callable[..., Path]
) -> None:
    tied, untied = pico(architecture, tie=True), pico(architecture)

    streamed = streamed_logits(tied, pico_tokens())

    assert torch.equal(streamed, whole_logits(tied, pico_tokens()))
    assert not torch.equal(streamed, streamed_logits(untied, pico_tokens()))


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (5, 16), (2, 100)])
def test_they_are_for_batches_of_any_shape(
    shape: tuple[int, int], pico: Callable[..., Path]
) -> None:
    for architecture in ("llama", "gemma3", "opt"):
        folder, tokens = pico(architecture), pico_tokens(*shape)

        assert torch.equal(streamed_logits(folder, tokens), whole_logits(folder, tokens))


@pytest.mark.parametrize("architecture", TUPLES)
def test_they_are_where_blocks_return_tuples_and_hold_buffers_of_their_own(
    architecture: str, pico: Callable[..., Path]
) -> None:
    folder = pico(architecture)

    assert torch.equal(streamed_logits(folder, pico_tokens()), whole_logits(folder, pico_tokens()))


def test_they_are_for_a_model_of_more_blocks(pico: Callable[..., Path]) -> None:
    folder = pico("gemma2", blocks=5)

    assert torch.equal(streamed_logits(folder, pico_tokens()), whole_logits(folder, pico_tokens()))


def test_the_pico_models_differ_from_seed_to_seed(pico: Callable[..., Path]) -> None:
    first, second = (whole_logits(pico("llama", seed=seed), pico_tokens()) for seed in (0, 1))

    assert not torch.allclose(first, second)


@pytest.mark.parametrize("kind", ["falcon_mamba", "jamba"])
def test_they_are_where_code_asks_whether_the_model_is_quantised(kind: str, tmp_path: Path) -> None:
    # Then they call dt_proj, else they read its weight.
    source, out = tmp_path / "source", tmp_path / "out"
    save_tiny(kind, source)
    tokens = pico_tokens(2, 12).clamp(16, 250)
    compress(source, out, pico_text(tmp_path / "text.txt", 4000), method="svd-llm", form="uv")

    streamed, whole = streamed_logits(out, tokens), whole_logits(out, tokens)

    assert not any("dt_proj" in name for name in factored_modules(out))
    rounding = 1e-5 * float(whole.abs().max())
    assert torch.allclose(streamed, whole, atol=rounding, rtol=0)
    assert not torch.allclose(whole_logits(source, tokens), whole, atol=100 * rounding, rtol=0)
