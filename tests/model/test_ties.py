"""Weights that several parameters share, as transformers shares them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from streamcomp.errors import MissingShardError, UnsupportedModelError
from tests.families.tiny import save_tiny
from tests.jobs import compress, stored_tensors
from tests.model.folders import open_skeleton, save_edited, streamed_logits
from tests.pico import VOCABULARY, pico_text, pico_tokens, save_pico, whole_logits

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def other_head() -> Tensor:
    return torch.randn(VOCABULARY, 32, generator=torch.Generator().manual_seed(1))


def same_as_whole(folder: Path) -> bool:
    return torch.equal(streamed_logits(folder, pico_tokens()), whole_logits(folder, pico_tokens()))


def test_a_head_of_its_own_is_kept_whatever_the_config_says(tmp_path: Path) -> None:
    folder = save_edited(tmp_path, lambda t: t.update({HEAD: other_head()}), tie=True)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)

    assert open_skeleton(folder).ties == {}
    assert same_as_whole(folder)


def test_an_embedding_of_its_own_and_the_same_head_are_as_good_as_tied(tmp_path: Path) -> None:
    folder = save_edited(tmp_path, lambda t: t.update({HEAD: t[EMBEDDING].clone()}), tie=True)

    assert same_as_whole(folder)


def test_a_head_alone_is_the_embedding_too(tmp_path: Path) -> None:
    folder = save_edited(tmp_path, lambda t: t.update({HEAD: t.pop(EMBEDDING)}), tie=True)

    assert open_skeleton(folder).ties == {EMBEDDING: HEAD}
    assert same_as_whole(folder)


def test_a_tied_model_is_compressed_as_it_is_stored(tmp_path: Path) -> None:
    source = tmp_path / "model"
    save_edited(source, lambda t: t.update({HEAD: t.pop(EMBEDDING)}), tie=True)

    compress(source, tmp_path / "out", pico_text(tmp_path / "text.txt", 4000))

    stored = stored_tensors(tmp_path / "out")
    assert EMBEDDING not in stored
    assert torch.equal(stored[HEAD], stored_tensors(source)[HEAD])
    assert same_as_whole(tmp_path / "out")


def test_two_heads_are_compressed_as_two(tmp_path: Path) -> None:
    source = tmp_path / "model"
    save_edited(source, lambda t: t.update({HEAD: other_head()}), tie=True)

    compress(source, tmp_path / "out", pico_text(tmp_path / "text.txt", 4000))

    stored = stored_tensors(tmp_path / "out")
    assert torch.equal(stored[HEAD], other_head())
    assert same_as_whole(tmp_path / "out")


def test_neither_of_two_tied_weights_is_a_missing_weight(tmp_path: Path) -> None:
    folder = save_edited(tmp_path, lambda t: t.pop(EMBEDDING), tie=True)

    with pytest.raises(MissingShardError, match=f"{EMBEDDING} is in no shard"):
        open_skeleton(folder).check_tensors(head=False)


def test_an_untied_model_without_a_head_is_incomplete(tmp_path: Path) -> None:
    folder = save_edited(tmp_path, lambda t: t.pop(HEAD))

    with pytest.raises(MissingShardError, match=f"{HEAD} is in no shard"):
        open_skeleton(folder).check_tensors(head=True)


def test_a_bias_may_be_tied_as_well(tmp_path: Path) -> None:
    save_tiny("roberta", tmp_path)
    names = "lm_head.bias", "lm_head.decoder.bias"
    shard = next(f for f in tmp_path.glob("*.safetensors") if names[0] in load_file(f))
    tensors = load_file(shard)
    tensors[names[0]] += torch.arange(float(VOCABULARY))
    save_file(tensors, shard, metadata={"format": "pt"})
    assert open_skeleton(tmp_path).ties[names[1]] == names[0]
    tokens = pico_tokens(2, 12).clamp(16, 250)

    streamed, whole = streamed_logits(tmp_path, tokens), whole_logits(tmp_path, tokens)

    assert torch.allclose(streamed, whole, atol=1e-5 * float(whole.abs().max()), rtol=0)


def test_blocks_that_share_weights_are_refused_by_name(tmp_path: Path) -> None:
    save_tiny("zamba2", tmp_path)

    with pytest.raises(UnsupportedModelError, match=r"model\.layers\.3\..* is the same weight as"):
        open_skeleton(tmp_path)


def test_a_model_is_tied_to_the_one_tensor_on_disk(tmp_path: Path) -> None:
    assert open_skeleton(save_pico(tmp_path, tie=True)).ties == {HEAD: EMBEDDING}
