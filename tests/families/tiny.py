"""A tiny model of every type of causal language model that transformers knows.

``tiny_config`` starts from the type's default config and makes all sizes small, by the names
that configs give them. What the default switches off (None, 0) stays off, and each kind of block
that the default mixes is there once. ``save_tiny`` writes the model with random weights as a
checkpoint folder with a tokenizer.
"""

from __future__ import annotations

import copy
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
)

from tests.pico import BOS, EOS, HIDDEN, LONGEST, VOCABULARY, make_tokenizer

__all__ = ["NotBuiltError", "causal_types", "default_model", "save_tiny", "tiny_config", "variants"]

_MOST_PARAMETERS = 3_000_000
_MOST_BLOCKS = 4
_FIRST_SPARE_TOKEN = EOS + 1  # tokens from here on are never made by the tokenizer

# The largest value of a size, and the names under which configs hold it.
_AT_MOST: dict[int, str] = {
    HIDDEN: """hidden_size n_embd d_model emb_dim embedding_dim embedding_size
        attention_hidden_size word_embed_proj_dim output_embedding_size lru_width
        hidden_size_global out_hidden_size backbone_hidden_size adapter_in_dim adapter_input_size
        adapter_out_dim vision_output_dim projector_input_dim projector_output_dim output_channels
        ple_embed_dim""",
    48: """intermediate_size n_inner ffn_dim decoder_ffn_dim encoder_ffn_dim dim_ff d_ff dff
        d_inner ffn_hidden_size feed_forward_size shared_intermediate_size mlp_dim
        intermediate_size_mlp dense_intermediate_size shared_experts_intermediate_size
        max_source_positions max_target_positions""",
    24: """moe_intermediate_size expert_ffn_hidden_size moe_shared_expert_intermediate_size
        shared_expert_intermediate_size""",
    16: """q_lora_rank kv_lora_rank o_lora_rank qk_head_dim rel_extent input_embedding_size
        num_position_embeddings router_hidden_size num_mel_bins feature_size input_size
        input_feat_size codebook_size codebook_dim conf_reduction_factor
        vector_quantization_hidden_dimension upsample_groups base_channels nemo_conv_channels
        ext_pw_out_channel depthwise_separable_out_channel downsample_hidden_size conv_output_size
        num_filters""",
    8: """head_dim attention_head_dim kv_channels dim_head d_head d_kv swa_head_dim v_head_dim
        qk_rope_head_dim qk_nope_head_dim index_head_dim attention_head_size index_topk
        sliding_window attention_window_size window_size local_attention sliding_window_size
        local_attention_window_len attention_chunk_size keep_window_size state_size mamba_d_state
        ssm_state_size mamba_headdim mamba_d_head mamba_head_dim mamba_n_heads mamba_num_heads
        n_mamba_heads chunk_size mamba_chunk_size linear_head_dim linear_key_head_dim
        linear_value_head_dim block_size index_block_size hidden_size_per_layer_input laurel_rank
        hc_lowrank image_size crop_size num_classes query_pre_attn_scalar num_buckets
        relative_attention_num_buckets relative_max_distance position_bias_num_buckets
        prompt_length segment_types prompt_types shape_embed_dim pronunciation_embed_dim
        make_ngram_vocab_size_divisible_by audio_vocab_size block_multiple_of
        ffn_round_up_to_multiple_of patch_size audio_soft_tokens_per_image
        vision_soft_tokens_per_image num_centroids""",
    4: """num_attention_heads num_attention_heads_per_layer n_head n_heads num_heads
        decoder_attention_heads attention_heads encoder_attention_heads num_decoder_attention_heads
        num_encoder_attention_heads swa_num_attention_heads conf_num_attention_heads
        num_query_groups linear_num_heads linear_num_value_heads num_experts num_local_experts
        n_routed_experts moe_num_experts rotary_dim mamba_dt_rank time_step_rank adapter_rank
        gated_norm_rank d_rel image_seq_length mm_tokens_per_image num_quantizers num_chroma
        prompt_mid_dim dim_model_base""",
    2: """num_key_value_heads num_kv_heads swa_num_key_value_heads kv_n_heads linear_num_key_heads
        num_experts_per_tok num_experts_per_token moe_topk moe_k moe_top_k top_k_experts n_group
        n_groups num_expert_group index_n_heads o_groups hc_mult hc_count mamba_n_groups
        index_topk_blocks heads_per_ngram split_ngram_parts zero_expert_num num_codebooks
        num_global_layers centroid_intermediate_top_k encoder_layers num_encoder_layers
        num_decoder_layers decoder_layers num_blocks depth conf_num_hidden_layers
        num_layers_per_stack n_layers_per_attn_res_block num_mem_blocks""",
    1: """topk_group first_k_dense_replace num_dense_layers num_shared_experts n_shared_experts
        moe_num_shared_experts ngram num_lstm_layers""",
    LONGEST: """max_position_embeddings n_positions max_seq_len n_ctx context_length
        original_max_position_embeddings model_max_length audio_chunk_size mem_len""",
    64: """shape_vocab_size pronunciation_vocab_size encoder_hash_byte_group_vocab
        ngram_vocab_size_base position_bias_max_distance""",
}
_LIMITS = {name: limit for limit, names in _AT_MOST.items() for name in names.split()}

