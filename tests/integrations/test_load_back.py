"""What was written is loaded by plain transformers: with streamcomp, or with its plugin file."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.pytorch_utils import Conv1D

from streamcomp.forms.runtime import MODULES, FactoredLinear
from streamcomp.integrations.transformers import PLUGIN, StreamCompConfig, plugin_source
from tests.jobs import (
    REPOSITORY,
    Finished,
    compress,
    config_of,
    factored_modules,
    in_memory,
    load_dense,
    logits_of,
    products,
    run_python,
    stored_tensors,
)
from tests.model.folders import edit_config
from tests.pico import pico_tokens

# What a name stands for beside the forms of the default method.
OTHERS: dict[str, dict[str, Any]] = {
    "shared": {"method": "swsc", "clusters": 4},
    "shared by rows": {"method": "swsc", "clusters": 4, "axis": "rows"},
}
KINDS = ["uv", "pivot", *OTHERS]


@pytest.fixture(scope="module")
def compressed(
    pico: Callable[..., Path], text: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """``compressed("llama", "uv")``: a compressed pico model, not to be changed."""
    made: dict[str, Path] = {}

    def make(architecture: str = "llama", form: str = "pivot", **model: Any) -> Path:
        key = repr((architecture, form, model))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("out") / f"{architecture}-{form}"
            settings = OTHERS.get(form, {"form": form})
            compress(pico(architecture, **model), made[key], text, ratio=0.3, **settings)
        return made[key]

    return make


def load(folder: Path, **settings: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **settings).eval()


# -- in another process, where there is no streamcomp ------------------------------------

ELSEWHERE = """
import json, sys, warnings
sys.modules["streamcomp"] = None  # importing it fails, were it installed
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.utils import logging

logging.set_verbosity_error()
trust = json.loads(sys.argv[2])
logits = {}
for folder in json.loads(sys.argv[1]):
    settings = {"trust_remote_code": True} if trust else {}
    torch.manual_seed(0)
    tokens = torch.tensor([[5, 9, 77, 120, 3, 64, 31, 8]])
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(folder, **settings).eval()
        found = [type(m).__name__ for m in model.modules() if hasattr(m, "rank")]
        made = model(tokens).logits
        config = AutoConfig.from_pretrained(folder, **settings)
        body = AutoModel.from_pretrained(folder, **settings)
        spoken = model.generate(tokens, max_new_tokens=4, do_sample=False)
    logits[folder] = {
        "logits": made.tolist(),
        "modules": sorted(set(found)),
        "config": type(config).__name__,
        "body": type(body).__name__,
        "spoken": spoken.shape[1],
    }
print(json.dumps(logits))
"""


def run_elsewhere(
    folders: list[Path], cwd: Path, cache: Path, *, trust: bool, script: str = ELSEWHERE
) -> Finished:
    """Load ``folders`` with transformers alone, from a working folder that is not the checkout."""
    assert REPOSITORY not in [cwd, *cwd.parents]
    environment = {"PYTHONPATH": "", "HF_MODULES_CACHE": str(cache), "PYTHONSAFEPATH": "1"}
    names = json.dumps([str(folder) for folder in folders])
    return run_python("-c", script, names, json.dumps(trust), cwd=cwd, environment=environment)


def test_with_trust_remote_code_no_streamcomp_is_needed(
    compressed: Callable[..., Path], tmp_path: Path
) -> None:
    made = {
        compressed("llama", "pivot"): ("PivotLinear", "LlamaConfig", "LlamaModel"),
        compressed("gemma2", "uv"): ("LowRankLinear", "Gemma2Config", "Gemma2Model"),
        compressed("gpt_neox", "pivot"): ("PivotLinear", "GPTNeoXConfig", "GPTNeoXModel"),
        compressed("llama", "shared"): ("SharedLinear", "LlamaConfig", "LlamaModel"),
        compressed("opt", "shared by rows"): ("SharedLinear", "OPTConfig", "OPTModel"),
        compressed("qwen2", "uv"): ("LowRankLinear", "Qwen2Config", "Qwen2Model"),
        compressed("gpt2", "pivot"): ("PivotLinear", "GPT2Config", "GPT2Model"),
    }

    done = run_elsewhere(list(made), tmp_path, tmp_path / "cache", trust=True)

    assert done.code == 0, done.err[-2000:]
    told = json.loads(done.out)
    tokens = torch.tensor([[5, 9, 77, 120, 3, 64, 31, 8]])
    for folder, (module, config, body) in made.items():
        found = told[str(folder)]
        assert found["modules"] == [module]
        assert (found["config"], found["body"]) == (config, body)
        assert found["spoken"] > tokens.shape[1]
        expected = logits_of(load(folder), tokens)
        torch.testing.assert_close(torch.tensor(found["logits"]), expected, rtol=1e-4, atol=1e-4)


LOUD = """
import json, sys
sys.modules["streamcomp"] = None
from transformers import AutoModelForCausalLM

