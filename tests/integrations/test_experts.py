"""Mixtures with factored experts: loaded by plain transformers, saved, trained, exported."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

import streamcomp
from streamcomp.forms.expert_module import FactoredExperts
from streamcomp.integrations.transformers import StreamCompConfig, StreamCompQuantizer
from tests.families.tiny import save_tiny
from tests.integrations.test_load_back import run_elsewhere
from tests.jobs import config_of, factored_modules, logits_of, stored_tensors
from tests.mixtures import save_mixture
from tests.pico import pico_tokens

# gated with names on disk of its own; biased, transposed, interleaved and fused on disk; without a
# gate; one weight of all experts transposed; next to dense blocks and shared experts
KINDS = ("mixtral", "gpt_oss", "nemotron_h", "aria_text", "deepseek_v3")
FORMS = ("uv", "pivot")
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
TOKENS = pico_tokens(2, 12)

Mixture = Callable[..., tuple[Path, Tensor]]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``dense("mixtral")``: a tiny dense model, not to be changed."""
    folder = tmp_path_factory.mktemp("dense")

    def make(kind: str) -> Path:
        if not (folder / kind).exists():
            save_tiny(kind, folder / kind)
        return folder / kind

    return make


@pytest.fixture(scope="module")
def mixture(dense: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Mixture:
    """``mixture("mixtral", "uv")``: a folder with factored experts, and logits of the products."""
    made: dict[tuple[str, str], tuple[Path, Tensor]] = {}

    def make(kind: str = "mixtral", form: str = "uv") -> tuple[Path, Tensor]:
        if (kind, form) not in made:
            folder = tmp_path_factory.mktemp("mixture") / f"{kind}-{form}"
            made[kind, form] = folder, logits_of(save_mixture(dense(kind), folder, form), TOKENS)
        return made[kind, form]

    return make


def load(folder: Path, **settings: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **settings).eval()


def assert_same(model: Any, expected: Tensor) -> None:
    error = (logits_of(model, TOKENS) - expected).abs().max() / expected.abs().max()
    assert error < 2e-6


def edited(folder: Path, target: Path, change: Callable[[dict[str, Tensor], Any], Any]) -> Path:
    """A copy of ``folder`` whose tensors and modules in the config were changed."""
    tensors, config = stored_tensors(folder), config_of(folder)
    target.mkdir()
    change(tensors, config["quantization_config"]["modules"])
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    (target / "config.json").write_text(json.dumps(config))
    return target


# -- loading -----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_it_computes_with_the_products_after_loading_and_saving(
    kind: str, form: str, mixture: Mixture, tmp_path: Path
) -> None:
    folder, expected = mixture(kind, form)
    for implementation in IMPLEMENTATIONS:
        model = load(folder, experts_implementation=implementation)
        assert any(isinstance(module, FactoredExperts) for module in model.modules())
        assert_same(model, expected)

    for target in (tmp_path / "once", tmp_path / "twice"):
        model.save_pretrained(target)
        model = load(target)
        assert_same(model, expected)
        assert factored_modules(target) == factored_modules(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_a_program_without_the_plugin_refuses_it(
    kind: str, mixture: Mixture, tmp_path: Path
) -> None:
    folder, _ = mixture(kind)
    load(folder).save_pretrained(tmp_path / "saved")
    others = {k: v for k, v in AUTO_QUANTIZATION_CONFIG_MAPPING.items() if k != "streamcomp"}

    with mock.patch.dict(AUTO_QUANTIZATION_CONFIG_MAPPING, others, clear=True):
        for model in (folder, tmp_path / "saved"):
            with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
                load(model)


WITH_THE_FILE = """
import json, sys
sys.modules["streamcomp"] = None  # importing it fails, were it installed
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

logging.set_verbosity_error()
told = {}
for folder in json.loads(sys.argv[1]):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    with torch.no_grad():
        told[folder] = model(torch.tensor([[5, 9, 77, 120]])).logits.tolist()
print(json.dumps(told))
"""


def test_with_trust_remote_code_no_streamcomp_is_needed(mixture: Mixture, tmp_path: Path) -> None:
    folders = [mixture("mixtral", "pivot")[0], mixture("gpt_oss")[0]]

    done = run_elsewhere(folders, tmp_path, tmp_path / "cache", trust=True, script=WITH_THE_FILE)

    assert done.code == 0, done.err[-2000:]
    for folder, made in json.loads(done.out).items():
        expected = logits_of(load(Path(folder)), torch.tensor([[5, 9, 77, 120]]))
        torch.testing.assert_close(torch.tensor(made), expected, rtol=1e-4, atol=1e-4)


def test_it_generates_with_and_without_a_cache(mixture: Mixture) -> None:
    model = load(mixture("mixtral", "pivot")[0])
    spoken = [
        model.generate(TOKENS, max_new_tokens=6, do_sample=False, use_cache=cache, pad_token_id=0)
        for cache in (True, False)
    ]
    assert torch.equal(*spoken) and spoken[0].shape[1] > TOKENS.shape[1]


@pytest.mark.parametrize("form", FORMS)
def test_a_step_of_training_moves_every_factor(form: str, mixture: Mixture) -> None:
    model = load(mixture("mixtral", form)[0]).train()
    factors = {
        f"{name}.{leaf}": module.get_parameter(leaf)
        for name, module in model.named_modules()
        if isinstance(module, FactoredExperts)
        for leaf in module.factors
        if leaf in module._parameters
    }
    before = {name: value.detach().clone() for name, value in factors.items()}
    optimiser = torch.optim.SGD(model.parameters(), lr=0.01)

    losses = []
    for _ in range(3):
        optimiser.zero_grad()
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
        loss.backward()
        optimiser.step()
        losses.append(loss.item())

    assert losses[-1] < losses[0]
    assert factors and all(not torch.equal(before[name], v) for name, v in factors.items())


def test_narrow_dtypes_and_copies_run(mixture: Mixture) -> None:
    folder, expected = mixture("gpt_oss", "pivot")
    for dtype in (torch.bfloat16, torch.float16):
        model = copy.deepcopy(load(folder, dtype=dtype))
        experts = next(m for m in model.modules() if isinstance(m, FactoredExperts))
        assert experts.gate_up_proj_V.dtype == dtype
        assert experts.gate_up_proj_pivots.dtype == torch.int32
        error = (logits_of(model, TOKENS).float() - expected).abs().max() / expected.abs().max()
        assert error < 0.1


# -- what is refused ---------------------------------------------------------------------------


def experts_name(modules: dict[str, Any]) -> str:
    return next(iter(modules))


@pytest.mark.parametrize("leaf", ["gate_up_proj_V", "down_proj_coef", "down_proj_pivots"])
def test_a_missing_factor_is_an_error(leaf: str, mixture: Mixture, tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor], modules: Any) -> None:
        del tensors[f"{experts_name(modules)}.{leaf}"]

    folder = edited(mixture("mixtral", "pivot")[0], tmp_path / "out", change)

    with pytest.raises(ValueError, match=f"streamcomp: .*{leaf} is missing from the checkpoint"):
        load(folder)


