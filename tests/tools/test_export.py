"""A compressed model written out for tools that know no factors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModel, AutoModelForCausalLM

import streamcomp
from streamcomp import OutputError, RecipeError, UnsupportedModelError
from streamcomp.forms.runtime import (
    FORMAT_VERSION,
    FactoredLinear,
    LowRankLinear,
    SharedLinear,
)
from streamcomp.forms.shared import Shared
from streamcomp.linalg.channel_sharing import AXES, share_channels
from streamcomp.tools import export
from tests.jobs import (
    RESOURCES,
    Interrupted,
    as_stored,
    compress,
    config_of,
    factored_modules,
    in_memory,
    load_dense,
    logits_of,
    products,
    run_python,
    stored_tensors,
    tree,
)
from tests.model.folders import edit_config
from tests.pico import ARCHITECTURES, pico_tokens


@pytest.fixture(scope="module")
def compressed(
    pico: Callable[..., Path], text: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """``compressed("llama", form="uv")``: a compressed pico model, not to be changed."""
    made: dict[str, Path] = {}

    def make(architecture: str = "llama", form: str = "pivot", **model: Any) -> Path:
        key = repr((architecture, form, model))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("out") / f"{architecture}-{form}"
            compress(pico(architecture, **model), made[key], text, form=form, ratio=0.3)
        return made[key]

    return make


@pytest.mark.parametrize("form", ["pivot", "uv"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_dense_export_is_a_plain_model_with_the_same_logits(
    architecture: str,
    form: str,
    compressed: Callable[..., Path],
    pico: Callable[..., Path],
    tmp_path: Path,
) -> None:
    out, dest = compressed(architecture, form), tmp_path / "dense"

    assert streamcomp.export(out, dest) == dest

    assert config_of(dest) == config_of(pico(architecture))
    source, written = stored_tensors(pico(architecture)), stored_tensors(dest)
    assert {name: (t.dtype, t.shape) for name, t in written.items()} == {
        name: (t.dtype, t.shape) for name, t in source.items()
    }
    model = AutoModelForCausalLM.from_pretrained(dest).eval()
    assert not any(isinstance(module, FactoredLinear) for module in model.modules())
    for name, product in products(out).items():
        weight = as_stored(model.get_submodule(in_memory(model, name)), product)
        torch.testing.assert_close(written[f"{name}.weight"].double(), weight, rtol=1e-5, atol=1e-5)
    expected = logits_of(load_dense(out), pico_tokens())
    torch.testing.assert_close(logits_of(model, pico_tokens()), expected, rtol=1e-4, atol=1e-4)


PLAIN = """
import json, sys
sys.modules["streamcomp"] = None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
with torch.no_grad():
    print(json.dumps(model(torch.tensor([json.loads(sys.argv[2])])).logits.tolist()))