_VOCABULARIES = ("vocab_size", "vocab_size_per_layer_input", "decoder_vocab_size")
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads")
_KEY_VALUE_HEADS = ("num_key_value_heads", "num_kv_heads")
# How configs count their blocks; the first that a config has is the count of the lists below it.
_DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_blocks")
# Lists of the blocks that are something, by their numbers.
_NUMBERED = (
    "cross_attention_layers",
    "full_attn_idxs",
    "global_attn_indexes",
    "hybrid_layer_ids",
    "intermediate_layers_indices",
    "mlp_only_layers",
    "moe_layers",
    "ple_layer_ids",
)
_BOOKKEEPING = (
    "model_type",
    "transformers_version",
    "architectures",
    "id2label",
    "label2id",
)

# What the names above cannot tell, by type.
_GEMMA_ASSISTANT = {
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": 0,
    "num_kv_shared_layers": 2,
}
# What its config demands of the other sizes.
_DOTS_NOTE = {"per_layer_config": {2: {"head_dim": 24, "num_key_value_heads": 4}}}
_QWEN4 = {
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
    "indexer_head_dim": 8,
    "indexer_kv_heads": 1,
    "indexer_n_heads": 2,
}
_SHARED_TRANSFORMER = {
    "num_hidden_layers": 4,
    "layers_block_type": ["mamba", "hybrid"] * 2,
    "attention_hidden_size": 2 * HIDDEN,
    "attention_head_dim": 16,
}
_OWN: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": {"rope_type": "default", "rope_theta": 1e5},
        },
    },
    "dbrx": {  # its router takes one size for the other in some releases: they are equal
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": HIDDEN},
    },
    "deepseek_v2": {"num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "dots1": {
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
    },
    "dots3_note": {"text_config": _DOTS_NOTE},
    "dots3_note_text": _DOTS_NOTE,
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n": {
        "text_config": {"num_kv_shared_layers": 2},
        "vision_config": {"architecture": "test_efficientnet"},  # the smallest of timm
    },
    "gemma3n_text": {"num_kv_shared_layers": 2},
    "gemma4": {
        "vision_config": {
            "model_type": "gemma4_vision",
            "hidden_size": HIDDEN,
            "intermediate_size": 48,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "head_dim": 8,
            "position_embedding_size": 16,
        },
        "audio_config": {
            "model_type": "gemma4_audio",
            "hidden_size": HIDDEN,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "subsampling_conv_channels": [8, 4],
            "output_proj_dims": HIDDEN,
        },
    },
    "gemma4_assistant": {"text_config": _GEMMA_ASSISTANT},
    "gemma4_unified_assistant": {"text_config": {"num_kv_shared_layers": 2}},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp": {"text_config": _QWEN4},
    "qwen4_exp_text": _QWEN4,
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"attn_layers": ["local", "local"], "axial_pos_embds": False, "is_decoder": True},
    # Its cache is right where no width has to be rounded up.
    "xlstm": {"hidden_size": 128, "embedding_dim": 128},
    "xmod": {"default_language": "en_XX"},
    "zamba": {**_SHARED_TRANSFORMER, "use_mamba_kernels": False},
    "zamba2": {**_SHARED_TRANSFORMER, "hybrid_layer_ids": [1, 3], "use_mem_rope": True},
}
# Settings of well-known models that the default config of their type does not have.
_VARIANTS: dict[str, dict[str, Any]] = {
    "bamba+recurrent": {"attn_layer_indices": None},  # without a block of attention
    "falcon+new": {"new_decoder_architecture": True, "multi_query": False},
    "gemma4_text+plain": {"hidden_size_per_layer_input": 0},
    "gemma4_text+experts": {
        "hidden_size_per_layer_input": 0,
        "enable_moe_block": True,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 24,
    },
    "gemma4_text+shared": {  # keys and values of the first blocks serve the last ones
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "per_layer_config": {1: {"head_dim": 16}, 3: {"head_dim": 16}},
        "num_kv_shared_layers": 2,
    },
    "gemma4+plain": {"text_config": {"hidden_size_per_layer_input": 0}},
    "glm_moe_dsa+shared": {"indexer_types": ["full", "shared"]},
    "mixtral+sliding": {"sliding_window": 8},
    "phi3+longrope": {
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "short_factor": [1.0, 1.1, 1.2, 1.3],
            "long_factor": [2.0, 2.1, 2.2, 2.3],
        },
        "original_max_position_embeddings": 8,  # so that the windows of the checks are long
    },
}
# What a default config must be given to be there at all.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "gemma4_assistant": {"text_config": {**_GEMMA_ASSISTANT, "num_kv_shared_layers": 30}},
}
# Encoders that are decoders when told.
_TOLD_TO_DECODE = (
    "bert",
    "bert-generation",
    "big_bird",
    "camembert",
    "data2vec-text",
    "electra",
    "ernie",
    "megatron-bert",
    "rembert",
    "roberta",
    "roberta-prelayernorm",
    "roc_bert",
    "roformer",
    "xlm-roberta",
    "xlm-roberta-xl",
    "xmod",
)


