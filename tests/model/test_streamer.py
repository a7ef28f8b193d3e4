from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.utils import logging

from streamcomp.checkpoint.index import SINGLE_FILE
from streamcomp.errors import CorruptShardError, MissingShardError, NonFiniteError
from streamcomp.forms import find_form
from streamcomp.forms.runtime import FORMAT_VERSION, MODULES, FactoredLinear
from streamcomp.model.sites import find_sites
from streamcomp.model.streamer import BlockStreamer
from tests.model.folders import (
    CPU,
    edit_config,
    open_skeleton,
    save_edited,
    streamed_logits,
)
from tests.pico import ARCHITECTURES, pico_tokens, save_pico, whole_logits

UP = "model.layers.1.mlp.up_proj"


def weights_in_memory(module: nn.Module) -> list[str]:
    return [name for name, value in module.named_parameters() if not value.is_meta]


def dropping(name: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.pop(name)


def spoiling(name: str, value: float) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors[name].view(-1)[3:5].fill_(value)


# -- one block at a time


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_only_the_block_in_use_is_in_memory(architecture: str, pico: Callable[..., Path]) -> None:
    skeleton = open_skeleton(pico(architecture))
    streamer = BlockStreamer(skeleton, CPU)
    outside = weights_in_memory(skeleton.model)

    for number in range(len(skeleton)):
        with streamer.block(number) as block:
            names = [f"{block.name}.{name}" for name, _ in block.module.named_parameters()]
            assert sorted(weights_in_memory(skeleton.model)) == sorted(outside + names)
        assert weights_in_memory(skeleton.model) == outside


def test_hidden_states_are_held_by_those_who_asked_for_them_alone(
    pico: Callable[..., Path],
) -> None:
    streamer = BlockStreamer(open_skeleton(pico("llama")), CPU)

    hidden, _ = streamer.capture(pico_tokens())
    embedded = weakref.ref(hidden)
    del hidden
    assert embedded() is None
    with torch.no_grad(), streamer.head() as head:
        hidden = torch.zeros(1, 2, streamer.skeleton.hidden_size)
        head(hidden)
        last = weakref.ref(hidden)
        del hidden
        assert last() is None


@pytest.mark.parametrize("tie", [False, True])
def test_the_head_is_dropped_after_use(tie: bool, pico: Callable[..., Path]) -> None:
    skeleton = open_skeleton(pico("llama", tie=tie))
    streamer = BlockStreamer(skeleton, CPU)

    with streamer.head() as head:
        head(torch.zeros(1, 4, 32))
        assert not skeleton.head.weight.is_meta

    assert skeleton.head.weight.is_meta
    assert skeleton.embedding.weight.is_meta


def test_a_block_is_dropped_also_after_a_failure(pico: Callable[..., Path]) -> None:
    skeleton = open_skeleton(pico("llama"))
    streamer = BlockStreamer(skeleton, CPU)

    with pytest.raises(ZeroDivisionError), streamer.block(0):
        raise ZeroDivisionError

    assert weights_in_memory(skeleton.block(0)) == []


def test_of_the_embedding_only_the_rows_in_use_are_read(pico: Callable[..., Path]) -> None:
    skeleton = open_skeleton(pico("llama"))
    seen = []
    skeleton.embedding.register_forward_pre_hook(
        lambda module, args: seen.append(tuple(module.weight.shape))
    )

    BlockStreamer(skeleton, CPU).capture(torch.tensor([[7, 3, 7, 200], [3, 3, 7, 3]]))

    assert seen[-1] == (3, 32)


def test_a_padding_token_beyond_the_rows_in_use_is_no_trouble(tmp_path: Path) -> None:
    folder = edit_config(save_pico(tmp_path), pad_token_id=260)

    streamed = streamed_logits(folder, pico_tokens(1, 4))

    assert torch.equal(streamed, whole_logits(folder, pico_tokens(1, 4)))


@pytest.mark.parametrize("architecture", ["gemma3", "gpt_neo"])
def test_a_block_may_be_loaded_again(architecture: str, pico: Callable[..., Path]) -> None:
    skeleton = open_skeleton(pico(architecture))
    streamer = BlockStreamer(skeleton, CPU)
    hidden, layer_inputs = streamer.capture(pico_tokens())

    outputs = []
    for _ in range(2):
        with streamer.block(1) as block:
            outputs.append(block.run(hidden, layer_inputs[1]))

    assert torch.equal(*outputs)


def test_windows_of_a_batch_do_not_mix(pico: Callable[..., Path]) -> None:
    folder, tokens = pico("gemma2"), pico_tokens(4)

    one_by_one = torch.cat([streamed_logits(folder, row[None]) for row in tokens])

    assert torch.allclose(streamed_logits(folder, tokens), one_by_one, atol=1e-5)


def test_the_digest_is_of_the_bytes_of_the_block(tmp_path: Path) -> None:
    folder = save_pico(tmp_path / "a", "llama")
    other = save_edited(tmp_path / "b", lambda tensors: tensors[f"{UP}.weight"].view(-1)[3].add_(1))

    def digests(folder: Path) -> list[str]:
        streamer = BlockStreamer(open_skeleton(folder), CPU)
        found = []
        for number in range(2):
            with streamer.block(number) as block:
                found.append(block.digest)
        return found

    first, second, changed = digests(folder), digests(folder), digests(other)
    assert first == second
    assert first[0] != first[1]
    assert changed[0] == first[0]  # whatever the shards
    assert changed[1] != first[1]


def test_loading_leaves_transformers_settings_alone(
    pico: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    streamer = BlockStreamer(open_skeleton(pico("llama")), CPU)
    monkeypatch.setattr(logging, "_tqdm_active", True)
    for before in (None, "0"):
        if before is None:
            monkeypatch.delenv("HF_DEACTIVATE_ASYNC_LOAD", raising=False)
        else:
            monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", before)

        with streamer.block(0):
            pass

        assert os.environ.get("HF_DEACTIVATE_ASYNC_LOAD") == before
        assert logging.is_progress_bar_enabled()


def test_a_linear_replaced_runs_until_the_block_is_dropped(pico: Callable[..., Path]) -> None:
    skeleton = open_skeleton(pico("llama"))
    streamer = BlockStreamer(skeleton, CPU)
    hidden, layer_inputs = streamer.capture(pico_tokens())
    original = skeleton.block(0).get_submodule("mlp.up_proj")

    with streamer.block(0) as block:
        dense = block.run(hidden, layer_inputs[0])
        block.replace("mlp.up_proj", nn.Linear(32, 48))
        changed = block.run(hidden, layer_inputs[0])
        block.restore()
        restored = block.run(hidden, layer_inputs[0])
        block.replace("mlp.up_proj", nn.Linear(32, 48))

    assert not torch.equal(changed, dense)
    assert torch.equal(restored, dense)
    assert skeleton.block(0).get_submodule("mlp.up_proj") is original


def test_a_weight_may_be_dropped_before_its_block_and_is_there_again_in_the_next(
    pico: Callable[..., Path],
) -> None:
    skeleton = open_skeleton(pico("llama"))
    streamer = BlockStreamer(skeleton, CPU)
    hidden, layer_inputs = streamer.capture(pico_tokens())
    sites = {site.leaf: site for site in find_sites(skeleton, 0).linears}

    with streamer.block(0) as block:
        dense = block.run(hidden, layer_inputs[0])
        sites["up_proj"].free(block)
        assert sites["up_proj"].weight(block).is_meta
        assert not sites["gate_proj"].weight(block).is_meta
    with streamer.block(0) as block:
        assert torch.equal(block.run(hidden, layer_inputs[0]), dense)


# -- checkpoints that do not hold what the model needs


@pytest.mark.parametrize(
    ("architecture", "name"),
    [
        ("llama", "model.layers.1.self_attn.q_proj.weight"),
        ("llama", "model.layers.0.input_layernorm.weight"),
        ("opt", "model.decoder.layers.1.fc1.bias"),
        ("gpt_neox", "gpt_neox.layers.0.attention.dense.weight"),
    ],
)
def test_a_tensor_missing_from_a_block_is_named(
    tmp_path: Path, architecture: str, name: str
) -> None:
    folder = save_edited(tmp_path, dropping(name), architecture)

    with pytest.raises(MissingShardError, match=f"{name} is in no shard"):
        streamed_logits(folder, pico_tokens())


def test_a_missing_expert_is_found(tmp_path: Path) -> None:
    name = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
    folder = save_edited(tmp_path, dropping(name), "mixtral")

    with pytest.raises(CorruptShardError, match=r"model\.layers\.1\.mlp\.experts"):
        streamed_logits(folder, pico_tokens())


@pytest.mark.parametrize(
    ("architecture", "name"),
    [
        ("llama", "lm_head.weight"),
        ("llama", "model.norm.weight"),
        ("llama", "model.embed_tokens.weight"),
        ("opt", "model.decoder.embed_positions.weight"),
    ],
)
def test_a_tensor_missing_outside_of_the_blocks_is_named(
    tmp_path: Path, architecture: str, name: str
) -> None:
    folder = save_edited(tmp_path, dropping(name), architecture)

    with pytest.raises(MissingShardError, match=name):
        streamed_logits(folder, pico_tokens())


def test_tensors_that_the_model_does_not_know_are_left_alone(tmp_path: Path) -> None:
    ghost = torch.zeros(3)
    folder = save_edited(tmp_path, lambda tensors: tensors.update(ghost=ghost))

    assert [info.name for info in open_skeleton(folder).unclaimed] == ["ghost"]
    assert torch.equal(streamed_logits(folder, pico_tokens()), whole_logits(folder, pico_tokens()))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.up_proj.weight", "model.layers.0.input_layernorm.weight"]
)
def test_a_weight_that_is_not_finite_is_named(tmp_path: Path, name: str, value: float) -> None:
    folder = save_edited(tmp_path, spoiling(name, value))

    with pytest.raises(NonFiniteError, match=f"{name}: 2 of .* the checkpoint is damaged"):
        streamed_logits(folder, pico_tokens())


@pytest.mark.parametrize("name", ["lm_head.weight", "model.norm.weight"])
def test_a_weight_that_is_not_finite_is_named_also_outside_of_the_blocks(
    tmp_path: Path, name: str
) -> None:
    folder = save_edited(tmp_path, spoiling(name, float("nan")))

    with pytest.raises(NonFiniteError, match=name):
        streamed_logits(folder, pico_tokens())


def test_large_finite_weights_are_no_damage(tmp_path: Path) -> None:
    name = f"{UP}.weight"
    folder = save_edited(tmp_path, lambda tensors: tensors[name].fill_(60000), dtype=torch.float16)
    streamer = BlockStreamer(open_skeleton(folder), CPU)

    with streamer.block(1) as block:
        weight = block.module.get_parameter("mlp.up_proj.weight").detach()

    assert not weight.sum().isfinite()
    assert (weight == 60000).all()


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("llama", {"intermediate_size": 64}),
        ("llama", {"hidden_size": 64}),
        ("llama", {"num_key_value_heads": 1}),
        ("llama", {"vocab_size": 300}),
        ("opt", {"max_position_embeddings": 200}),
        ("mixtral", {"num_local_experts": 8}),
    ],
)
def test_a_config_of_other_shapes_is_refused(
    tmp_path: Path, architecture: str, settings: dict[str, int]
) -> None:
    folder = edit_config(save_pico(tmp_path, architecture), **settings)

    with pytest.raises(CorruptShardError, match="on disk, config.json makes it"):
        streamed_logits(folder, pico_tokens())


