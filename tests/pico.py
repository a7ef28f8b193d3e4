"""Pico models, made on the fly: two blocks, 32 hidden, every byte a token.

``save_pico`` writes what a model downloaded from the hub looks like: config, sharded
safetensors and a tokenizer. Weights are random but seeded, and so large (std 0.2) that every
part of the model shows in the logits.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

ARCHITECTURES = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3",
    "phi3",
    "opt",
    "gpt_neox",
    "gpt2",  # whose linears are stored transposed
    "mixtral",
)

# Their blocks return tuples, and hold buffers that no checkpoint has.
UNUSUAL = ("gpt_neo", "codegen")
# Their blocks return tuples.
TUPLES = (*UNUSUAL, "bloom", "mpt")

# Their experts go through transformers' interface.
MIXTURES = (
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "qwen3_next",
    "qwen3_5_moe_text",
    "olmoe",
    "glm4_moe",
    "deepseek_v2",
    "deepseek_v3",
    "gpt_oss",
    "granitemoe",
    "minimax_m2",
    "ernie4_5_moe",
)

VOCABULARY = 264  # 256 bytes, BOS, EOS and six that the tokenizer never makes
BOS, EOS = 256, 257
HIDDEN = 32
LONGEST = 128  # positions

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "max_position_embeddings": LONGEST,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": 0,
}
_GROUPED: dict[str, Any] = {**_COMMON, "num_key_value_heads": 2, "head_dim": 8}
_WITHOUT_FEED_FORWARD = {k: v for k, v in _COMMON.items() if k != "intermediate_size"}


# By the names that mixtures have for them: experts, experts of a token, and their inner channels.
_MIXTURE: dict[str, Any] = {
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k"), 2),
    "moe_intermediate_size": 24,
}
_LATENT: dict[str, Any] = {
    "q_lora_rank": 12,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "head_dim": 4,
    "first_k_dense_replace": 1,
}
_LINEAR_ATTENTION: dict[str, Any] = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "shared_expert_intermediate_size": 24,
}
_OWN: dict[str, dict[str, Any]] = {
    "qwen2_moe": {"shared_expert_intermediate_size": 24},
    "qwen3_moe": {},
    "qwen3_next": _LINEAR_ATTENTION,
    "qwen3_5_moe_text": _LINEAR_ATTENTION,
    "olmoe": {},
    "glm4_moe": {"first_k_dense_replace": 1},
    "deepseek_v2": {**_LATENT, "n_group": 1, "topk_group": 1, "num_key_value_heads": 4},
    "deepseek_v3": {**_LATENT, "n_group": 2, "topk_group": 1, "num_key_value_heads": 4},
    "gpt_oss": {"sliding_window": 8},
    "granitemoe": {},
    "minimax_m2": {"rotary_dim": 4},
    "ernie4_5_moe": {"moe_layer_start_index": 1},
}


def pico_config(architecture: str, *, blocks: int = 2, tie: bool = False) -> Any:
    """The config of a pico model of ``architecture``, of ``ARCHITECTURES`` or ``TUPLES``."""
    depth = {"num_hidden_layers": blocks, "tie_word_embeddings": tie}
    kinds = ["sliding_attention", "full_attention"] * blocks
    match architecture:
        case "llama":
            return transformers.LlamaConfig(**_GROUPED, **depth)
        case "mistral":
            return transformers.MistralConfig(**_GROUPED, **depth, sliding_window=8)
        case "qwen2":
            grouped = {k: v for k, v in _GROUPED.items() if k != "head_dim"}
            return transformers.Qwen2Config(**grouped, **depth)
        case "qwen3":
            return transformers.Qwen3Config(**_GROUPED, **depth)
        case "gemma2":
            return transformers.Gemma2Config(**_GROUPED, **depth, sliding_window=8)
        case "gemma3":
            return transformers.Gemma3TextConfig(
                **_GROUPED, **depth, sliding_window=8, layer_types=kinds[:blocks]
            )
        case "phi3":
            grouped = {k: v for k, v in _GROUPED.items() if k != "head_dim"}
            return transformers.Phi3Config(**grouped, **depth)
        case "opt":
            return transformers.OPTConfig(
                **_WITHOUT_FEED_FORWARD, **depth, ffn_dim=48, word_embed_proj_dim=HIDDEN
            )
        case "gpt_neox":
            return transformers.GPTNeoXConfig(**_COMMON, **depth)
        case "gpt2":
            return transformers.GPT2Config(
                vocab_size=VOCABULARY,
                n_embd=HIDDEN,
                n_inner=48,
                n_head=4,
                n_layer=blocks,
                n_positions=LONGEST,
                bos_token_id=BOS,
                eos_token_id=EOS,
                tie_word_embeddings=tie,
            )
        case "mixtral":
            return transformers.MixtralConfig(**_GROUPED, **depth, num_local_experts=4)
        case "gpt_neo":
            return transformers.GPTNeoConfig(
                **{k: v for k, v in _COMMON.items() if k != "num_attention_heads"},
                num_heads=4,
                num_layers=blocks,
                tie_word_embeddings=tie,
                attention_types=[[["global", "local"], blocks // 2]],
                window_size=8,
            )
        case "codegen":
            return transformers.CodeGenConfig(
                vocab_size=VOCABULARY,
                n_embd=HIDDEN,
                n_inner=48,
                n_head=4,
                n_layer=blocks,
                n_positions=LONGEST,
                rotary_dim=4,
                bos_token_id=BOS,
                eos_token_id=EOS,
                tie_word_embeddings=tie,
            )
        case "bloom":
            return transformers.BloomConfig(
                vocab_size=VOCABULARY,
                hidden_size=HIDDEN,
                n_layer=blocks,
                n_head=4,
                bos_token_id=BOS,
                eos_token_id=EOS,
                tie_word_embeddings=tie,
            )
        case "mpt":
            return transformers.MptConfig(
                vocab_size=VOCABULARY,
                d_model=HIDDEN,
                n_layers=blocks,
                n_heads=4,
                max_seq_len=LONGEST,
                tie_word_embeddings=tie,
            )
    if architecture in MIXTURES:
        settings = {**_GROUPED, **depth, **_MIXTURE, **_OWN[architecture]}
        return transformers.CONFIG_MAPPING[architecture](**settings)
    raise ValueError(f"no pico model of architecture {architecture!r}")


def make_pico(
    architecture: str = "llama",
    *,
    dtype: torch.dtype = torch.float32,
    tie: bool = False,
    blocks: int = 2,
    seed: int = 0,
) -> PreTrainedModel:
    """A pico model in memory. In a narrower dtype the same weights are rounded."""
    config = pico_config(architecture, blocks=blocks, tie=tie)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            parameter.normal_(std=0.2, generator=random)
    # Not model.to(dtype): that would round the rotary frequencies, which loading does not.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    return model


def make_tokenizer(*, bos: bool = False) -> PreTrainedTokenizerFast:
    """One token a byte; with ``bos`` every text is opened by a BOS token."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate(letters)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", BOS)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def save_pico(
    folder: Path,
    architecture: str = "llama",
    *,
    dtype: torch.dtype = torch.float32,
    tie: bool = False,
    blocks: int = 2,
    shard_size: str = "20KB",
    seed: int = 0,
    bos: bool = False,
) -> Path:
    """Save a pico model and its tokenizer into ``folder``, which is returned.

    The default ``shard_size`` spreads each block over several shards; ``"1GB"`` makes a
    single file.
    """
    model = make_pico(architecture, dtype=dtype, tie=tie, blocks=blocks, seed=seed)
    model.save_pretrained(folder, max_shard_size=shard_size)
    make_tokenizer(bos=bos).save_pretrained(folder)
    return folder


def pico_text(path: Path, tokens: int, *, seed: int = 0) -> Path:
    """Write lines of random words to ``path``, ``tokens`` tokens (= bytes) of them."""
    random = torch.Generator().manual_seed(seed)
    letters = torch.randint(97, 123, (tokens,), generator=random)
    shape = torch.rand(tokens, generator=random)
    letters[shape < 0.2] = ord(" ")
    letters[shape < 0.02] = ord("\n")
    path.write_bytes(bytes(letters.tolist()))
    return path


def pico_tokens(windows: int = 3, seq_len: int = 16, *, seed: int = 0) -> Tensor:
    """Random tokens (windows, seq), int64."""
    random = torch.Generator().manual_seed(seed)
    return torch.randint(VOCABULARY, (windows, seq_len), generator=random)


@torch.no_grad()
def whole_logits(folder: Path, tokens: Tensor) -> Tensor:
    """Logits (windows, seq, vocabulary) of the model as transformers itself loads it."""
    model: nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    for parameter in model.parameters():
        # Views of the file's map lie at odd addresses, and BLAS rounds by the address.
        parameter.data = parameter.data.clone()
    logits: Tensor = model(input_ids=tokens, use_cache=False).logits
    return logits