def test_a_factor_of_another_shape_or_dtype_is_an_error(mixture: Mixture, tmp_path: Path) -> None:
    def cut(tensors: dict[str, Tensor], modules: Any) -> None:
        name = f"{experts_name(modules)}.down_proj_U"
        tensors[name] = tensors[name][1:].clone()

    def narrow(tensors: dict[str, Tensor], modules: Any) -> None:
        name = f"{experts_name(modules)}.down_proj_U"
        tensors[name] = tensors[name].bfloat16()

    def rank(tensors: dict[str, Tensor], modules: Any) -> None:
        modules[experts_name(modules)]["ranks"]["down_proj"][0] += 1

    folder = mixture()[0]
    for change, message in (
        (cut, "down_proj_U is .* in the checkpoint, the config makes it"),
        (narrow, "the factors of .* are BF16 and F32"),
        (rank, "down_proj_V is .* in the checkpoint, the config makes it"),
    ):
        target = tmp_path / change.__name__
        with pytest.raises(ValueError, match=f"streamcomp: .*{message}"):
            load(edited(folder, target, change))


def test_experts_are_named_where_the_config_is_wrong(mixture: Mixture, tmp_path: Path) -> None:
    folder, _ = mixture()
    name = experts_name(factored_modules(folder))

    def unlisted(tensors: dict[str, Tensor], modules: Any) -> None:
        del modules[name], tensors[f"{name}.gate_up_proj"]

    def as_linear(tensors: dict[str, Tensor], modules: Any) -> None:
        modules[name] = {"form": "uv", "rank": 2, "dtype": "F32"}

    def twice(tensors: dict[str, Tensor], modules: Any) -> None:
        modules[name.replace("block_sparse_moe", "mlp")] = modules[name]

    for change, message in (
        (unlisted, "is a factor that the config does not list"),
        (as_linear, rf"unknown key 'rank': written by a newer version\? \(experts {name}\)"),
        (twice, "is listed by two names"),
    ):
        with pytest.raises(ValueError, match=f"streamcomp: .*{message}"):
            load(edited(folder, tmp_path / change.__name__, change))


