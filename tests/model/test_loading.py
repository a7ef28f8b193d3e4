"""Tensors become parameters as in transformers, also those that are stored transposed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import streamcomp
from streamcomp.checkpoint.index import SINGLE_FILE
from streamcomp.errors import CorruptShardError
from streamcomp.model.streamer import BlockStreamer
from tests.jobs import compress, config_of, stored_tensors
from tests.model.folders import CPU, edit_config, open_skeleton, save_edited, streamed_logits
from tests.pico import pico_tokens, save_pico, whole_logits

FC = "transformer.h.1.mlp.c_fc.weight"


def as_published(folder: Path) -> Path:
    """A GPT-2 as its authors published it: names without prefix, a tied head, masks in the file."""
    save_pico(folder, "gpt2", shard_size="1GB", tie=True)
    tensors = load_file(folder / SINGLE_FILE)
    tensors = {name.removeprefix("transformer."): value for name, value in tensors.items()}
    mask = torch.ones(1, 1, 128, 128).tril()
    tensors |= {f"h.{number}.attn.bias": mask.clone() for number in range(2)}
    save_file(tensors, folder / SINGLE_FILE, metadata={"format": "pt"})
    return folder


def test_a_transposed_weight_is_a_view_of_what_was_read(pico: Callable[..., Path]) -> None:
    skeleton = open_skeleton(pico("gpt2"))

    with BlockStreamer(skeleton, CPU).block(1) as block:
        weight = block.module.get_parameter("mlp.c_fc.weight")

        assert weight.shape == (48, 32) and weight.stride() == (1, 48)
        assert torch.equal(weight.T, stored_tensors(pico("gpt2"))[FC])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transposed_weights_run_as_in_transformers(
    dtype: torch.dtype, pico: Callable[..., Path]
) -> None:
    folder = pico("gpt2", dtype=dtype)

    assert torch.equal(streamed_logits(folder, pico_tokens()), whole_logits(folder, pico_tokens()))


def test_a_shape_that_is_wrong_is_told_as_it_is_stored(tmp_path: Path) -> None:
    folder = save_edited(tmp_path, lambda t: t.update({FC: t[FC][:, :40].clone()}), "gpt2")

    message = rf"{FC} is \[32, 40\] on disk, config.json makes it \[32, 48\]"
    with pytest.raises(CorruptShardError, match=message):
        open_skeleton(folder)


def test_a_transposed_weight_of_one_axis_is_refused(tmp_path: Path) -> None:
    folder = save_edited(tmp_path, lambda t: t.update({FC: t[FC][0].clone()}), "gpt2")

    with pytest.raises(CorruptShardError, match=rf"{FC} is \[48\] on disk"):
        open_skeleton(folder)


def test_a_factor_that_the_config_does_not_list_is_refused(
    pico: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    compress(pico("gpt2"), out, text, ratio=0.3)
    quantization = config_of(out)["quantization_config"]
    del quantization["modules"]["transformer.h.1.mlp.c_fc"]
    edit_config(out, quantization_config=quantization)

    with pytest.raises(CorruptShardError, match=r"c_fc\.\w+ is a factor that the config does not"):
        open_skeleton(out)


def test_gpt2_as_it_was_published(text: Path, tmp_path: Path) -> None:
    source = as_published(tmp_path / "gpt2")
    assert torch.equal(streamed_logits(source, pico_tokens()), whole_logits(source, pico_tokens()))

    compress(source, tmp_path / "out", text, ratio=0.3)
    streamcomp.export(tmp_path / "out", tmp_path / "dense")

    before, after = stored_tensors(source), stored_tensors(tmp_path / "dense")
    assert {k: v.shape for k, v in before.items()} == {k: v.shape for k, v in after.items()}
    expected = whole_logits(tmp_path / "out", pico_tokens())
    made = whole_logits(tmp_path / "dense", pico_tokens())
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-4)
    assert streamcomp.verify(tmp_path / "out").sound