AutoTokenizer.from_pretrained(sys.argv[1])
"""


def test_a_dense_export_needs_no_streamcomp(
    compressed: Callable[..., Path], tmp_path: Path
) -> None:
    out, dest = compressed("gemma2", dtype=torch.bfloat16), tmp_path / "dense"
    streamcomp.export(out, dest)

    done = run_python(
        "-c", PLAIN, dest, "[5, 9, 77, 120]", cwd=tmp_path, environment={"PYTHONPATH": ""}
    )

    assert done.code == 0, done.err[-2000:]
    expected = logits_of(load_dense(dest), torch.tensor([[5, 9, 77, 120]]))
    torch.testing.assert_close(torch.tensor(json.loads(done.out)), expected.float())
    assert {tensor.dtype for tensor in stored_tensors(dest).values()} == {torch.bfloat16}


@pytest.mark.parametrize("form", ["pivot", "uv"])
@pytest.mark.parametrize("architecture", ["llama", "phi3", "opt", "mixtral"])
def test_an_export_in_two_factors_has_the_same_ranks_and_logits(
    architecture: str, form: str, compressed: Callable[..., Path], tmp_path: Path
) -> None:
    out, dest = compressed(architecture, form), tmp_path / "uv"

    streamcomp.export(out, dest, form="uv")

    assert {name: spec["form"] for name, spec in factored_modules(dest).items()} == dict.fromkeys(
        factored_modules(out), "uv"
    )
    assert {name: _ranks(spec) for name, spec in factored_modules(dest).items()} == {
        name: _ranks(spec) for name, spec in factored_modules(out).items()
    }
    assert (dest / "streamcomp_plugin.py").exists()
    model = AutoModelForCausalLM.from_pretrained(dest).eval()
    factored = [m for m in model.modules() if isinstance(m, FactoredLinear)]
    assert {type(module) for module in factored} == {LowRankLinear}
    expected = logits_of(load_dense(out), pico_tokens())
    torch.testing.assert_close(logits_of(model, pico_tokens()), expected, rtol=1e-4, atol=1e-4)
    if form == "uv":
        first, second = stored_tensors(out), stored_tensors(dest)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_source_of_an_export_is_left_as_it_was(
    compressed: Callable[..., Path], tmp_path: Path
) -> None:
    out = compressed("llama")
    before = tree(out)

    streamcomp.export(out, tmp_path / "dense")

    assert tree(out) == before


def test_a_model_that_transformers_saved_is_exported_too(
    compressed: Callable[..., Path], tmp_path: Path
) -> None:
    """Its factors lie in other shards than its weights, and in another order."""
    saved = tmp_path / "saved"
    load_dense(compressed("llama")).save_pretrained(saved, max_shard_size="5KB")
    assert len(list(saved.glob("*.safetensors"))) > 10

    for form in ("dense", "uv"):
        streamcomp.export(saved, tmp_path / form, form=form)

        expected = logits_of(load_dense(saved), pico_tokens())
        found = logits_of(load_dense(tmp_path / form), pico_tokens())
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_model_saved_as_another_class_is_refused(
    compressed: Callable[..., Path], tmp_path: Path
) -> None:
    """Its tensors lost their prefix: none of the factored linears would be recognised."""
    base = tmp_path / "base"
    AutoModel.from_pretrained(compressed("llama")).save_pretrained(base)

    with pytest.raises(UnsupportedModelError, match="stores .* by another name"):
        streamcomp.export(base, tmp_path / "dense")


def test_an_exported_model_has_the_perplexity_of_its_source(
    compressed: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    out, dest = compressed("llama"), tmp_path / "dense"
    streamcomp.export(out, dest)

    first, second = (
        streamcomp.evaluate(folder, str(text), seq_len=16, windows=4, resources=RESOURCES)
        for folder in (out, dest)
    )

    assert second.nll == pytest.approx(first.nll, rel=1e-5)
    assert second.parameters > first.parameters


class StopAt:
    """Writes shards until number ``last`` is due."""

    def __init__(self, last: int) -> None:
        self.last, self.written = last, 0
        self.write = export.write_shard  # type: ignore[attr-defined]

    def __call__(self, path: Path, entries: Any) -> None:
        if self.written == self.last:
            raise Interrupted(path.name)
        self.write(path, entries)
        self.written += 1


@pytest.mark.parametrize("last", [0, 1, 2])
def test_an_interrupted_export_goes_on_after_its_last_shard(
    last: int, compressed: Callable[..., Path], tmp_path: Path
) -> None:
    out, dest, whole = compressed("llama"), tmp_path / "dense", tmp_path / "whole"
    streamcomp.export(out, whole)
    with (
        mock.patch.object(export, "write_shard", StopAt(last)),
        pytest.raises(Interrupted),
    ):
        streamcomp.export(out, dest)
    assert not (dest / "config.json").exists()
    assert len(list(dest.glob("*.safetensors"))) == last

    with mock.patch.object(export, "write_shard", rest := StopAt(9)):
        streamcomp.export(out, dest)

    assert rest.written == 3 - last
    assert tree(dest) == tree(whole)


def test_an_unfinished_export_is_not_mixed_with_another(
    compressed: Callable[..., Path], tmp_path: Path
) -> None:
    dest = tmp_path / "dest"
    with mock.patch.object(export, "write_shard", StopAt(1)), pytest.raises(Interrupted):
        streamcomp.export(compressed("llama"), dest)
    before = tree(dest)

    for out, form in ((compressed("llama"), "uv"), (compressed("llama", "uv"), "dense")):
        with pytest.raises(OutputError, match="holds another unfinished export"):
            streamcomp.export(out, dest, form=form)

    assert tree(dest) == before


def test_a_finished_export_is_not_overwritten(
    compressed: Callable[..., Path], tmp_path: Path
) -> None:
    dest = tmp_path / "dest"
    streamcomp.export(compressed("llama"), dest)
    before = tree(dest)

    with pytest.raises(OutputError, match="is not an empty folder"):
        streamcomp.export(compressed("llama"), dest)

    assert tree(dest) == before


# -- what only one of the two forms can hold


UP = "model.layers.0.mlp.up_proj"


def factored_once(dense: Path, target: Path, spec: dict[str, Any], given: Any) -> Path:
    """A copy of ``dense`` in which one linear, ``UP``, is of ``spec`` and has ``given`` tensors."""
    shutil.copytree(dense, target)
    tensors = stored_tensors(target)
    for path in [*target.glob("*.safetensors"), *target.glob("*.index.json")]:
        path.unlink()
    del tensors[f"{UP}.weight"]
    tensors |= {f"{UP}.{leaf}": tensor for leaf, tensor in given.items()}
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    modules = {UP: {"dtype": "F32", **spec}}
    quantization = {"quant_method": "streamcomp", "version": FORMAT_VERSION, "modules": modules}
    edit_config(target, quantization_config=quantization)
    return target


@pytest.mark.parametrize("axis", AXES)
def test_shared_channels_are_exported_dense_and_not_as_two_factors(
    axis: str, pico: Callable[..., Path], tmp_path: Path
) -> None:
    source = stored_tensors(pico("llama"))
    weight = source[f"{UP}.weight"]
    shared = share_channels(weight, None, int(0.7 * weight.numel()), axis=axis, dtype=torch.float32)
    clusters, rank = shared.codebook.shape[AXES.index(axis)], shared.left.shape[1]
    spec = {"form": "shared", "rank": rank, "clusters": clusters, "axis": axis}
    tensors = Shared().encode_channels(shared, torch.float32)
    out, dest = factored_once(pico("llama"), tmp_path / "out", spec, tensors), tmp_path / "dense"
    model = load_dense(out)
    expected = logits_of(model, pico_tokens())

    streamcomp.export(out, dest)

    assert isinstance(model.get_submodule(UP), SharedLinear)
    assert model.get_submodule(UP).labels.dtype == torch.int16
    written = stored_tensors(dest)
    assert {name for name, t in source.items() if not torch.equal(t, written[name])} == {
        f"{UP}.weight"
    }
    found = written[f"{UP}.weight"].double()
    torch.testing.assert_close(found, shared.dense(), rtol=1e-5, atol=1e-5)
    dense = logits_of(load_dense(dest), pico_tokens())
    torch.testing.assert_close(dense, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(RecipeError, match=f"{UP} has channels that share.*--form dense"):
        streamcomp.export(out, tmp_path / "uv", form="uv")
    assert not (tmp_path / "uv").exists()


def _ranks(spec: dict[str, Any]) -> Any:
    """The rank of a linear, or those of all experts."""
    return spec["ranks"] if "ranks" in spec else spec["rank"]
