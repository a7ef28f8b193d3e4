"""A job from end to end: what it writes is what was asked for, and loads."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Qwen2MoeConfig
from transformers.pytorch_utils import Conv1D

import streamcomp
from streamcomp import JobMismatchError, OutputError, RecipeError
from streamcomp.calibration.corpus import load_windows
from tests.jobs import (
    RESOURCES,
    SMALL,
    Interrupt,
    Interrupted,
    Notes,
    compress,
    config_of,
    factored_modules,
    in_memory,
    inputs_of,
    load_dense,
    logits_of,
    products,
    stored_tensors,
    tree,
)
from tests.model.folders import save_edited
from tests.pico import ARCHITECTURES, make_tokenizer, pico_tokens, save_pico

FORMS = ("pivot", "uv")


WITHOUT_EXPERTS = [name for name in ARCHITECTURES if name != "mixtral"]  # see test_experts.py


@pytest.fixture(scope="module")
def compressed(
    pico: Callable[..., Path], text: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[Path, Path]]:
    """``compressed("llama", form="uv")``: folders of the dense and the compressed model."""
    made: dict[str, tuple[Path, Path]] = {}

    def make(
        architecture: str = "llama", model: dict[str, Any] | None = None, **settings: Any
    ) -> tuple[Path, Path]:
        key = repr((architecture, model, settings))
        if key not in made:
            dense = pico(architecture, **(model or {}))
            out = tmp_path_factory.mktemp("out") / architecture
            compress(dense, out, text, **settings)
            made[key] = (dense, out)
        return made[key]

    return make


def block_linears(folder: Path) -> dict[str, nn.Linear]:
    """The plain linears within blocks, by their names in memory."""
    return {
        name: module
        for name, module in load_dense(folder).named_modules()
        if type(module) in (nn.Linear, Conv1D) and re.search(r"\b(layers|h)\.", name)
    }


def floats_of(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors.values() if tensor.is_floating_point())


# -- the model that comes out ------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("architecture", WITHOUT_EXPERTS)
def test_the_loaded_model_computes_with_the_products_of_its_factors(
    architecture: str, form: str, compressed: Callable[..., tuple[Path, Path]]
) -> None:
    dense, out = compressed(architecture, form=form)

    loaded = AutoModelForCausalLM.from_pretrained(out).eval()
    expected = logits_of(load_dense(dense, products(out)), pico_tokens())

    assert expected.std() > 0.1
    torch.testing.assert_close(logits_of(loaded, pico_tokens()), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(expected, logits_of(load_dense(dense), pico_tokens()), atol=1e-3)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("architecture", WITHOUT_EXPERTS)
def test_every_other_tensor_is_the_source_s_byte_for_byte(
    architecture: str, form: str, compressed: Callable[..., tuple[Path, Path]]
) -> None:
    dense, out = compressed(architecture, form=form)
    source, written, modules = stored_tensors(dense), stored_tensors(out), factored_modules(out)

    replaced = {f"{name}.weight" for name in modules}
    others = {"U"} if form == "uv" else {"coef", "pivots"}
    added = {f"{name}.{leaf}" for name in modules for leaf in others}
    assert replaced < set(source)
    assert set(written) == set(source) | added
    for name in set(source) - replaced:
        assert written[name].dtype == source[name].dtype
        assert torch.equal(written[name], source[name]), name


@pytest.mark.parametrize("ratio", [0.1, 0.2, 0.5, 0.8])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("architecture", ["llama", "phi3", "gpt_neox"])
def test_the_ratio_asked_for_is_reached_and_never_more_is_stored(
    architecture: str, form: str, ratio: float, compressed: Callable[..., tuple[Path, Path]]
) -> None:
    dense, out = compressed(architecture, form=form, ratio=ratio)

    linears = block_linears(dense)
    eligible = sum(linear.weight.numel() for linear in linears.values())
    removed = floats_of(stored_tensors(dense)) - floats_of(stored_tensors(out))
    one_rank = min(sum(linear.weight.shape) for linear in linears.values())
    assert removed >= ratio * eligible
    assert removed - ratio * eligible <= max(0.002 * eligible, one_rank)
    report = json.loads((out / "streamcomp_report.json").read_text())
    assert report["model"]["linear_parameters"] == eligible
    assert report["model"]["ratio"] == pytest.approx(removed / eligible)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("architecture", WITHOUT_EXPERTS)
def test_every_linear_of_a_block_is_factored(
    architecture: str, form: str, compressed: Callable[..., tuple[Path, Path]]
) -> None:
    dense, out = compressed(architecture, form=form, allocation="uniform")

    model = load_dense(dense)
    assert {in_memory(model, name) for name in factored_modules(out)} == set(block_linears(dense))


def test_routers_stay_dense_and_are_listed(
    compressed: Callable[..., tuple[Path, Path]],
) -> None:
    dense, out = compressed("mixtral", allocation="uniform")

    source, written = stored_tensors(dense), stored_tensors(out)
    routers = [name for name in source if name.endswith("block_sparse_moe.gate.weight")]
    assert len(routers) == 2
    assert all(torch.equal(written[name], source[name]) for name in routers)
    left = json.loads((out / "streamcomp_report.json").read_text())["left"]
    assert set(left) == {f"model.layers.{block}.mlp.gate" for block in range(2)}
    assert {name.rpartition(".")[2] for name in factored_modules(out)} == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "experts",
    }


def test_a_linear_that_no_rank_makes_smaller_stays_dense_and_the_others_make_up_for_it(
    text: Path, tmp_path: Path
) -> None:
    """The gate of Qwen2-MoE's shared expert has one row: its factors would be larger."""
    config = Qwen2MoeConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=4,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=32,
        vocab_size=264,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    dense, out = tmp_path / "model", tmp_path / "out"
    AutoModelForCausalLM.from_config(config).save_pretrained(dense)
    make_tokenizer().save_pretrained(dense)

    settings: dict[str, Any] = {"ratio": 0.3, "allocation": "uniform", "exclude": r"\.experts"}
    model = compress(dense, out, text, **settings).report["model"]

    linears = block_linears(dense)
    gates = {name for name in linears if name.endswith("shared_expert_gate")}
    assert len(gates) == 2
    assert set(factored_modules(out)) == set(linears) - gates
    assert model["linear_parameters"] == sum(m.weight.numel() for m in linears.values())
    assert model["ratio"] == pytest.approx(0.3, abs=0.01) and model["ratio"] >= 0.3
    found = streamcomp.evaluate(out, str(text), seq_len=16, windows=2, resources=RESOURCES)
    assert found.perplexity > 1


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_factors_have_the_dtype_of_the_source(
    dtype: torch.dtype, form: str, compressed: Callable[..., tuple[Path, Path]]
) -> None:
    dense, out = compressed("llama", model={"dtype": dtype}, form=form)

    floats = {t.dtype for t in stored_tensors(out).values() if t.is_floating_point()}
    assert floats == {dtype}
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert loaded.dtype == dtype
    # rounded factors, computed with in a wide dtype on both sides
    wide = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float64).eval()
    expected = load_dense(dense).double()
    for name, weight in products(out).items():
        expected.get_submodule(in_memory(expected, name)).weight.data = weight
    torch.testing.assert_close(
        logits_of(wide, pico_tokens()), logits_of(expected, pico_tokens()), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "opt"])
