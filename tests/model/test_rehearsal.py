"""What one forward without weights shows of a model, and which models it refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.models.llama import modeling_llama as llama

import streamcomp
from streamcomp.errors import UnsupportedModelError
from streamcomp.model.sites import find_sites
from tests.families.tiny import causal_types, save_tiny
from tests.jobs import RESOURCES, quick_plan, small_recipe
from tests.model.folders import edit_config, open_skeleton, streamed_logits
from tests.pico import HIDDEN, pico_tokens, save_pico, whole_logits


def left(folder: Path, block: int = 0) -> dict[str, str]:
    skeleton = open_skeleton(folder)
    prefix = skeleton.block_name(block) + "."
    reasons = find_sites(skeleton, block).left
    return {name.removeprefix(prefix): reason for name, reason in reasons.items()}


def eligible(folder: Path, block: int = 0) -> set[str]:
    return {linear.name for linear in find_sites(open_skeleton(folder), block).eligible}


def refusal(folder: Path) -> str:
    """The one message with which inspect and plan refuse a model."""
    with pytest.raises(UnsupportedModelError) as by_inspect:
        streamcomp.inspect(folder)
    with pytest.raises(UnsupportedModelError) as by_plan, quick_plan():
        streamcomp.plan(folder, small_recipe(__file__), RESOURCES)
    assert str(by_plan.value) == str(by_inspect.value)
    return str(by_plan.value)


# -- linears that are called


def test_a_linear_whose_weight_is_read_directly_stays_dense(tmp_path: Path) -> None:
    save_tiny("mamba", tmp_path)  # dt_proj.weight @ time_step

    assert left(tmp_path)["mixer.dt_proj"] == "its weight is read by other code"
    assert eligible(tmp_path) == {"mixer.in_proj", "mixer.x_proj", "mixer.out_proj"}


def test_what_code_does_not_show_a_run_without_data_does(
    monkeypatch: pytest.MonkeyPatch, pico: Callable[..., Path]
) -> None:
    def forward(self: Any, hidden: Tensor) -> Tensor:
        weight = self.up_proj.weight
        output: Tensor = self.down_proj(self.act_fn(hidden @ weight.T))
        return output

    monkeypatch.setattr(llama.LlamaMLP, "forward", forward)

    assert left(pico("llama")) == {
        "mlp.gate_proj": "not called by its block",
        "mlp.up_proj": "not called by its block",
    }


def test_a_linear_that_never_runs_stays_dense(tmp_path: Path) -> None:
    save_tiny("plbart", tmp_path)  # a decoder whose blocks could look at an encoder

    for kind in ("q_proj", "k_proj", "v_proj", "out_proj"):
        assert left(tmp_path)[f"encoder_attn.{kind}"] == "not called by its block"
        assert f"self_attn.{kind}" in eligible(tmp_path)


def test_code_is_read_where_a_block_cannot_run_without_data(tmp_path: Path) -> None:
    save_tiny("longcat_flash", tmp_path)
    skeleton = open_skeleton(tmp_path)

    assert skeleton.rehearsal.called[0] is None
    assert left(tmp_path)["mlp.router.classifier"] == "its weight is read by other code"
    assert "self_attn.0.o_proj" in eligible(tmp_path)


class Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Spelled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        product = input @ self.weight.T
        return product if self.bias is None else product + self.bias


class Renamed(nn.Linear):
    pass


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("kind", "reason"), [(Doubled, "a Doubled, no linear"), (Spelled, None), (Renamed, None)]
)
def test_a_subclass_is_a_linear_if_it_computes_one(
    kind: type[nn.Linear], reason: str | None, bias: bool, pico: Callable[..., Path]
) -> None:
    skeleton = open_skeleton(pico("llama"))
    skeleton.block(0).get_submodule("mlp").up_proj = kind(32, 48, bias=bias, device="meta")

    linears = find_sites(skeleton, 0)

    assert linears.left.get("model.layers.0.mlp.up_proj") == reason
    assert ("mlp.up_proj" in {linear.name for linear in linears.eligible}) == (reason is None)


def test_falcons_own_class_of_linears_is_one(tmp_path: Path) -> None:
    save_tiny("falcon", tmp_path)

    assert left(tmp_path) == {}


# -- buffers that are in no checkpoint


def test_buffers_filled_by_an_ancestor_have_transformers_values(tmp_path: Path) -> None:
    save_tiny("falcon_h1", tmp_path)
    edit_config(tmp_path, ssm_multipliers=[0.5, 0.25, 2.0, 3.0, 4.0])
    whole = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)

    skeleton = open_skeleton(tmp_path)

    assert whole.get_buffer("model.layers.0.mamba.mup_vector").std() > 0
    for name, value in whole.named_non_persistent_buffers():
        assert torch.equal(skeleton.model.get_buffer(name), value), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool])
def test_a_buffer_that_nobody_fills_is_refused(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, pico: Callable[..., Path]
) -> None:
    made = llama.LlamaMLP.__init__

    def with_ghost(self: Any, config: Any) -> None:
        made(self, config)
        self.register_buffer("ghost", torch.ones(3).to(dtype), persistent=False)

    folder = pico("llama")
    monkeypatch.setattr(llama.LlamaMLP, "__init__", with_ghost)

    assert "model.layers.0.mlp.ghost is in no checkpoint" in refusal(folder)


def test_a_buffer_of_random_numbers_is_refused(
    monkeypatch: pytest.MonkeyPatch, pico: Callable[..., Path]
) -> None:
    made, fill = llama.LlamaMLP.__init__, llama.LlamaPreTrainedModel._init_weights

    def with_noise(self: Any, config: Any) -> None:
        made(self, config)
        self.register_buffer("noise", torch.ones(3), persistent=False)

    def init(self: Any, module: nn.Module) -> None:
        fill(self, module)
        if isinstance(module, llama.LlamaMLP):
            module.noise.normal_()

    folder = pico("llama")
    monkeypatch.setattr(llama.LlamaMLP, "__init__", with_noise)
    monkeypatch.setattr(llama.LlamaPreTrainedModel, "_init_weights", init)
    state = torch.random.get_rng_state()

    assert "mlp.noise is in no checkpoint" in refusal(folder)
    assert torch.equal(torch.random.get_rng_state(), state)  # the caller's numbers go on


# -- what passes from block to block


def llama_blocks(monkeypatch: pytest.MonkeyPatch, forward: Callable[..., Any]) -> None:
    """Blocks of Llama models that run ``forward(block, own, hidden, **kwargs)``."""
    own = llama.LlamaDecoderLayer.forward

    def patched(self: Any, hidden_states: Tensor, **kwargs: Any) -> Any:
        return forward(self, own, hidden_states, **kwargs)

    monkeypatch.setattr(llama.LlamaDecoderLayer, "forward", patched)


def llama_loop(monkeypatch: pytest.MonkeyPatch, loop: Callable[[Any, Tensor, Any], Tensor]) -> None:
    """Llama models that run their blocks as ``loop(model, hidden, rotary)`` says."""

    def forward(self: Any, input_ids: Tensor, **_: Any) -> Any:
        hidden = self.embed_tokens(input_ids)
        rotary = self.rotary_emb(hidden, position_ids=torch.arange(hidden.shape[1])[None])
        hidden = self.norm(loop(self, hidden, rotary))
        return transformers.modeling_outputs.BaseModelOutputWithPast(last_hidden_state=hidden)

    monkeypatch.setattr(llama.LlamaModel, "forward", forward)


def test_a_state_made_of_earlier_blocks_is_refused(
    monkeypatch: pytest.MonkeyPatch, pico: Callable[..., Path]
) -> None:
    def loop(model: Any, hidden: Tensor, rotary: Any) -> Tensor:
        first = None
        for layer in model.layers:
            hidden = layer(hidden, position_embeddings=rotary, memory=first)
            first = hidden if first is None else first
        return hidden

    llama_loop(monkeypatch, loop)

    assert "block 1 is given a state that depends on the output of block 0" in refusal(
        pico("llama")
    )


def test_a_state_made_of_the_embeddings_is_refused(
    monkeypatch: pytest.MonkeyPatch, pico: Callable[..., Path]
) -> None:
    def loop(model: Any, hidden: Tensor, rotary: Any) -> Tensor:
        start = hidden.mean(-1)
        for layer in model.layers:
            hidden = layer(hidden, position_embeddings=rotary, start=start)
        return hidden

    llama_loop(monkeypatch, loop)

    message = refusal(pico("llama"))

    assert "block 0 is given a state that depends on the tokens" in message
    assert "(start)" in message


def test_a_state_made_of_the_tokens_themselves_is_refused(
    monkeypatch: pytest.MonkeyPatch, pico: Callable[..., Path]
) -> None:
    forward = llama.LlamaModel.forward

    def with_tokens(self: Any, input_ids: Tensor, **kwargs: Any) -> Any:
        return forward(self, input_ids, seen=input_ids.cumsum(-1), **kwargs)

    monkeypatch.setattr(llama.LlamaModel, "forward", with_tokens)

    assert "a state that depends on the tokens" in refusal(pico("llama"))


def test_a_head_that_looks_at_earlier_blocks_is_refused(
    monkeypatch: pytest.MonkeyPatch, pico: Callable[..., Path]
) -> None:
    def loop(model: Any, hidden: Tensor, rotary: Any) -> Tensor:
        total = torch.zeros_like(hidden)
        for layer in model.layers:
            hidden = layer(hidden, position_embeddings=rotary)
            total = total + hidden
        return total

    llama_loop(monkeypatch, loop)

    assert "its head is given what block 0 returned" in refusal(pico("llama"))


@pytest.mark.parametrize("change", [Tensor.div, Tensor.div_])
def test_hidden_states_that_change_between_blocks_are_refused(
    change: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch, pico: Callable[..., Path]
) -> None:
    def loop(model: Any, hidden: Tensor, rotary: Any) -> Tensor:
        for layer in model.layers:
            hidden = change(layer(hidden, position_embeddings=rotary), 2)
        return hidden

    llama_loop(monkeypatch, loop)

    assert "block 1 is given something else than what block 0 returned" in refusal(pico("llama"))


def test_hidden_states_may_change_in_place_before_and_behind_the_blocks(
    monkeypatch: pytest.MonkeyPatch, pico: Callable[..., Path]
) -> None:
    def loop(model: Any, hidden: Tensor, rotary: Any) -> Tensor:
        hidden *= 2
        for layer in model.layers:
            hidden = layer(hidden, position_embeddings=rotary)
        hidden *= 2
        return hidden

    folder = pico("llama")
    llama_loop(monkeypatch, loop)

    expected = whole_logits(folder, pico_tokens())
    assert torch.equal(streamed_logits(folder, pico_tokens()), expected)


def test_blocks_that_run_in_another_order_are_refused(
    monkeypatch: pytest.MonkeyPatch, pico: Callable[..., Path]
) -> None:
    def loop(model: Any, hidden: Tensor, rotary: Any) -> Tensor:
        for layer in (*model.layers, *model.layers):
            hidden = layer(hidden, position_embeddings=rotary)
        return hidden

    llama_loop(monkeypatch, loop)

    assert "in another order" in refusal(pico("llama"))


@pytest.mark.parametrize("skipped", [0, 1])
def test_blocks_that_do_not_run_on_text_are_refused(
    skipped: int, monkeypatch: pytest.MonkeyPatch, pico: Callable[..., Path]
) -> None:
    def loop(model: Any, hidden: Tensor, rotary: Any) -> Tensor:
        only: Tensor = model.layers[1 - skipped](hidden, position_embeddings=rotary)
        return only

    llama_loop(monkeypatch, loop)

    assert f"block {skipped} does not run on text alone" in refusal(pico("llama"))


@pytest.mark.parametrize("uses", [False, True])
def test_what_a_block_returns_besides_hidden_states_must_not_be_used(
    uses: bool, monkeypatch: pytest.MonkeyPatch, pico: Callable[..., Path]
) -> None:
    def loop(model: Any, hidden: Tensor, rotary: Any) -> Tensor:
        extra = None
        for layer in model.layers:
            hidden, extra, _ = layer(hidden, position_embeddings=rotary, extra=extra)
        return hidden

    def block(self: Any, own: Any, hidden: Tensor, extra: Any = None, **kwargs: Any) -> Any:
        hidden = own(self, hidden, **kwargs)
        if uses and extra is not None:
            hidden = hidden + extra
        return hidden, hidden.mean(-1, keepdim=True), None

    folder = pico("llama")
    llama_loop(monkeypatch, loop)
    llama_blocks(monkeypatch, block)

    if uses:
        assert "uses what the block before it returned besides" in refusal(folder)
    else:
        expected = whole_logits(folder, pico_tokens())
        assert torch.equal(streamed_logits(folder, pico_tokens()), expected)


@pytest.mark.parametrize("reads", [False, True])
def test_a_mapping_that_all_blocks_share_is_in_the_stream_where_it_is_read(
    reads: bool, monkeypatch: pytest.MonkeyPatch, pico: Callable[..., Path]
) -> None:
    def loop(model: Any, hidden: Tensor, rotary: Any) -> Tensor:
        shared: dict[str, Tensor] = {}
        for layer in model.layers:
            hidden = layer(hidden, position_embeddings=rotary, shared=shared)
        return hidden

    def block(self: Any, own: Any, hidden: Tensor, *, shared: Any, **kwargs: Any) -> Any:
        hidden = own(self, hidden, **kwargs)
        if reads and self.self_attn.layer_idx:
            hidden = hidden + shared["first"]
        shared["first"] = hidden
        return hidden

    folder = pico("llama")
    llama_loop(monkeypatch, loop)
    llama_blocks(monkeypatch, block)
    tokens = pico_tokens()

    assert torch.equal(streamed_logits(folder, tokens), whole_logits(folder, tokens))
    assert open_skeleton(folder).hidden_size == HIDDEN * (2 if reads else 1)


@pytest.mark.parametrize("kind", sorted({"inkling2_text"} & set(causal_types())))
def test_types_that_hand_on_more_than_hidden_states_are_refused(kind: str, tmp_path: Path) -> None:
    save_tiny(kind, tmp_path)

    assert f"{kind}: its head is given the embeddings" in refusal(tmp_path)


@pytest.mark.parametrize("kind", ["bamba", "rwkv", "xlstm", "falcon_h1"])
def test_types_whose_blocks_return_tuples_of_any_length(kind: str, tmp_path: Path) -> None:
    save_tiny(kind, tmp_path)
    tokens = pico_tokens(2, 12).clamp(16, 250)

    assert {item.length > 0 for item in open_skeleton(tmp_path).rehearsal.returns} == {True}
    streamed, whole = streamed_logits(tmp_path, tokens), whole_logits(tmp_path, tokens)
    assert torch.allclose(streamed, whole, atol=1e-4 * float(whole.abs().max()), rtol=0)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_caller_without_gradients_sees_the_same(
    mode: Callable[[], Any], pico: Callable[..., Path]
) -> None:
    with mode():
        skeleton = open_skeleton(pico("gemma2"))

    assert skeleton.rehearsal == open_skeleton(pico("gemma2")).rehearsal


@pytest.mark.parametrize("length", [1, 2, 3])
def test_blocks_that_cannot_run_without_data_may_return_tuples(
    length: int, monkeypatch: pytest.MonkeyPatch, pico: Callable[..., Path]
) -> None:
    def loop(model: Any, hidden: Tensor, rotary: Any) -> Tensor:
        for layer in model.layers:
            hidden = layer(hidden, position_embeddings=rotary)[0]
        return hidden

    def block(self: Any, own: Any, hidden: Tensor, **kwargs: Any) -> Any:
        assert bool(hidden.isfinite().all())  # asks the data
        return (own(self, hidden, **kwargs), *[None] * (length - 1))

    folder = pico("llama")
    llama_loop(monkeypatch, loop)
    llama_blocks(monkeypatch, block)

    assert open_skeleton(folder).rehearsal.called == (None, None)
    expected = whole_logits(folder, pico_tokens())
    assert torch.equal(streamed_logits(folder, pico_tokens()), expected)


def test_more_positions_than_tokens_are_refused(
    monkeypatch: pytest.MonkeyPatch, pico: Callable[..., Path]
) -> None:
    forward = llama.LlamaModel.forward

    def prompted(self: Any, input_ids: Tensor, **kwargs: Any) -> Any:
        embedded = self.embed_tokens(input_ids)
        longer = torch.cat((embedded[:, :1], embedded), dim=1)
        return forward(self, **kwargs | {"inputs_embeds": longer})

    monkeypatch.setattr(llama.LlamaModel, "forward", prompted)

    assert "hidden states of 5 x 7 tokens are not" in refusal(pico("llama"))


# -- where the blocks are


def test_a_head_that_is_called_decoder_is_not_searched_for_blocks(tmp_path: Path) -> None:
    save_tiny("modernbert-decoder", tmp_path)

    assert open_skeleton(tmp_path).layers_name == "model.layers"


def test_a_block_may_count_as_two_layers(tmp_path: Path) -> None:
    save_tiny("longcat_flash", tmp_path)
    skeleton = open_skeleton(tmp_path)

    assert skeleton.text_config.num_hidden_layers == 2 * len(skeleton)


# -- the config


def test_a_config_with_infinities_is_read_as_transformers_wrote_it(tmp_path: Path) -> None:
    save_tiny("mamba2", tmp_path)
    assert '{\n      "__float__": "Infinity"\n    }' in (tmp_path / "config.json").read_text()

    assert open_skeleton(tmp_path).config.time_step_limit == [0.0, float("inf")]


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
@pytest.mark.parametrize("value", ["flash_attention_2", "kernels-community/flash-attn", "no-such"])
def test_attention_that_is_not_torchs_own_is_replaced_and_noted(
    key: str, value: str, tmp_path: Path
) -> None:
    save_pico(tmp_path)
    expected = whole_logits(tmp_path, pico_tokens())
    edit_config(tmp_path, **{key: value})

    assert open_skeleton(tmp_path).notes == (
        f"config.json asks for attention by {value!r}: torch's own is used instead",
    )
    assert torch.equal(streamed_logits(tmp_path, pico_tokens()), expected)
    with quick_plan():
        plan = streamcomp.plan(tmp_path, small_recipe(__file__), RESOURCES)
    assert plan.notes == open_skeleton(tmp_path).notes


def test_attention_that_torch_brings_is_run_as_the_config_says(tmp_path: Path) -> None:
    edit_config(save_pico(tmp_path), attn_implementation="eager")
    skeleton = open_skeleton(tmp_path)
    whole = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)  # some releases ignore it

    assert skeleton.notes == ()
    assert skeleton.config._attn_implementation == whole.config._attn_implementation
    expected = whole_logits(tmp_path, pico_tokens())
    assert torch.equal(streamed_logits(tmp_path, pico_tokens()), expected)


def test_what_transformers_cannot_build_is_refused_in_a_line(
    monkeypatch: pytest.MonkeyPatch, pico: Callable[..., Path]
) -> None:
    def fail(self: Any, config: Any) -> None:
        raise ImportError("LlamaMLP needs a package that is not there\nsee elsewhere")

    folder = pico("llama")
    monkeypatch.setattr(llama.LlamaMLP, "__init__", fail)

    assert refusal(folder) == (
        "llama: transformers cannot build it (ImportError: LlamaMLP needs a package that is not "
        "there)"
    )
