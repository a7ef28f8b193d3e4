from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from streamcomp.errors import SourceError, UnsupportedModelError
from streamcomp.model.taps import LayerInputs, check_same_inputs, input_bytes, views_of_one
from tests.model.folders import edit_config, open_skeleton, save_edited
from tests.pico import ARCHITECTURES, save_pico

MODULES = {"model.layers.0.mlp.up_proj": {"form": "uv", "rank": 4, "dtype": "F32"}}


def streamcomp_config(**changes: Any) -> dict[str, Any]:
    return {"quant_method": "streamcomp", "version": 1, "modules": MODULES, **changes}


# -- what is found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_tensor_on_disk_is_in_one_block_or_outside(
    architecture: str, pico: Callable[..., Path]
) -> None:
    skeleton = open_skeleton(pico(architecture))

    names = [info.name for info in skeleton.other_tensors()]
    for number in range(len(skeleton)):
        names += [info.name for info in skeleton.block_tensors(number)]

    assert len(skeleton) == 2
    assert sorted(names) == sorted(skeleton.index.tensors)
    assert skeleton.unclaimed == []


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_skeleton_holds_no_weight(architecture: str, pico: Callable[..., Path]) -> None:
    skeleton = open_skeleton(pico(architecture))

    assert all(value.is_meta for value in skeleton.model.parameters())
    assert sum(value.nbytes for value in skeleton.model.buffers() if not value.is_meta) < 4096


@pytest.mark.parametrize(
    ("architecture", "kinds"), [("llama", 1), ("mixtral", 1), ("gemma2", 2), ("gemma3", 2)]
)
def test_blocks_that_run_the_same_code_are_of_one_kind(
    architecture: str, kinds: int, pico: Callable[..., Path]
) -> None:
    skeleton = open_skeleton(pico(architecture, blocks=4))

    assert len({skeleton.block_kind(number) for number in range(4)}) == kinds


@pytest.mark.parametrize(
    ("architecture", "before"),
    [
        ("llama", {"model.embed_tokens"}),
        ("opt", {"model.decoder.embed_tokens", "model.decoder.embed_positions"}),
    ],
)
def test_the_modules_that_run_before_the_blocks_are_found(
    architecture: str, before: set[str], pico: Callable[..., Path]
) -> None:
    skeleton = open_skeleton(pico(architecture))

    assert skeleton.rehearsal.before == before
    assert all(value.is_meta for value in skeleton.model.parameters())


def test_most_bytes_decide_the_dtype(tmp_path: Path) -> None:
    folder = save_edited(
        tmp_path,
        lambda tensors: tensors.update({k: v.float() for k, v in tensors.items() if "norm" in k}),
        dtype=torch.bfloat16,
    )

    assert open_skeleton(folder).dtype == torch.bfloat16


def test_blocks_that_return_tuples_are_recorded_at_any_depth(tmp_path: Path) -> None:
    # Each takes the first of what the one before returned: of a bare tensor, its first window.
    skeleton = open_skeleton(save_pico(tmp_path, "gpt_neo", blocks=6))

    hidden, layer_inputs = skeleton.dry_capture(2, 10)

    assert (hidden.shape, len(layer_inputs)) == ((2, 10, skeleton.hidden_size), 6)


def test_inputs_of_a_batch_are_views_of_those_of_one_window() -> None:
    mask, positions = torch.randn(1, 1, 4, 4), torch.arange(4)[None]
    own = torch.randn(3, 2)
    one = [
        LayerInputs((mask,), {"positions": positions, "own": own[:1], "flag": True})
        for _ in range(2)
    ]
    batch = [
        LayerInputs((mask.repeat(3, 1, 1, 1),), {"positions": positions, "own": own, "flag": True})
        for _ in range(2)
    ]

    shared = views_of_one(batch, one)

    for inputs, made in zip(shared, batch, strict=True):
        assert torch.equal(inputs.args[0], made.args[0])
        assert inputs.args[0].untyped_storage().data_ptr() == mask.untyped_storage().data_ptr()
        assert inputs.kwargs["own"] is own  # its windows differ
        assert inputs.kwargs["flag"] is True
    numbers = mask.nbytes + positions.nbytes + own.nbytes
    assert input_bytes(shared) == numbers
    assert input_bytes(batch) == numbers + 5 * mask.nbytes


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_dry_capture_has_the_shapes_of_a_real_one(
    architecture: str, pico: Callable[..., Path]
) -> None:
    skeleton = open_skeleton(pico(architecture))

    hidden, layer_inputs = skeleton.dry_capture(3, 10)

    assert hidden.shape == (3, 10, 32)
    assert len(layer_inputs) == 2
    assert all(value.is_meta for value in skeleton.model.parameters())


def test_calls_that_differ_are_refused() -> None:
    first = [LayerInputs((), {"mask": None, "position": (torch.zeros(2), torch.ones(2))})]
    same = [LayerInputs((), {"mask": None, "position": (torch.zeros(2), torch.ones(2))})]
    other = [LayerInputs((), {"mask": None, "position": (torch.zeros(2), torch.zeros(2))})]

    check_same_inputs(first, same)
    with pytest.raises(UnsupportedModelError, match="depends on the tokens"):
        check_same_inputs(first, other)