def test_a_config_of_more_blocks_is_refused(tmp_path: Path) -> None:
    folder = edit_config(save_pico(tmp_path), num_hidden_layers=3)

    with pytest.raises(MissingShardError, match=r"model\.layers\.2\."):
        streamed_logits(folder, pico_tokens())


def test_a_token_beyond_the_vocabulary_is_refused(pico: Callable[..., Path]) -> None:
    streamer = BlockStreamer(open_skeleton(pico("llama")), CPU)

    with pytest.raises(CorruptShardError, match="tokens 1 to 264 do not fit the 264 rows"):
        streamer.capture(torch.tensor([[1, 264]]))


def test_norms_of_a_wider_dtype_are_rounded_as_transformers_does(tmp_path: Path) -> None:
    def widen(tensors: dict[str, Tensor]) -> None:
        tensors.update({k: v.float() + 1e-4 for k, v in tensors.items() if "norm" in k})

    folder = save_edited(tmp_path, widen, dtype=torch.bfloat16)

    assert torch.equal(streamed_logits(folder, pico_tokens()), whole_logits(folder, pico_tokens()))


# -- compressed models


@pytest.mark.parametrize("form", ["uv", "pivot"])
def test_a_compressed_model_streams_like_the_product_of_its_factors(
    tmp_path: Path, form: str
) -> None:
    names, rank = ("model.layers.0.self_attn.q_proj", UP), 9
    random = torch.Generator().manual_seed(0)
    products: dict[str, Tensor] = {}

    def factor(tensors: dict[str, Tensor]) -> None:
        for name in names:
            weight = tensors.pop(f"{name}.weight")
            noise = torch.randn(len(weight), rank, dtype=torch.float64, generator=random)
            left = torch.linalg.qr(noise).Q
            parts = find_form(form)().encode(left, left.T @ weight.double(), torch.float32)
            module = MODULES[form](weight.shape[1], weight.shape[0], rank).requires_grad_(False)
            module.load_state_dict(parts)
            products[f"{name}.weight"] = module.dense_weight()
            tensors.update({f"{name}.{leaf}": part for leaf, part in parts.items()})

    folder = save_edited(tmp_path / "factored", factor)
    spec = {"form": form, "rank": rank, "dtype": "F32"}
    edit_config(
        folder,
        quantization_config={
            "quant_method": "streamcomp",
            "version": FORMAT_VERSION,
            "modules": dict.fromkeys(names, spec),
        },
    )
    dense = save_edited(tmp_path / "dense", lambda tensors: tensors.update(products))

    skeleton = open_skeleton(folder)
    assert skeleton.compressed
    assert isinstance(skeleton.model.get_submodule(UP), FactoredLinear)
    assert [info.name for info in skeleton.unclaimed] == []
    streamed = streamed_logits(folder, pico_tokens())
    assert torch.allclose(streamed, whole_logits(dense, pico_tokens()), atol=1e-5)


def test_factors_of_another_rank_than_the_config_says_are_refused(tmp_path: Path) -> None:
    folder = save_pico(tmp_path, shard_size="1GB")
    tensors = load_file(folder / SINGLE_FILE)
    tensors[f"{UP}.U"] = torch.zeros(48, 5)
    tensors[f"{UP}.weight"] = torch.zeros(5, 32)
    save_file(tensors, folder / SINGLE_FILE, metadata={"format": "pt"})
    modules = {UP: {"form": "uv", "rank": 6, "dtype": "F32"}}
    edit_config(
        folder,
        quantization_config={"quant_method": "streamcomp", "version": 1, "modules": modules},
    )

    with pytest.raises(CorruptShardError, match="in the checkpoint, the config makes it"):
        streamed_logits(folder, pico_tokens())
