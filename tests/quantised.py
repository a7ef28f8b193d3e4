"""Tiny models as they are downloaded in fp8 and mxfp4, each with the bf16 model it stands for."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from streamcomp.checkpoint.index import INDEX_FILE
from tests.pico import LONGEST, VOCABULARY, make_tokenizer, pico_config

BLOCK = (16, 16)
# Tensors to store instead of one, by their names, and what they decode to.
Encoded = tuple[dict[str, Tensor], Tensor]

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "max_position_embeddings": LONGEST,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
# What numbers of 4 bits stand for.
_FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def deepseek_config() -> Any:
    """Latent attention, of whose matrices one has partial blocks; experts in the second block."""
    return transformers.DeepseekV3Config(
        **_SIZES,
        hidden_size=32,
        intermediate_size=40,
        moe_intermediate_size=24,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_shared_experts=1,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
        num_key_value_heads=4,
    )


def gpt_oss_config() -> Any:
    """Fused experts whose inputs are groups of 32."""
    return transformers.GptOssConfig(
        **_SIZES,
        hidden_size=64,
        intermediate_size=32,
        num_local_experts=4,
        num_experts_per_tok=2,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=8,
    )


def save_fp8(
    folder: Path, plain: Path, config: Any = None, block: tuple[int, int] | None = BLOCK
) -> Path:
    """A model in block-scaled fp8 in ``folder``, which is returned, and decoded in ``plain``.

    Routers, head and embedding stay bf16, as in published models.
    """

    def encode(name: str, weight: Tensor) -> Encoded | None:
        if ".layers." not in name or not name.endswith("proj.weight"):
            return None
        codes, scales = to_fp8(weight, block)
        return {name: codes, f"{name}_scale_inv": scales}, from_fp8(codes, scales, block)

    quantization = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": None if block is None else list(block),
    }
    return _save(folder, plain, config or pico_config("llama"), quantization, encode)


def save_mxfp4(folder: Path, plain: Path) -> Path:
    """A gpt-oss with mxfp4 experts in ``folder``, which is returned, and decoded in ``plain``."""

    def encode(name: str, weight: Tensor) -> Encoded | None:
        if not name.endswith(("gate_up_proj", "down_proj")):
            return None
        blocks, scales = random_mxfp4(*weight.shape)
        stored = {f"{name}_blocks": blocks, f"{name}_scales": scales}
        return stored, from_mxfp4(blocks, scales)

    quantization = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router"],
    }
    return _save(folder, plain, gpt_oss_config(), quantization, encode)


def to_fp8(weight: Tensor, block: tuple[int, int] | None) -> tuple[Tensor, Tensor]:
    """Codes (m, n) and the factor of each block, or of the whole (), so that the largest fit."""
    rows, columns = block or weight.shape
    grid = math.ceil(weight.shape[0] / rows), math.ceil(weight.shape[1] / columns)
    codes, scales = torch.empty_like(weight, dtype=torch.float8_e4m3fn), torch.empty(grid)
    for place in torch.cartesian_prod(*map(torch.arange, grid)).tolist():
        part = _block(place, (rows, columns))
        scales[tuple(place)] = weight[part].float().abs().max() / 448
        codes[part] = (weight[part].float() / scales[tuple(place)]).to(torch.float8_e4m3fn)
    return codes, scales if block else scales.reshape(())


def from_fp8(codes: Tensor, scales: Tensor, block: tuple[int, int] | None) -> Tensor:
    """What they stand for, block by block."""
    weight, scales = codes.float(), scales.reshape(1, 1) if block is None else scales
    for place in torch.cartesian_prod(*map(torch.arange, scales.shape)).tolist():
        weight[_block(place, block or tuple(weight.shape))] *= scales[tuple(place)]
    return weight.to(torch.bfloat16)


def _block(place: list[int], block: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(at * size, (at + 1) * size) for at, size in zip(place, block, strict=True))


def random_mxfp4(experts: int, inputs: int, outputs: int) -> tuple[Tensor, Tensor]:
    """Blocks (experts, outputs, groups, 16) and scales (experts, outputs, groups) of bytes."""
    random = torch.Generator().manual_seed(experts + inputs + outputs)
    shape = experts, outputs, inputs // 32
    blocks = torch.randint(256, (*shape, 16), generator=random, dtype=torch.uint8)
    return blocks, torch.randint(119, 125, shape, generator=random, dtype=torch.uint8)


def from_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """What they stand for, (experts, inputs, outputs)."""
    pairs = torch.stack([blocks & 15, blocks >> 4], -1).flatten(-2)  # (..., groups, 32)
    weight = _FP4[pairs.long()] * 2.0 ** (scales.float() - 127)[..., None]
    return weight.flatten(-2).transpose(1, 2).contiguous().to(torch.bfloat16)


def _save(
    folder: Path,
    plain: Path,
    config: Any,
    quantization: dict[str, Any],
    encode: Callable[[str, Tensor], Encoded | None],
) -> Path:
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=random))
    model.save_pretrained(plain, max_shard_size="20KB")
    folder.mkdir(parents=True)
    weight_map: dict[str, str] = {}
    for shard in sorted(plain.glob("*.safetensors")):
        tensors = load_file(shard)
        stored: dict[str, Tensor] = {}
        for name, tensor in list(tensors.items()):
            encoded = encode(name, tensor)
            parts, tensors[name] = encoded or ({name: tensor}, tensor)
            stored |= parts
        save_file(stored, folder / shard.name, metadata={"format": "pt"})
        save_file(tensors, shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(stored, shard.name)
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    settings = json.loads((plain / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(settings | {"quantization_config": quantization})
    )
    for place in (folder, plain):
        make_tokenizer().save_pretrained(place)
    return folder
