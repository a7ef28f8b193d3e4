"""Checkpoints of the shapes of well-known models, with random weights or without any.

    python benchmarks/shapes.py Llama-3-70B out/70b --blocks 2
    python benchmarks/shapes.py Llama-3-70B out/70b-headers --headers-only
    python benchmarks/shapes.py gpt-oss-120b out/gpt-oss --blocks 1

Peak memory and seconds per block depend on shapes alone, so that a few blocks of random weights
stand for a model that nobody has to download. Mixtures have the names and the encoding that they
have on the hub: DeepSeek-V3 is in fp8 with a scale for each 128 x 128 weights, gpt-oss in mxfp4.
With ``--headers-only`` the files are sparse: they have headers and lengths, and take no disk; that
is all ``streamcomp plan`` reads. The tokenizer knows bytes.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedTokenizerFast,
)
from transformers.core_model_loading import revert_weight_conversion

# hidden, feed-forward, heads, key-value heads, vocabulary, blocks
SHAPES = {
    "TinyLlama-1.1B": (2048, 5632, 32, 4, 32000, 22),
    "Llama-2-7B": (4096, 11008, 32, 32, 32000, 32),
    "Llama-3-8B": (4096, 14336, 32, 8, 128256, 32),
    "Llama-3-70B": (8192, 28672, 64, 8, 128256, 80),
    "Llama-3.1-405B": (16384, 53248, 128, 8, 128256, 126),
}
POSITIONS = 8192
# Mixtures: type, blocks, vocabulary, and settings of their config.
MIXTURES: dict[str, tuple[str, int, int, dict[str, Any]]] = {
    "Qwen3-30B-A3B": ("qwen3_moe", 48, 151936, {
        "hidden_size": 2048, "moe_intermediate_size": 768, "intermediate_size": 6144,
        "num_experts": 128, "num_experts_per_tok": 8, "num_attention_heads": 32,
        "num_key_value_heads": 4, "head_dim": 128, "norm_topk_prob": True,
    }),
    "Qwen3-235B-A22B": ("qwen3_moe", 94, 151936, {
        "hidden_size": 4096, "moe_intermediate_size": 1536, "intermediate_size": 12288,
        "num_experts": 128, "num_experts_per_tok": 8, "num_attention_heads": 64,
        "num_key_value_heads": 4, "head_dim": 128, "norm_topk_prob": True,
    }),
    "Mixtral-8x7B": ("mixtral", 32, 32000, {
        "hidden_size": 4096, "intermediate_size": 14336, "num_local_experts": 8,
        "num_experts_per_tok": 2, "num_attention_heads": 32, "num_key_value_heads": 8,
    }),
    "gpt-oss-120b": ("gpt_oss", 36, 201088, {
        "hidden_size": 2880, "intermediate_size": 2880, "num_local_experts": 128,
        "num_experts_per_tok": 4, "num_attention_heads": 64, "num_key_value_heads": 8,
        "head_dim": 64, "sliding_window": 128,
    }),
    "DeepSeek-V3": ("deepseek_v3", 61, 129280, {
        "hidden_size": 7168, "moe_intermediate_size": 2048, "intermediate_size": 18432,
        "n_routed_experts": 256, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4,
        "num_attention_heads": 128, "num_key_value_heads": 128, "first_k_dense_replace": 3,
    }),
}  # fmt: skip
# How the hub's checkpoints are encoded, where not in bf16, and which matrices are.
_ENCODED = {
    "deepseek_v3": r"_proj(_with_mqa)?\.weight$|q_[ab]_proj|kv_b_proj",
    "gpt_oss": r"experts\.\w+_proj$",
}
_QUANTIZATION: dict[str, dict[str, Any]] = {
    "deepseek_v3": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128],
                    "activation_scheme": "dynamic"},
    "gpt_oss": {"quant_method": "mxfp4"},
}  # fmt: skip
_BLOCK, _GROUP = 128, 32  # rows and columns that share a scale, in fp8; numbers that do, in mxfp4


def make_shape(
    name: str,
    folder: Path,
    blocks: int = 0,
    *,
    experts: int = 0,
    headers_only: bool = False,
    seed: int = 0,
) -> Path:
    """The checkpoint ``folder`` of shape ``name`` with ``blocks`` blocks (0: as many as it has).

    A mixture has so many ``experts`` (0: its own). One file per block and one for what lies in
    none; weights are bf16, normal with deviation 1/sqrt(columns), or as they are encoded on the
    hub. Holds the largest tensor.
    """
    config = _config(name, blocks, experts)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        state = revert_weight_conversion(model, model.state_dict())
    kind = config.model_type
    folder.mkdir(parents=True, exist_ok=True)
    random = torch.Generator().manual_seed(seed)
    index: dict[str, str] = {}
    for file, shapes in _files(state):
        path = folder / f"{file}.safetensors"
        stored = {key: part for k, shape in shapes.items() for key, part in _stored(kind, k, shape)}
        _write(path, stored, None if headers_only else random)
        index |= dict.fromkeys(stored, path.name)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": index})
    )
    config.save_pretrained(folder)
    if kind in _QUANTIZATION:
        path = folder / "config.json"
        settings = json.loads(path.read_text()) | {"quantization_config": _QUANTIZATION[kind]}
        path.write_text(json.dumps(settings))
    _byte_tokenizer().save_pretrained(folder)
    return folder


def _files(state: dict[str, torch.Tensor]) -> Iterator[tuple[str, dict[str, tuple[int, ...]]]]:
    """File name -> names and shapes of its tensors."""
    files: dict[str, dict[str, tuple[int, ...]]] = {}
    for key, value in state.items():
        number = key.partition("layers.")[2].partition(".")[0]
        file = f"block-{int(number):03d}" if number else key.partition(".weight")[0]
        files.setdefault(file, {})[key] = tuple(value.shape)
    yield from files.items()


Stored = tuple[str, tuple[int, ...]]  # dtype, as safetensors names it, and shape


def _config(name: str, blocks: int, experts: int) -> Any:
    common: dict[str, Any] = {
        "max_position_embeddings": POSITIONS,
        "tie_word_embeddings": False,
        "bos_token_id": 256,
        "eos_token_id": 257,
        "dtype": "bfloat16",
    }
    if name in SHAPES:
        hidden, feed_forward, heads, kv_heads, vocabulary, depth = SHAPES[name]
        return LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=feed_forward,
            num_hidden_layers=blocks or depth,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            architectures=["LlamaForCausalLM"],
            **common,
        )
    kind, depth, vocabulary, settings = MIXTURES[name]
    settings = dict(settings)
    if blocks and "first_k_dense_replace" in settings:
        settings["first_k_dense_replace"] = 0  # a few blocks stand for most: those with experts
    for count in ("num_experts", "num_local_experts", "n_routed_experts"):
        if experts and count in settings:
            settings[count] = experts
    return CONFIG_MAPPING[kind](
        vocab_size=vocabulary, num_hidden_layers=blocks or depth, **settings, **common
    )


def _stored(kind: str, key: str, shape: tuple[int, ...]) -> Iterator[tuple[str, Stored]]:
    """The tensors on disk of one parameter."""
    if not re.search(_ENCODED.get(kind, "$^"), key):
        yield key, ("BF16", shape)
    elif kind == "gpt_oss":
        experts, inputs, outputs = shape
        groups = (experts, outputs, inputs // _GROUP)
        yield f"{key}_blocks", ("U8", (*groups, _GROUP // 2))
        yield f"{key}_scales", ("U8", groups)
    else:
        yield key, ("F8_E4M3", shape)
        scales = tuple(-(-size // _BLOCK) for size in shape)
        yield f"{key}_scale_inv", ("F32", scales)


def _tensor(key: str, dtype: str, shape: tuple[int, ...], random: torch.Generator) -> torch.Tensor:
    if dtype == "U8":
        if key.endswith("_scales"):
            return torch.full(shape, 121, dtype=torch.uint8)  # 2**-6
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=random)
    if dtype == "F32":
        return torch.full(shape, _BLOCK**-1.0 / 8)
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    if dtype == "F8_E4M3":
        return (
            torch.empty(shape, dtype=torch.bfloat16)
            .normal_(generator=random)
            .to(torch.float8_e4m3fn)
        )
    weight = torch.empty(shape, dtype=torch.bfloat16)
    return weight.normal_(0.0, shape[-1] ** -0.5, generator=random)


def _write(path: Path, tensors: dict[str, Stored], random: torch.Generator | None) -> None:
    """Write a safetensors file of random weights, or, without ``random``, a sparse one."""
    sizes = {"BF16": 2, "F32": 4, "U8": 1, "F8_E4M3": 1}
    header, offset = {}, 0
    for key, (dtype, shape) in tensors.items():
        size = sizes[dtype] * int(torch.Size(shape).numel())
        header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for key, stored in tensors.items() if random is not None else ():
            assert random is not None
            file.write(_tensor(key, *stored, random).view(-1).view(torch.uint8).numpy().data)
        file.truncate(8 + len(text) + offset)


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: place for place, letter in enumerate([*letters, "<s>", "</s>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 256)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("shape", choices=[*SHAPES, *MIXTURES])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--blocks", type=int, default=0, help="0: as many as the model has")
    parser.add_argument("--experts", type=int, default=0, help="of a mixture; 0: its own")
    parser.add_argument("--headers-only", action="store_true", help="sparse files without weights")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    make_shape(
        options.shape,
        options.folder,
        options.blocks,
        experts=options.experts,
        headers_only=options.headers_only,
    )


if __name__ == "__main__":
    main()