def test_a_tied_head_stays_tied(
    architecture: str, compressed: Callable[..., tuple[Path, Path]]
) -> None:
    dense, out = compressed(architecture, model={"tie": True})

    assert "lm_head.weight" not in stored_tensors(out)
    loaded = AutoModelForCausalLM.from_pretrained(out).eval()
    head, embedding = loaded.get_output_embeddings(), loaded.get_input_embeddings()
    assert head.weight is embedding.weight
    expected = logits_of(load_dense(dense, products(out)), pico_tokens())
    torch.testing.assert_close(logits_of(loaded, pico_tokens()), expected, rtol=1e-4, atol=1e-4)


def test_a_source_in_one_file_gives_the_same_tensors_as_one_in_many(
    compressed: Callable[..., tuple[Path, Path]],
) -> None:
    _, many = compressed("llama")
    dense, single = compressed("llama", model={"shard_size": "1GB"})

    assert [path.name for path in dense.glob("*.safetensors")] == ["model.safetensors"]
    first, second = stored_tensors(many), stored_tensors(single)
    assert set(first) == set(second)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_tensors_that_the_model_does_not_use_are_kept(text: Path, tmp_path: Path) -> None:
    extra = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.arange(4.0),  # as old checkpoints
        "lm_head.weight": torch.ones(264, 32),  # beside the embedding that it is tied to
        "something.else": torch.arange(7),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(3, dtype=torch.uint8),
    }
    dense = save_edited(tmp_path / "dense", lambda tensors: tensors.update(extra), tie=True)

    compress(dense, tmp_path / "out", text)

    written = stored_tensors(tmp_path / "out")
    for name, tensor in extra.items():
        assert written[name].dtype == tensor.dtype and torch.equal(written[name], tensor)