class NotBuiltError(Exception):
    """There is no tiny model of this type; the message says why."""


def causal_types() -> list[str]:
    """Every type of causal language model of the installed transformers."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def variants() -> list[str]:
    """Types with settings that their default config does not have: "type+variant"."""
    return [name for name in _VARIANTS if name.partition("+")[0] in causal_types()]


# -- the config --------------------------------------------------------------------------


def tiny_config(kind: str) -> PretrainedConfig:
    """The default config of a type or variant with all sizes small."""
    base = kind.partition("+")[0]
    changes = _shrunk(_default_config(base))
    if base in _TOLD_TO_DECODE:
        changes["is_decoder"] = True
    for own in (_OWN.get(base, {}), _VARIANTS.get(kind, {})):
        changes = _merged(changes, own)
    return CONFIG_MAPPING[base](**changes)


def _default_config(base: str) -> PretrainedConfig:
    return CONFIG_MAPPING[base](**_DEFAULTS.get(base, {}))


def _merged(changes: dict[Any, Any], own: dict[Any, Any]) -> dict[Any, Any]:
    """``changes`` with the values of ``own`` put in, dict by dict."""
    merged = dict(changes)
    for name, value in own.items():
        held = merged.get(name)
        if isinstance(value, dict) and isinstance(held, dict):
            merged[name] = _merged(held, value)
        else:
            merged[name] = value
    return merged


def _shrunk(config: PretrainedConfig) -> dict[str, Any]:
    """The settings of ``config`` that a tiny one has otherwise."""
    values = {k: v for k, v in config.to_dict().items() if k not in _BOOKKEEPING}
    spare = iter(range(_FIRST_SPARE_TOKEN, VOCABULARY))
    changes: dict[str, Any] = {}
    for name, value in values.items():
        held = config.__dict__.get(name)
        if isinstance(held, PretrainedConfig):
            changes[name] = {**_shrunk(held), "model_type": held.model_type}
        elif "rope" in name and isinstance(value, dict):
            changes[name] = _plain_rope(value)
        elif name.endswith(("token_id", "token_index")) and value is not None:
            changes[name] = _token(name, value, spare)
        elif name in _VOCABULARIES:
            changes[name] = VOCABULARY
        elif name in _LIMITS:
            changes[name] = _at_most(_LIMITS[name], value)
    _keep_as_many_key_value_heads(values, changes)
    changes |= _fewer_blocks(values)
    return changes


def _at_most(limit: int, value: Any) -> Any:
    """``value`` no larger than ``limit``; a list item by item, and what is no number as it is."""
    if isinstance(value, list):
        return [_at_most(limit, item) for item in value]
    return min(value, limit) if isinstance(value, int) and not isinstance(value, bool) else value


def _token(name: str, value: Any, spare: Iterator[int]) -> Any:
    """The number of a special token: one that the tokenizer makes, or else never makes."""
    if isinstance(value, list):
        return [_token(name, value[0], spare)]
    if name in ("bos_token_id", "decoder_start_token_id"):
        return BOS
    if name in ("eos_token_id", "sep_token_id", "forced_eos_token_id"):
        return EOS
    if name == "pad_token_id":
        return min(value, 1)
    return next(spare, VOCABULARY - 1)


def _plain_rope(value: dict[str, Any]) -> dict[str, Any]:
    """Rotary settings, per kind of block or for all, without lists as long as a head."""
    plain = copy.deepcopy(value)
    for part in (plain, *(item for item in plain.values() if isinstance(item, dict))):
        part.pop("mrope_section", None)
        if "short_factor" in part:
            theta = part.get("rope_theta", 10000.0)
            part.clear()
            part.update(rope_type="default", rope_theta=theta)
    return plain


def _keep_as_many_key_value_heads(values: dict[str, Any], changes: dict[str, Any]) -> None:
    """Attention without groups stays without groups."""
    heads = next((name for name in _HEADS if name in values), None)
    for name in _KEY_VALUE_HEADS:
        if heads and name in values and values[name] == values[heads]:
            changes[name] = changes[heads]


def _fewer_blocks(values: dict[str, Any]) -> dict[str, Any]:
    """Settings for the first block of each kind, and two blocks at least."""
    counts = [name for name in _DEPTHS if isinstance(values.get(name), int)]
    if not counts:
        return {}
    depth = values[counts[0]]
    lists = {
        name: value
        for name, value in values.items()
        if name not in _NUMBERED and isinstance(value, list) and len(value) == depth > 1
    }
    numbered = {name: values[name] for name in _NUMBERED if isinstance(values.get(name), list)}
    kinds: dict[str, int] = {}
    overrides = {int(number): part for number, part in values.get("per_layer_config", {}).items()}
    for number in range(depth):
        kind = [value[number] for value in lists.values()]
        member = [number in value for value in numbered.values()]
        kinds.setdefault(repr((kind, member, overrides.get(number))), number)
    chosen = _two_at_least(sorted(kinds.values())[:_MOST_BLOCKS], depth)
    changes: dict[str, Any] = {name: len(chosen) for name in counts}
    for name, value in lists.items():
        picked = [value[number] for number in chosen]
        changes[name] = _at_most(_LIMITS[name], picked) if name in _LIMITS else picked
    for name, value in numbered.items():
        changes[name] = [place for place, number in enumerate(chosen) if number in value]
    if overrides:
        changes["per_layer_config"] = {
            place: _shrunk_overrides(overrides[number], values)
            for place, number in enumerate(chosen)
            if number in overrides
        }
    return changes


def _shrunk_overrides(part: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """Settings of one block; what is larger there than elsewhere is twice as large."""
    shrunk = {}
    for name, value in part.items():
        larger = isinstance(value, int) and value > (values.get(name) or value)
        limit = _LIMITS.get(name)
        shrunk[name] = value if limit is None else _at_most(limit * (2 if larger else 1), value)
    return shrunk


def _two_at_least(chosen: Sequence[int], depth: int) -> list[int]:
    more = [number for number in range(depth) if number not in chosen]
    return sorted([*chosen, *more[: 2 - len(chosen)]]) if len(chosen) < 2 else list(chosen)


# -- the model ---------------------------------------------------------------------------


def save_tiny(kind: str, folder: Path) -> PreTrainedModel:
    """Save a tiny model of type ``kind`` and its tokenizer into ``folder``, and return it."""
    try:
        config = tiny_config(kind)
        model = _model(config)
    except ImportError as error:
        packages = sorted(set(re.findall(r"requires the (\w+) library", str(error))))
        raise NotBuiltError(f"needs {', '.join(packages) or error}: not installed") from error
    except Exception as error:  # whatever a config that fits nothing makes the model's code raise
        raise NotBuiltError(f"{type(error).__name__}: {' '.join(str(error).split())}") from error
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if parameters > _MOST_PARAMETERS:
        raise NotBuiltError(f"{parameters:,} parameters are left")
    fill(model)
    model.config.dtype = torch.float32
    model.save_pretrained(folder, max_shard_size="60KB")
    if model.config is not config:  # checkpoints hold the whole config
        config.dtype, config.architectures = torch.float32, [type(model).__name__]
        config.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return model


def default_model(kind: str) -> PreTrainedModel | None:
    """The model of type ``kind`` as large as its default config says, without weights.

    None of a variant, or where transformers cannot build it.
    """
    if kind in _VARIANTS:
        return None
    try:
        with torch.device("meta"):
            return _model(_default_config(kind))
    except Exception:  # whatever the model's code raises: some defaults lack a setting
        return None


def _model(config: PretrainedConfig) -> PreTrainedModel:
    """The causal language model of ``config``; some classes take the config's text part."""
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if model_class.config_class is config.sub_configs.get("text_config"):
        config = config.get_text_config()
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        return model_class(config).eval()


@torch.no_grad()
def fill(model: PreTrainedModel, seed: int = 0) -> None:
    """Random weights so large that every part of the model shows in the logits.

    A matrix makes about as large what it is given. Vectors (norms, biases, decays) get noise on
    top of what the model's own code has set.
    """
    random = torch.Generator().manual_seed(seed)
    for _, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=random)
        if parameter.dim() < 2:
            parameter.add_(0.1 * noise)
        else:
            columns = math.prod(parameter.shape[1:]) if parameter.dim() != 3 else parameter.shape[2]
            parameter.copy_(1.2 * max(columns, 8) ** -0.5 * noise)
    for buffer in model.buffers():  # limits of what a layer gives are infinite until it is trained
        if buffer.is_floating_point() and buffer.isinf().any():
            buffer.nan_to_num_(posinf=8.0, neginf=-8.0)
    embedding = model.get_input_embeddings()
    if getattr(embedding, "padding_idx", None) is not None:  # some models zero it on every load
        embedding.weight[embedding.padding_idx] = 0