for folder in json.loads(sys.argv[1]):
    try:
        AutoModelForCausalLM.from_pretrained(folder)
    except RuntimeError as error:
        print("refused:", str(error).replace("\\n", " "))
    else:
        sys.exit(f"{folder} was loaded, with whatever weights")
AutoModelForCausalLM.from_pretrained(folder)
"""


def test_without_either_it_fails_loudly(compressed: Callable[..., Path], tmp_path: Path) -> None:
    folders = [compressed("llama", kind) for kind in KINDS]
    folders += [compressed(architecture, "pivot") for architecture in ("opt", "gpt2")]

    done = run_elsewhere(folders, tmp_path, tmp_path / "cache", trust=False, script=LOUD)

    assert done.code == 1
    assert "RuntimeError" in done.err
    told = done.out.splitlines()
    assert len(told) == len(folders)
    for line in told:
        assert line.startswith("refused:") and "mismatch" in line.lower()


def test_the_plugin_is_one_file_that_needs_no_streamcomp(compressed: Callable[..., Path]) -> None:
    source = (compressed("llama") / PLUGIN).read_text()

    assert source == plugin_source()
    compile(source, PLUGIN, "exec")
    assert "import streamcomp" not in source and "from streamcomp" not in source


# -- with streamcomp ---------------------------------------------------------------------


@torch.no_grad()
def multiplied_out(dense: Path, out: Path) -> Any:
    """The dense model with the products of the factors, and the biases, that ``out`` holds."""
    model, tensors = load_dense(dense, products(out)), stored_tensors(out)
    for name in factored_modules(out):
        if f"{name}.bias" in tensors:
            linear = model.get_submodule(in_memory(model, name))
            assert isinstance(linear, nn.Linear | Conv1D)
            linear.bias = nn.Parameter(tensors[f"{name}.bias"])
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "opt", "gpt2"])
def test_the_loaded_model_computes_with_the_products_and_biases(
    architecture: str, kind: str, pico: Callable[..., Path], compressed: Callable[..., Path]
) -> None:
    dense, out = pico(architecture), compressed(architecture, kind)

    expected = logits_of(multiplied_out(dense, out), pico_tokens())

    torch.testing.assert_close(logits_of(load(out), pico_tokens()), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(expected, logits_of(load_dense(dense), pico_tokens()), atol=1e-2)


@pytest.mark.parametrize("form", ["pivot", "uv", "shared"])
def test_factored_linears_are_in_their_places(form: str, compressed: Callable[..., Path]) -> None:
    out = compressed("llama", form)

    model = load(out)

    found = {name: m for name, m in model.named_modules() if isinstance(m, FactoredLinear)}
    specs = factored_modules(out)
    assert found.keys() == specs.keys()
    for name, module in found.items():
        assert type(module) is MODULES[form]
        assert isinstance(module, nn.Linear)
        assert module.rank == specs[name]["rank"]
        torch.testing.assert_close(
            module.dense_weight().double(), products(out)[name], rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("form", ["pivot", "uv", "shared"])
@pytest.mark.parametrize(
    "architecture", ["llama", "qwen2", "phi3", "gpt_neox", "opt", "gpt2", "mixtral"]
)
def test_a_saved_model_is_the_same_model(
    architecture: str, form: str, compressed: Callable[..., Path], tmp_path: Path
) -> None:
    out, saved = compressed(architecture, form), tmp_path / "saved"
    model = load(out)
    expected = logits_of(model, pico_tokens())

    model.save_pretrained(saved, max_shard_size="10KB")

    assert len(list(saved.glob("*.safetensors"))) > 2
    before, after = config_of(out), config_of(saved)
    assert after["quantization_config"] == before["quantization_config"]
    assert "auto_map" not in after  # the plugin file it would name is not there
    assert torch.equal(logits_of(load(saved), pico_tokens()), expected)
    again = load(saved, trust_remote_code=True)
    assert torch.equal(logits_of(again, pico_tokens()), expected)
    first, second = stored_tensors(out), stored_tensors(saved)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_model_saved_twice_is_still_the_same(
    architecture: str, compressed: Callable[..., Path], tmp_path: Path
) -> None:
    out = compressed(architecture)
    load(out).save_pretrained(tmp_path / "once")
    load(tmp_path / "once").save_pretrained(tmp_path / "twice")

    assert torch.equal(
        logits_of(load(tmp_path / "twice"), pico_tokens()), logits_of(load(out), pico_tokens())
    )


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_it_generates_with_and_without_a_cache(
    architecture: str, compressed: Callable[..., Path]
) -> None:
    out = compressed(architecture)
    model, tokenizer = load(out), AutoTokenizer.from_pretrained(out)
    prompt = tokenizer("Once upon a time", return_tensors="pt")["input_ids"]

    made = [
        model.generate(prompt, max_new_tokens=8, do_sample=False, use_cache=cache, eos_token_id=-1)
        for cache in (True, False)
    ]

    assert made[0].shape == (1, prompt.shape[1] + 8)
    assert torch.equal(made[0], made[1])


@pytest.mark.parametrize("place", ["auto", "cpu"])
def test_a_device_map_is_obeyed(place: str, compressed: Callable[..., Path]) -> None:
    out = compressed("llama")

    model = load(out, device_map=place)

    assert {tensor.device.type for tensor in model.parameters()} <= {"cpu", "cuda"}
    assert all(not tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    expected = logits_of(load(out), pico_tokens())
    found = logits_of(model, pico_tokens().to(model.device)).cpu()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_accelerate_runs_it_with_a_block_on_disk(
    kind: str, compressed: Callable[..., Path], tmp_path: Path
) -> None:
    out = compressed("llama", kind)
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    places |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}

    model = load(out, device_map=places, offload_folder=tmp_path)

    weights = list(model.model.layers[1].mlp.down_proj.parameters())
    assert all(weight.is_meta for weight in weights)  # accelerate's hooks read them when they run
    assert torch.equal(logits_of(model, pico_tokens()), logits_of(load(out), pico_tokens()))


@pytest.mark.parametrize("form", ["pivot", "uv"])
def test_another_dtype_is_obeyed(form: str, compressed: Callable[..., Path]) -> None:
    out = compressed("llama", form, dtype=torch.bfloat16)

    narrow, wide = load(out), load(out, dtype=torch.float32)

    assert {tensor.dtype for tensor in narrow.parameters()} == {torch.bfloat16}
    assert {tensor.dtype for tensor in wide.parameters()} == {torch.float32}
    pivots = [tensor for name, tensor in wide.named_buffers() if name.endswith("pivots")]
    assert all(tensor.dtype == torch.int32 for tensor in pivots) and bool(pivots) == (
        form == "pivot"
    )
    stored = stored_tensors(out)
    for name, tensor in wide.state_dict().items():
        assert torch.equal(tensor.float(), stored[name].float()), name


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox", "opt"])
def test_the_body_loads_without_its_head(
    architecture: str, compressed: Callable[..., Path]
) -> None:
    out = compressed(architecture)

    body = AutoModel.from_pretrained(out).eval()
    whole = load(out)

    assert sum(isinstance(m, FactoredLinear) for m in body.modules()) == len(factored_modules(out))
    with torch.no_grad():
        hidden = body(pico_tokens(), use_cache=False).last_hidden_state
        assert torch.equal(hidden, whole.base_model(pico_tokens(), use_cache=False)[0])


def test_a_copy_is_a_model_of_its_own(compressed: Callable[..., Path]) -> None:
    model = load(compressed("llama"))
    expected = logits_of(model, pico_tokens())

    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()

    assert torch.equal(logits_of(other, pico_tokens()), expected)


def test_gradients_reach_the_factors(compressed: Callable[..., Path]) -> None:
    for kind in KINDS:
        model = load(compressed("llama", kind)).train()

        model(input_ids=pico_tokens(), labels=pico_tokens()).loss.backward()

        for name, module in model.named_modules():
            if isinstance(module, FactoredLinear):
                for leaf, parameter in module.named_parameters():
                    assert parameter.grad is not None and parameter.grad.any(), f"{name}.{leaf}"


def test_it_is_traced_whole(compressed: Callable[..., Path]) -> None:
    model = load(compressed("llama"))
    expected = logits_of(model, pico_tokens())

    traced: Callable[..., Any] = torch.compile(model, backend="eager")

    with torch.no_grad():
        found: Tensor = traced(input_ids=pico_tokens(), use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


# -- what is refused ---------------------------------------------------------------------


def edited(folder: Path, target: Path, change: Callable[[dict[str, Tensor]], Any]) -> Path:
    """A copy of ``folder`` with its tensors changed, in one file."""
    shutil.copytree(folder, target)
    tensors = stored_tensors(target)
    for path in [*target.glob("*.safetensors"), *target.glob("*.index.json")]:
        path.unlink()
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.parametrize(
    ("form", "leaf"),
    [("pivot", "weight"), ("pivot", "coef"), ("pivot", "pivots"), ("uv", "weight"), ("uv", "U")],
)
def test_a_missing_factor_is_an_error(
    form: str, leaf: str, compressed: Callable[..., Path], tmp_path: Path
) -> None:
    name = f"model.layers.1.mlp.up_proj.{leaf}"
    out = edited(compressed("llama", form), tmp_path / "out", lambda tensors: tensors.pop(name))

    with pytest.raises(ValueError, match=rf"^streamcomp: {name} is missing from the checkpoint"):
        load(out)


def test_a_missing_bias_is_an_error(compressed: Callable[..., Path], tmp_path: Path) -> None:
    name = "model.layers.1.self_attn.q_proj.bias"
    out = edited(compressed("qwen2"), tmp_path / "out", lambda tensors: tensors.pop(name))

    with pytest.raises(ValueError, match=rf"^streamcomp: {name} is missing from the checkpoint"):
        load(out)


def test_a_factor_of_another_rank_is_an_error(
    compressed: Callable[..., Path], tmp_path: Path
) -> None:
    name = "model.layers.1.mlp.up_proj.weight"

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name] = tensors[name][:-1].clone()

    with pytest.raises(ValueError, match=rf"^streamcomp: {name} is .* the config makes it"):
        load(edited(compressed("llama"), tmp_path / "out", change))


UP = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "format version 2, this reader knows 1"),
        ({"version": None}, "format version None"),
        ({"new_key": 1}, "unknown key 'new_key' in quantization_config"),
        ({"modules": {UP: {"form": "sparse", "rank": 3}}}, "unknown form 'sparse'"),
        ({"modules": {UP: {"form": "shared", "rank": 3}}}, "axis None is impossible"),
        ({"modules": {UP: {"form": "uv", "rank": 3, "scale": 2}}}, "unknown key 'scale'"),
        ({"modules": {UP: {"form": "uv"}}}, "rank None is impossible"),
        ({"modules": {UP: {"form": "uv", "rank": 0}}}, "rank 0 is impossible"),
        ({"modules": {UP: {"form": "uv", "rank": 32}}}, "rank 32 is impossible for 48 x 32"),
        ({"modules": {UP: {"form": "uv", "rank": "3"}}}, "rank '3' is impossible"),
        ({"modules": {"model.layers.7.mlp.up_proj": {"form": "uv", "rank": 3}}}, "has no module"),
        ({"modules": {"model.norm": {"form": "uv", "rank": 3}}}, "is a LlamaRMSNorm, no linear"),
    ],
)
def test_another_format_is_refused(
    change: dict[str, Any], message: str, compressed: Callable[..., Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(compressed("llama"), out)
    edit_config(out, quantization_config={**config_of(out)["quantization_config"], **change})

    with pytest.raises(ValueError, match=message):
        load(out)


def test_the_config_keeps_what_it_was_given() -> None:
    modules = {UP: {"form": "pivot", "rank": 3, "dtype": "F32"}}

    config = StreamCompConfig.from_dict(
        {"quant_method": "streamcomp", "version": 1, "modules": modules}
    )

    assert config.to_dict() == {"quant_method": "streamcomp", "version": 1, "modules": modules}
    assert json.loads(config.to_json_string()) == config.to_dict()


def test_importing_streamcomp_leaves_other_models_alone(pico: Callable[..., Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(pico("llama"))

    assert not any(isinstance(module, FactoredLinear) for module in model.modules())
    assert torch.equal(
        logits_of(model.eval(), pico_tokens()), logits_of(load_dense(pico("llama")), pico_tokens())
    )