def test_each_tensor_keeps_the_dtype_it_has(text: Path, tmp_path: Path) -> None:
    def widen(tensors: dict[str, Tensor]) -> None:
        for name in tensors:
            if "norm" in name or "down_proj" in name:
                tensors[name] = tensors[name].float()

    dense, out = save_edited(tmp_path / "dense", widen, dtype=torch.bfloat16), tmp_path / "out"
    compress(dense, out, text)

    source, written = stored_tensors(dense), stored_tensors(out)
    assert {tensor.dtype for tensor in source.values()} == {torch.bfloat16, torch.float32}
    assert all(written[name].dtype == tensor.dtype for name, tensor in source.items())
    for name in factored_modules(out):
        assert written[f"{name}.coef"].dtype == source[f"{name}.weight"].dtype


def test_a_model_of_links_as_the_hub_s_cache_has_it_is_read(
    pico: Callable[..., Path], text: Path, tmp_path: Path, compressed: Callable[..., Any]
) -> None:
    cached = tmp_path / "models--somebody--pico"
    links, blobs = cached / "snapshots" / "0123abcd", cached / "blobs"
    links.mkdir(parents=True)
    shutil.copytree(pico("llama"), blobs)
    for path in blobs.iterdir():
        (links / path.name).symlink_to(Path("../../blobs") / path.name)

    compress(links, tmp_path / "out", text)

    assert stored_files(tmp_path / "out") == stored_files(compressed("llama")[1])
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())


def test_the_folder_is_a_whole_model_and_nothing_else(
    compressed: Callable[..., tuple[Path, Path]],
) -> None:
    dense, out = compressed("llama")

    index = json.loads((out / "model.safetensors.index.json").read_text())
    placed = {
        name: shard.name for shard in sorted(out.glob("*.safetensors")) for name in load_file(shard)
    }
    assert index["weight_map"] == placed
    tensors = stored_tensors(out)
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    assert index["metadata"]["total_size"] == size
    assert {path.name for path in out.iterdir()} == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors.index.json",
        "streamcomp_plugin.py",
        "streamcomp_report.html",
        "streamcomp_report.json",
        "tokenizer.json",
        "tokenizer_config.json",
        *set(placed.values()),
    }
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (out / name).read_bytes() == (dense / name).read_bytes()
    config = config_of(out)
    assert config.pop("quantization_config")["quant_method"] == "streamcomp"
    assert set(config.pop("auto_map")) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
    assert config == config_of(dense)