def test_a_distributed_model_is_refused(mixture: Mixture) -> None:
    settings = config_of(mixture()[0])["quantization_config"]
    model = mock.Mock()
    model.config.distributed_config = object()

    quantizer = StreamCompQuantizer(StreamCompConfig(**settings))

    assert not quantizer.is_compileable
    with pytest.raises(ValueError, match="streamcomp: factored experts run in one process"):
        quantizer._process_model_before_weight_loading(model)


# -- tools -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_an_export_has_the_dense_names_and_the_logits(
    kind: str, dense: Callable[[str], Path], mixture: Mixture, tmp_path: Path
) -> None:
    folder, expected = mixture(kind, "pivot")
    load(folder).save_pretrained(tmp_path / "saved")
    shapes = {name: tensor.shape for name, tensor in stored_tensors(dense(kind)).items()}

    for source in (folder, tmp_path / "saved"):
        streamcomp.export(source, tmp_path / f"{source.name}-dense")
        streamcomp.export(source, tmp_path / f"{source.name}-uv", form="uv")

        written = stored_tensors(tmp_path / f"{source.name}-dense")
        assert {name: tensor.shape for name, tensor in written.items()} == shapes
        others = {k: v for k, v in AUTO_QUANTIZATION_CONFIG_MAPPING.items() if k != "streamcomp"}
        with mock.patch.dict(AUTO_QUANTIZATION_CONFIG_MAPPING, others, clear=True):
            assert_same(load(tmp_path / f"{source.name}-dense"), expected)
        assert_same(load(tmp_path / f"{source.name}-uv"), expected)
        specs = factored_modules(tmp_path / f"{source.name}-uv")
        assert all(spec["form"] == "uv" for spec in specs.values())


def test_factored_experts_are_inspected_by_matrix(mixture: Mixture) -> None:
    folder, _ = mixture("mixtral", "pivot")

    inspection = streamcomp.inspect(folder)

    families = {f.name: f for f in inspection.families}
    down = families["mlp.experts.down_proj"]
    ranks = [s["ranks"]["down_proj"] for s in factored_modules(folder).values()]
    assert (down.form, down.count) == ("pivot", sum(map(len, ranks)))
    assert down.ranks == (min(map(min, ranks)), max(map(max, ranks)))
    stored = [v for k, v in stored_tensors(folder).items() if ".down_proj_" in k]
    assert down.nbytes == sum(tensor.nbytes for tensor in stored)
    assert not any("experts" in name for name in inspection.left)


def test_pivots_of_experts_are_verified(mixture: Mixture, tmp_path: Path) -> None:
    folder, _ = mixture("mixtral", "pivot")
    sound = streamcomp.verify(folder)
    assert sound.sound
    assert any("0 factored linears and experts of 2 blocks" in told for told in sound.checked)

    def change(tensors: dict[str, Tensor], modules: Any) -> None:
        tensors[f"{experts_name(modules)}.gate_up_proj_pivots"][0, 0] = 99

    damaged = streamcomp.verify(edited(folder, tmp_path / "out", change))
    assert [f for f in damaged.faults if "gate_up_proj_pivots is no permutation of 0 to" in f]