# -- what is refused


def plant_code(folder: Path, marker: Path) -> None:
    """Modeling code as a hostile repository would ship it."""
    code = f"open({str(marker)!r}, 'w').close()\n"
    for name in ("modeling_custom.py", "configuration_custom.py", "tokenization_custom.py"):
        (folder / name).write_text(code)
    edit_config(
        folder,
        auto_map={
            "AutoConfig": "configuration_custom.CustomConfig",
            "AutoModelForCausalLM": "modeling_custom.CustomModel",
        },
    )


def test_the_code_of_an_unknown_model_is_never_run(tmp_path: Path) -> None:
    folder, marker = save_pico(tmp_path / "model"), tmp_path / "marker"
    plant_code(folder, marker)
    edit_config(folder, model_type="custom", architectures=["CustomModel"])

    with pytest.raises(UnsupportedModelError, match="'custom' is unknown .* is never run"):
        open_skeleton(folder)

    assert not marker.exists()


def test_the_code_in_the_folder_of_a_known_model_is_never_run(tmp_path: Path) -> None:
    folder, marker = save_pico(tmp_path / "model"), tmp_path / "marker"
    plant_code(folder, marker)

    skeleton = open_skeleton(folder)

    assert type(skeleton.model).__module__.startswith("transformers.")
    assert not marker.exists()


def test_a_model_type_that_transformers_does_not_know_is_refused(tmp_path: Path) -> None:
    folder = edit_config(save_pico(tmp_path), model_type="never-heard-of")

    with pytest.raises(UnsupportedModelError, match="'never-heard-of' is unknown to transformers"):
        open_skeleton(folder)


def test_a_model_that_is_no_language_model_is_refused(tmp_path: Path) -> None:
    folder = edit_config(save_pico(tmp_path), model_type="vit")

    with pytest.raises(UnsupportedModelError, match="vit: transformers has no causal"):
        open_skeleton(folder)


@pytest.mark.parametrize(
    "settings", [{"model_type": None}, {"model_type": ""}, {"num_attention_heads": "four"}]
)
def test_a_config_that_makes_no_sense_is_refused(tmp_path: Path, settings: dict[str, Any]) -> None:
    folder = edit_config(save_pico(tmp_path), **settings)

    with pytest.raises(SourceError, match=r"config\.json"):
        open_skeleton(folder)


def test_a_model_without_blocks_is_refused(tmp_path: Path) -> None:
    folder = edit_config(save_pico(tmp_path), num_hidden_layers=0)

    with pytest.raises(UnsupportedModelError, match="blocks"):
        open_skeleton(folder)


@pytest.mark.parametrize(
    ("quantization", "named"),
    [
        ({"quant_method": "fbgemm_fp8"}, "fbgemm_fp8"),
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq", "bits": 4}, "awq"),
        ({"quant_method": "compressed-tensors"}, "compressed-tensors"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"bits": 4}, "None"),
        ("fp8", "None"),
    ],
)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_a_model_quantised_by_others_is_refused(
    tmp_path: Path, quantization: Any, named: str, key: str, nested: bool
) -> None:
    settings = {key: quantization}
    folder = edit_config(save_pico(tmp_path), **({"text_config": settings} if nested else settings))

    with pytest.raises(UnsupportedModelError, match=rf"already quantised \({named}\).*original"):
        open_skeleton(folder)


@pytest.mark.parametrize(
    "packed", ["self_attn.q_proj.qweight", "mlp.up_proj.weight_packed", "mlp.up_proj.weight.absmax"]
)
def test_packed_weights_are_refused_also_without_a_word_in_the_config(
    tmp_path: Path, packed: str
) -> None:
    name = f"model.layers.0.{packed}"
    folder = save_edited(
        tmp_path, lambda tensors: tensors.update({name: torch.zeros(2, dtype=torch.int32)})
    )

    with pytest.raises(UnsupportedModelError, match=f"{name} is I32.*already quantised.*original"):
        open_skeleton(folder)


def test_fp8_weights_are_refused_also_without_a_word_in_the_config(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    folder = save_edited(
        tmp_path, lambda tensors: tensors.update({name: tensors[name].to(torch.float8_e4m3fn)})
    )

    with pytest.raises(UnsupportedModelError, match=f"{name} is F8_E4M3"):
        open_skeleton(folder)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (streamcomp_config(version=2), "format version 2, this reader knows 1"),
        (streamcomp_config(version=None), "format version None"),
        (streamcomp_config(modules={"model.ghost": {}}), "has no module model.ghost"),
        (
            streamcomp_config(modules={"model.layers.0.mlp.up_proj": {"form": "cp", "rank": 4}}),
            "unknown form 'cp'",
        ),
    ],
)
def test_a_compressed_model_of_another_version_is_refused(
    tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    folder = edit_config(save_pico(tmp_path), quantization_config=config)

    with pytest.raises(UnsupportedModelError, match=message):
        open_skeleton(folder)