def test_the_source_is_left_as_it_was(
    pico: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    dense = pico("llama")
    before = tree(dense)

    compress(dense, tmp_path / "out", text)

    assert tree(dense) == before


def test_a_pivoted_linear_has_a_higher_rank_than_a_plain_one_in_no_more_numbers(
    compressed: Callable[..., tuple[Path, Path]],
) -> None:
    (_, pivot), (_, plain) = (
        compressed("llama", form=form, allocation="uniform") for form in FORMS
    )

    higher, lower = factored_modules(pivot), factored_modules(plain)
    assert all(higher[name]["rank"] > lower[name]["rank"] for name in higher)
    assert json.loads((pivot / "streamcomp_report.json").read_text())["model"]["ratio"] >= 0.2


# -- statistics --------------------------------------------------------------------------


def whitened(weight: Tensor, inputs: Tensor, rank: int) -> Tensor:
    """SVD-LLM as its paper writes it: truncate the SVD of W S, with S S^T = X X^T, in fp64."""
    root = torch.linalg.cholesky(inputs.T @ inputs)  # (n, n)
    left, values, right = torch.linalg.svd(weight.double() @ root, full_matrices=False)
    kept = left[:, :rank] * values[:rank] @ right[:rank]
    product: Tensor = torch.linalg.solve_triangular(root.T, kept.T, upper=True).T
    return product


def truncated(weight: Tensor, inputs: Tensor, rank: int) -> Tensor:
    """The same by the principal components of the outputs (ROM)."""
    left: Tensor = torch.linalg.svd(weight.double() @ inputs.T, full_matrices=False).U[:, :rank]
    return left @ (left.T @ weight.double())


@torch.no_grad()
def sequential_reference(
    folder: Path,
    tokens: Tensor,
    ranks: dict[str, int],
    statistics: str,
    best: Callable[..., Tensor],
) -> dict[str, Tensor]:
    """W' of all linears, block after block on the whole model in memory."""
    model = load_dense(folder)
    names = {in_memory(model, name): name for name in ranks}
    replaced: dict[str, Tensor] = {}
    for block in range(2):
        members = [name for name in names if f"layers.{block}." in name]
        with inputs_of(model, members) as seen:
            model(input_ids=tokens, use_cache=False)
        for name in members:
            linear = model.get_submodule(name)
            new = best(linear.weight, torch.cat(seen[name]), ranks[names[name]])
            replaced[names[name]] = new
            if statistics == "compressed":
                linear.weight.data = new.to(linear.weight.dtype)
    return replaced


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("statistics", ["dense", "compressed"])
@pytest.mark.parametrize("architecture", ["llama", "gemma3", "phi3", "opt", "gpt_neox"])
def test_the_factors_are_those_of_a_plain_reference_on_the_whole_model(
    architecture: str,
    statistics: str,
    form: str,
    text: Path,
    compressed: Callable[..., tuple[Path, Path]],
) -> None:
    dense, out = compressed(
        architecture,
        model={"dtype": torch.float64},
        method="svd-llm",
        form=form,
        statistics=statistics,
        ratio=0.4,
    )
    tokens = load_windows(dense, [str(text)], SMALL["samples"], SMALL["seq_len"], 0).tokens.long()
    ranks = {name: spec["rank"] for name, spec in factored_modules(out).items()}

    # behind OPT's ReLU some channels are always zero: nothing to take a Cholesky factor of
    best = truncated if architecture == "opt" else whitened
    reference = sequential_reference(dense, tokens, ranks, statistics, best)

    found = products(out)
    assert set(found) == set(reference)
    for name, expected in reference.items():
        assert (found[name] - expected).norm() <= 1e-7 * expected.norm(), name


def test_the_two_statistics_differ_behind_the_first_block_and_not_in_it(
    compressed: Callable[..., tuple[Path, Path]],
) -> None:
    _, first = compressed("llama", method="svd-llm", statistics="dense")
    _, second = compressed("llama", method="svd-llm", statistics="compressed")

    one, other = stored_tensors(first), stored_tensors(second)
    # the bases of dense statistics are rounded to fp32, as they would be kept for other outputs
    same = {n for n in one if torch.allclose(one[n].double(), other[n].double(), 1e-4, 1e-6)}
    weights = {f"{name}.weight" for name in factored_modules(first)}
    assert {name for name in weights if "layers.0." in name} <= same
    assert not {name for name in weights if "layers.1." in name} & same


@pytest.mark.parametrize(
    "settings",
    [{"method": "svd-llm", "statistics": "dense"}]
    + [{"method": "svd-llm", "statistics": "compressed"}]
    + [{"method": "two-sided"}, {"method": "two-sided", "update": True}],
    ids=str,
)
def test_the_batch_size_does_not_matter(
    settings: dict[str, Any], compressed: Callable[..., tuple[Path, Path]]
) -> None:
    wide = {"dtype": torch.float64}
    results = [
        products(compressed("llama", model=wide, batch=batch, **settings)[1]) for batch in (1, 3, 8)
    ]

    for other in results[1:]:
        for name, expected in results[0].items():
            assert (other[name] - expected).norm() <= 1e-9 * expected.norm(), name


def test_the_seed_draws_the_windows(pico: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    dense = pico("llama")
    for name, seed in (("first", 0), ("same", 0), ("other", 1)):
        compress(dense, tmp_path / name, text, seed=seed)

    first, same, other = (stored_tensors(tmp_path / n) for n in ("first", "same", "other"))
    changed = "model.layers.0.self_attn.q_proj.weight"
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first[changed], other[changed])


# -- which linears -----------------------------------------------------------------------


def test_include_and_exclude_choose_the_linears(
    pico: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    dense, out = pico("llama"), tmp_path / "out"

    result = compress(
        dense, out, text, include=r"mlp\.", exclude=r"0\.mlp\.up|down_proj", ratio=0.3
    )

    chosen = {
        f"model.layers.{name}" for name in ("0.mlp.gate_proj", "1.mlp.gate_proj", "1.mlp.up_proj")
    }
    assert set(factored_modules(out)) == chosen
    model = result.report["model"]
    assert model["linear_parameters"] == 3 * 32 * 48
    assert model["ratio"] == pytest.approx(0.3, abs=(32 + 48) / (3 * 32 * 48))
    left = result.report["left"]
    assert left["model.layers.0.self_attn.q_proj"] == "not included"
    assert left["model.layers.0.mlp.up_proj"] == "excluded"


def test_a_ratio_beyond_rank_one_is_refused_with_the_one_that_can_be(
    pico: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        RecipeError, match=r"ratio 0\.97 cannot be reached: rank 1 everywhere removes 0\.9"
    ):
        compress(pico("llama"), tmp_path / "out", text, ratio=0.97)

    assert not (tmp_path / "out").exists()


# -- called again ------------------------------------------------------------------------


def test_a_finished_job_is_recognised_and_nothing_is_written(
    pico: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    dense, out = pico("llama"), tmp_path / "out"
    first = compress(dense, out, text)
    before = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in out.rglob("*")}

    second = compress(dense, out, text, progress=(notes := Notes()))

    assert (first.already_done, second.already_done) == (False, True)
    assert second.report == first.report
    assert notes.done == -1  # nothing was begun
    assert {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in out.rglob("*")} == before


CHANGES: list[dict[str, Any]] = [
    {"ratio": 0.3},
    {"form": "uv"},
    {"allocation": "uniform"},
    {"method": "svd-llm"},
    {"update": True},
    {"refine": 3},
    {"blocks": "last:1"},
    {"damping": 0.1},
    {"store_every": 2},
    {"samples": 7},
    {"seq_len": 12},
    {"batch": 2},
    {"seed": 1},
    {"include": "mlp"},
    {"exclude": "mlp"},
    {"calibration": ()},
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: next(iter(change)))
def test_another_recipe_in_the_same_folder_is_refused_by_the_name_of_the_field(
    change: dict[str, Any], compressed: Callable[..., tuple[Path, Path]], text: Path
) -> None:
    dense, out = compressed("llama")
    before = tree(out)

    with pytest.raises(JobMismatchError) as caught:
        compress(dense, out, text, **change)

    assert caught.value.field == next(iter(change))
    assert caught.value.field in str(caught.value)
    assert tree(out) == before


@pytest.mark.parametrize("change", CHANGES[:3], ids=lambda change: next(iter(change)))
def test_so_it_is_in_the_folder_of_an_unfinished_job(
    change: dict[str, Any], pico: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    dense, out = pico("llama"), tmp_path / "out"
    with pytest.raises(Interrupted, match="block 0"):
        compress(dense, out, text, progress=Interrupt(8))
    before = tree(out)

    with pytest.raises(JobMismatchError) as caught:
        compress(dense, out, text, **change)

    assert caught.value.field == next(iter(change))
    assert tree(out) == before
    assert not compress(dense, out, text).already_done


def test_another_model_in_the_same_folder_is_refused(
    pico: Callable[..., Path], compressed: Callable[..., tuple[Path, Path]], text: Path
) -> None:
    _, out = compressed("llama")

    with pytest.raises(JobMismatchError, match="another model") as caught:
        compress(pico("llama", seed=1), out, text)

    assert caught.value.field == "source"


@pytest.mark.parametrize("statistics", ["dense", "compressed"])
def test_a_job_interrupted_after_any_step_goes_on_to_the_same_bytes(
    statistics: str, pico: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    dense = pico("gemma2")
    settings: dict[str, Any] = {"method": "svd-llm", "statistics": statistics}
    compress(dense, tmp_path / "whole", text, **settings)
    expected = stored_files(tmp_path / "whole")
    names = ["tokenize", "embed", "block 0", "block 1", "copy the rest"]

    for after in range(len(names)):
        out = tmp_path / f"after{after}"
        with pytest.raises(Interrupted, match=names[after]):
            compress(dense, out, text, progress=Interrupt(after), **settings)
        assert not (out / "config.json").exists()
        notes = Notes()
        result = compress(dense, out, text, progress=notes, **settings)

        assert (notes.done, notes.steps) == (after + 1, names[after + 1 :])
        assert stored_files(out) == expected
        assert [step["step"] for step in result.report["steps"]] == names


@pytest.mark.parametrize("method", ["rom", "swsc", "svd-llm", "two-sided"])
def test_transposed_linears_are_factored_by_every_method_and_in_any_number_of_parts(
    method: str, pico: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    dense, tied = pico("gpt2", tie=True), method != "swsc"
    settings: dict[str, Any] = {"method": method}
    settings |= {"update": True, "refine": 1} if tied else {"clusters": 4}
    compress(dense, tmp_path / "whole", text, **settings)

    with pytest.raises(Interrupted):
        compress(dense, tmp_path / "out", text, progress=Interrupt(2), **settings)
    compress(dense, tmp_path / "out", text, **settings)

    assert stored_files(tmp_path / "out") == stored_files(tmp_path / "whole")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    expected = logits_of(load_dense(dense, products(tmp_path / "out")), pico_tokens())
    torch.testing.assert_close(logits_of(loaded, pico_tokens()), expected, rtol=1e-4, atol=1e-4)


def stored_files(folder: Path) -> dict[str, bytes]:
    """Shards, index and config of ``folder`` byte for byte."""
    files = [*folder.glob("*.safetensors"), *folder.glob("*.index.json"), folder / "config.json"]
    return {path.name: path.read_bytes() for path in files}


def test_the_work_may_lie_in_another_folder(
    pico: Callable[..., Path], text: Path, tmp_path: Path, compressed: Callable[..., Any]
) -> None:
    dense, out, work = pico("llama"), tmp_path / "out", tmp_path / "deep" / "work"
    with pytest.raises(Interrupted):
        compress(dense, out, text, work_dir=work, progress=Interrupt(2))
    assert (work / "journal.jsonl").exists() and not (out / ".streamcomp").exists()
    compress(dense, out, text, work_dir=work, progress=(notes := Notes()))

    assert notes.done == 3
    assert not work.exists()
    assert stored_files(out) == stored_files(compressed("llama")[1])


def test_work_of_one_folder_does_not_serve_another(
    pico: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    dense, work = pico("llama"), tmp_path / "work"
    with pytest.raises(Interrupted):
        compress(dense, tmp_path / "first", text, work_dir=work, progress=Interrupt(8))

    with pytest.raises(OutputError, match="model-00001-of-00003"):
        compress(dense, tmp_path / "second", text, work_dir=work)

    assert not (tmp_path / "second").exists()
    assert not compress(dense, tmp_path / "first", text, work_dir=work).already_done


def test_a_shard_that_was_removed_from_an_unfinished_job_is_missed_at_once(
    pico: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    dense, out = pico("llama"), tmp_path / "out"
    with pytest.raises(Interrupted):
        compress(dense, out, text, progress=Interrupt(9))
    (out / "model-00001-of-00003.safetensors").unlink()

    compress(dense, out, text, progress=(notes := Notes()))

    assert "model-00001-of-00003.safetensors is missing" in notes.texts[0]
    compress(dense, tmp_path / "whole", text)
    for shard in (tmp_path / "whole").glob("*.safetensors"):
        assert (out / shard.name).read_bytes() == shard.read_bytes()


def test_a_renamed_folder_of_an_unfinished_job_goes_on(
    pico: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    dense, out = pico("llama"), tmp_path / "out"
    with pytest.raises(Interrupted):
        compress(dense, out, text, progress=Interrupt(2))
    shutil.move(out, tmp_path / "renamed")

    compress(dense, tmp_path / "renamed", text, progress=(notes := Notes()))

    assert notes.done == 3


# -- the report --------------------------------------------------------------------------


def test_the_report_tells_what_was_done(compressed: Callable[..., tuple[Path, Path]]) -> None:
    dense, out = compressed("llama")
    report = json.loads((out / "streamcomp_report.json").read_text())

    source, written = stored_tensors(dense), stored_tensors(out)
    model = report["model"]
    assert model["parameters"] == floats_of(source)
    assert model["parameters_kept"] == floats_of(written)
    assert model["bytes"] == sum(t.numel() * t.element_size() for t in source.values())
    assert model["bytes_kept"] == sum(t.numel() * t.element_size() for t in written.values())
    assert report["windows"] == SMALL["samples"]
    assert {linear["name"]: linear["rank"] for linear in report["linears"]} == {
        name: spec["rank"] for name, spec in factored_modules(out).items()
    }
    assert all(0 < linear["relative_loss"] < 1 for linear in report["linears"])
    memory = report["memory"]
    assert 0 < memory["peak_bytes"] <= memory["budget_bytes"]
    for step in report["steps"]:
        assert step["seconds"] >= 0 and step["peak_bytes"] > 0 and step["predicted_bytes"] > 0


def test_a_model_of_one_block_is_compressed_too(text: Path, tmp_path: Path) -> None:
    dense = save_pico(tmp_path / "one", blocks=1)
    several: tuple[dict[str, Any], ...] = (
        {},
        {"update": True, "refine": 4},
        {"method": "svd-llm"},
        {"method": "svd-llm", "statistics": "compressed"},
        {"method": "svd-llm", "refine": 4, "ratio": (0.2,)},
        {"method": "swsc"},
    )
    for number, settings in enumerate(several):
        out = tmp_path / str(number)
        compress(dense, out, text, **settings)

        loaded = AutoModelForCausalLM.from_pretrained(out).eval()
        expected = logits_of(load_dense(dense, products(out)), pico_tokens())
        torch.testing.assert_close(logits_of(loaded, pico_tokens()), expected, rtol=1e-4, atol=1e-4)


def test_without_a_source_the_python_reference_is_read(
    pico: Callable[..., Path], tmp_path: Path
) -> None:
    result = compress(pico("llama"), tmp_path / "out", "", calibration=())

    assert result.report["windows"] == SMALL["samples"]
    assert result.report["recipe"]["calibration"] in ((), [])
