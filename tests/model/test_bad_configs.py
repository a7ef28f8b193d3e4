"""Configs from anybody: they choose nothing that runs, and nothing large is built from them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from streamcomp.errors import SourceError, StreamcompError, UnsupportedModelError
from streamcomp.model.settings import at_most, check_counts, runnable
from tests.jobs import run_cli
from tests.model.folders import edit_config, open_skeleton, save_edited
from tests.pico import save_pico
from tests.refusals import assert_refused

# -- what is followed --------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "attn_implementation",
        "_attn_implementation",
        "_attn_implementation_internal",
        "experts_implementation",
        "_experts_implementation",
    ],
)
@pytest.mark.parametrize(
    "value",
    [
        "flash_attention_2",
        "flex_attention",
        "paged|sdpa",
        "kernels-community/flash-attn",
        "org/kernel@main:forward",
        {"": "flex_attention", "text_config": "flex_attention"},
        ["sdpa"],
        7,
        True,
    ],
    ids=str,
)
def test_an_implementation_that_is_not_torch_s_is_dropped_wherever_it_is(
    name: str, value: Any
) -> None:
    inner = {name: value, "size": 3}
    settings = {name: value, "text_config": inner, "towers": [inner, [inner]]}

    kept, notes = runnable(settings)

    assert kept == {"text_config": {"size": 3}, "towers": [{"size": 3}, [{"size": 3}]]}
    assert len(notes) == 1 and "torch's own is used instead" in notes[0]
    assert settings["text_config"] == {name: value, "size": 3}  # the config itself stays


def test_torch_s_own_implementations_are_followed() -> None:
    settings = {"attn_implementation": "eager", "text_config": {"experts_implementation": "eager"}}

    assert runnable(settings) == (settings, ())


@pytest.mark.parametrize(
    "name",
    ["auto_map", "quantization_config", "torch_dtype", "dtype", "num_labels", "id2label"],
)
@pytest.mark.parametrize("value", ["os", 10**9, {"a": "evil--code.py"}, None, ["x"]], ids=str)
def test_settings_that_decide_nothing_here_are_not_handed_on(
    name: str, value: Any, tmp_path: Path
) -> None:
    assert runnable({name: value, "text_config": {name: value}}) == ({"text_config": {}}, ())
    if name != "quantization_config":
        folder = edit_config(save_pico(tmp_path), **{name: value})
        assert open_skeleton(folder).dtype == torch.float32


def test_a_tower_is_fetched_from_nowhere_and_loads_no_file() -> None:
    tower = {
        "architecture": "hf-hub:org/model",
        "use_pretrained_backbone": True,
        "model_args": {"checkpoint_path": "weights.pth", "features_only": True, "depths": [1, 2]},
    }

    kept, notes = runnable({"vision_config": tower})

    assert kept == {"vision_config": {"model_args": {"features_only": True, "depths": [1, 2]}}}
    assert notes == (
        "config.json asks for architecture 'hf-hub:org/model': its default is used instead",
    )
    named = {"architecture": "mobilenetv5_300m.gemma_3n"}
    assert runnable(named) == (named, ())


# -- sizes -------------------------------------------------------------------------------


def refused(folder: Path, **settings: Any) -> StreamcompError:
    """The error for a pico model with these settings, in one line."""
    with pytest.raises((SourceError, UnsupportedModelError)) as caught:
        open_skeleton(edit_config(folder, **settings))
    assert str(caught.value).count("\n") == 0 and len(str(caught.value)) < 1500
    return caught.value


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, and the shards hold 21 "),
        ({"num_hidden_layers": 100_000}, "num_hidden_layers is 100000"),
        ({"num_hidden_layers": 1000}, "layers|is in no shard"),
        ({"num_hidden_layers": -1}, "blocks|layers"),
        ({"num_hidden_layers": 1e9}, "num_hidden_layers|float"),
        ({"num_hidden_layers": 10**400}, "num_hidden_layers is 10000"),
        ({"text_config": {"depth": 10**9}}, "depth is 1000000000"),
        ({"vocab_size": 0}, "embed_tokens|vocab_size|[Pp]adding"),
        ({"vocab_size": -5}, "vocab_size is -5"),
        ({"vocab_size": 2**62}, "embed_tokens|vocab_size|parameters|RuntimeError"),
        ({"vocab_size": 2**63}, "vocab_size is 9223372036854775808"),
        ({"hidden_size": 2**40}, "parameters|head_dim|hidden_size"),
        ({"hidden_size": 0}, "hidden_size|[Hh]eads|on disk"),
        ({"intermediate_size": 10**9}, "parameters"),
        (
            {"intermediate_size": 64},
            r"\[(48, 32|32, 48)\] on disk, config.json makes it \[",
        ),
        ({"intermediate_size": -1}, "intermediate_size is -1"),
        ({"num_attention_heads": -4}, "num_attention_heads|on disk"),
        ({"num_attention_heads": 0}, "num_attention_heads|on disk"),
        ({"num_key_value_heads": 0}, "num_key_value_heads|on disk"),
        ({"head_dim": 2**33}, "parameters|tables"),
        ({"head_dim": 0}, "head_dim|on disk"),
        ({"pad_token_id": 10**6}, "pad_token_id|[Pp]adding"),
        ({"hidden_act": "x"}, "hidden_act is 'x'"),
        ({"hidden_act": ["silu"]}, "hidden_act"),
        ({"hidden_size": "32"}, "hidden_size"),
        ({"rope_parameters": {"rope_type": "x"}}, "rope_type|'x'"),
        ({"rope_parameters": []}, "rope|list"),
        ({"text_config": "x"}, "text_config|str"),
        ({"get_text_config": 3}, "'get_text_config' is no setting"),
        ({"__class__": "x"}, "'__class__' is no setting"),
        ({"self": "x"}, "self"),
        ({"model_type": ["llama"]}, "names no model_type"),
        ({"model_type": {"a": 1}}, "names no model_type"),
        ({"model_type": "x" * 10_000}, "is unknown to transformers"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_config_beyond_its_shards_is_refused_by_the_setting(
    settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    error = refused(save_pico(tmp_path), **settings)

    assert re.search(message, str(error)), error


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_layer": 10**9}, "n_layer is 1000000000"),
        ({"n_positions": 10**8}, "tables of .* that are in no checkpoint"),
        ({"rotary_dim": 10**9}, "."),
        ({"n_head": 0}, "n_head is 0|n_head"),
    ],
)
def test_tables_that_no_checkpoint_holds_are_bounded(
    settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    error = refused(save_pico(tmp_path, "codegen"), **settings)

    assert re.search(message, str(error)), error


def test_counts_that_fit_the_shards_are_no_fault(tmp_path: Path) -> None:
    settings = {
        "num_hidden_layers": 90,
        "vocab_size": 300_000,
        "vision_feature_layer": -2,
        "hidden_size_per_layer": 16_384,
        "block_size": 16_384,
        "rope_theta": 10**11,
        "depths": [2, 2, 18, 2],
    }

    check_counts(tmp_path, settings, LlamaConfig, 20)
    with pytest.raises(SourceError, match="depths is 5000"):
        check_counts(tmp_path, {"depths": [2, 5000]}, LlamaConfig, 20)


def test_building_stops_where_there_are_many_more_parts_than_tensors() -> None:
    def build(layers: int) -> Callable[[], object]:
        return lambda: [torch.nn.Linear(1, 1, device="meta") for _ in range(layers)]

    with at_most(0):
        build(5000)()
    with pytest.raises(UnsupportedModelError, match="many more layers than the 0"), at_most(0):
        build(50_000)()
    build(20_000)()  # counted no more


def test_whatever_transformers_raises_is_one_refusal(
    pico: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = pico("llama")
    for error in (
        RuntimeError("negative dimension"),
        KeyError("silu"),
        ZeroDivisionError(),
        AssertionError(),
        OverflowError("too large\nsecond line"),
        RecursionError(),
        MemoryError(),
        AttributeError("'str' object has no attribute 'x'"),
    ):

        def fail(*_: Any, error: Exception = error, **__: Any) -> None:
            raise error

        monkeypatch.setattr(AutoModelForCausalLM, "from_config", fail)
        with pytest.raises(UnsupportedModelError, match=type(error).__name__) as caught:
            open_skeleton(folder)
        assert "\n" not in str(caught.value)


# -- shapes ------------------------------------------------------------------------------


def transpose_the_head(tensors: dict[str, Any]) -> None:
    tensors["lm_head.weight"] = tensors["lm_head.weight"].T.contiguous()


def transpose_a_linear(tensors: dict[str, Any]) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name] = tensors[name].T.contiguous()


def add_axes(tensors: dict[str, Any]) -> None:
    name = "model.embed_tokens.weight"
    tensors[name] = tensors[name][..., None, None]


def add_64_axes(tensors: dict[str, Any]) -> None:
    name = "model.norm.weight"
    tensors[name] = tensors[name].reshape(*[1] * 63, 32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (transpose_the_head, r"lm_head.weight is \[32, 264\] on disk, config.json makes it \[264"),
        (transpose_a_linear, r"layers.1.mlp.down_proj.weight is \[48, 32\] on disk"),
        (add_axes, r"embed_tokens.weight is \[264, 32, 1, 1\] on disk"),
        (add_64_axes, r"norm.weight is \[1, 1, "),
    ],
)
def test_a_tensor_of_another_shape_is_refused_by_plan_and_inspect(
    change: Callable[[dict[str, Any]], None], message: str, tmp_path: Path
) -> None:
    model = save_edited(tmp_path / "model", change)

    assert_refused(run_cli("plan", model, "--seq-len", 16, "--threads", 1), 3, message)
    assert_refused(run_cli("inspect", model), 3, message)


def test_an_embedding_that_is_also_the_head_has_the_head_s_shape(tmp_path: Path) -> None:
    model = save_pico(tmp_path, tie=True)
    assert len(open_skeleton(model).ties) == 1

    config = json.loads((model / "config.json").read_text())
    edit_config(model, vocab_size=config["vocab_size"] + 1)
    with pytest.raises(SourceError, match=r"embed_tokens.weight is \[264, 32\] on disk"):
        open_skeleton(model)


def forget_an_expert(tensors: dict[str, Any]) -> None:
    for name in list(tensors):
        if ".experts.3." in name and name.startswith("model.layers.1."):
            del tensors[name]


def forget_one_matrix_of_an_expert(tensors: dict[str, Any]) -> None:
    name = next(n for n in tensors if ".layers.1." in n and ".experts.3." in n)
    del tensors[name]


def widen_one_expert(tensors: dict[str, Any]) -> None:
    name = next(n for n in tensors if ".layers.1." in n and ".experts.3." in n)
    tensors[name] = tensors[name].repeat(2, 1)


@pytest.mark.parametrize(
    "change", [forget_an_expert, forget_one_matrix_of_an_expert, widen_one_expert]
)
def test_experts_that_do_not_make_their_parameter_are_refused(
    change: Callable[[dict[str, Any]], None], tmp_path: Path
) -> None:
    model = save_edited(tmp_path, change, "mixtral")

    with pytest.raises(SourceError, match=r"layers\.1\..*(on disk|shapes)"):
        open_skeleton(model)


def test_checking_shapes_leaves_the_model_as_it_was(pico: Callable[..., Path]) -> None:
    skeleton = open_skeleton(pico("mixtral"))
    before = {name: id(value) for name, value in skeleton.model.named_parameters()}

    skeleton._check_shapes()

    assert {name: id(value) for name, value in skeleton.model.named_parameters()} == before
    assert all(value.is_meta for value in skeleton.model.parameters())


def test_what_transformers_raises_is_not_logged_as_well(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = edit_config(save_pico(tmp_path), sub_configs=["x"])

    assert_refused(run_cli("inspect", folder), 3, "config.json is not valid")

    assert capfd.readouterr().err == ""
