"""Models that a stranger might give: one line that says what is wrong, and its exit code."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, RwkvConfig

import streamcomp
from streamcomp.errors import UnsupportedModelError
from streamcomp.model import sites
from tests.jobs import (
    Notes,
    compress,
    run_cli,
    tree,
)
from tests.model.folders import edit_config, save_edited
from tests.pico import make_tokenizer
from tests.refusals import (
    assert_refused,
    remove_a_shard,
    remove_the_weights,
    run_compress,
)


def cut_a_shard(model: Path) -> None:
    shard = sorted(model.glob("*.safetensors"))[2]
    os.truncate(shard, shard.stat().st_size - 10)


def empty_a_shard(model: Path) -> None:
    os.truncate(sorted(model.glob("*.safetensors"))[2], 0)


def remove_the_config(model: Path) -> None:
    (model / "config.json").unlink()


def break_the_config(model: Path) -> None:
    (model / "config.json").write_text('{"model_type": "llama", ')


def remove_the_model_type(model: Path) -> None:
    edit_config(model, model_type=None)


def leave_only_pickles(model: Path) -> None:
    remove_the_weights(model)
    (model / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")


def point_out_of_the_folder(model: Path) -> None:
    path = model / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["lm_head.weight"] = "../../etc/passwd"
    path.write_text(json.dumps(index))


def forget_a_tensor(model: Path) -> None:
    path = model / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    del index["weight_map"]["model.layers.0.mlp.up_proj.weight"]
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove_a_shard, r"1 of \d+ shards are missing"),
        (cut_a_shard, "was cut short"),
        (empty_a_shard, "was cut short"),
        (remove_the_config, "config.json is missing"),
        (break_the_config, "cannot be read as JSON"),
        (remove_the_model_type, "names no model_type"),
        (remove_the_weights, "holds neither model.safetensors nor"),
        (leave_only_pickles, "only pickled weights"),
        (point_out_of_the_folder, "outside of"),
    ],
)
def test_a_damaged_source_is_refused_before_any_work(
    damage: Callable[[Path], None], message: str, model: Path, text: Path, tmp_path: Path
) -> None:
    damage(model)
    before = tree(model)

    assert_refused(run_compress(model, tmp_path / "out", text), 3, message)
    assert_refused(run_cli("plan", model, "--threads", 1), 3, message)
    assert_refused(run_cli("inspect", model), 3, message)
    assert_refused(run_cli("eval", model, "--text", text, "--quiet"), 3, message)
    assert not (tmp_path / "out").exists()
    assert tree(model) == before


def test_a_tensor_that_is_in_no_shard_is_missed(model: Path, text: Path, tmp_path: Path) -> None:
    forget_a_tensor(model)

    done = run_compress(model, tmp_path / "out", text)

    assert_refused(done, 3, r"model\.layers\.0\.mlp\.up_proj\.weight")
    assert not list(tmp_path.glob("out/*.safetensors"))


def put_nan(name: str, value: float = float("nan")) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name].view(-1)[5] = value

    return change


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("model.layers.1.mlp.up_proj.weight", float("nan"), r"up_proj\.weight: 1 of 1536 weights"),
        ("model.layers.1.mlp.up_proj.weight", float("inf"), r"up_proj\.weight: 1 of 1536 weights"),
        ("model.layers.0.input_layernorm.weight", float("nan"), "1 of 32 weights are NaN"),
    ],
)
def test_a_weight_that_is_no_number_ends_the_job_at_its_block(
    name: str, value: float, message: str, text: Path, tmp_path: Path
) -> None:
    model, out = save_edited(tmp_path / "model", put_nan(name, value)), tmp_path / "out"

    done = run_compress(model, out, text)

    assert_refused(done, 3, message)
    block = int(name.split(".")[2])
    assert streamcomp.status(out).steps_done == 2 + block  # those before it are kept
    assert not list(out.glob("*.safetensors"))


def test_a_block_that_is_no_number_keeps_the_shards_of_those_before_it(
    text: Path, tmp_path: Path
) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    model, out = save_edited(tmp_path / "model", put_nan(name, float("nan"))), tmp_path / "out"

    done = run_compress(model, out, text, "--method", "svd-llm")

    assert_refused(done, 3, r"up_proj\.weight: 1 of 1536 weights")
    assert streamcomp.status(out).last_step == "block 0"
    assert len(list(out.glob("*.safetensors"))) == 1


@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
)
def test_a_weight_outside_of_the_blocks_that_is_no_number_is_found_before_them(
    name: str, text: Path, tmp_path: Path
) -> None:
    model, out = save_edited(tmp_path / "model", put_nan(name)), tmp_path / "out"

    assert_refused(run_compress(model, out, text), 3, f"{re.escape(name)} .*NaN or infinite")
    assert not list(out.glob("*.safetensors"))


def test_an_unknown_model_type_is_refused(model: Path, text: Path, tmp_path: Path) -> None:
    edit_config(model, model_type="evil")

    assert_refused(run_compress(model, tmp_path / "out", text), 4, "model type 'evil' is unknown")
    assert_refused(run_cli("inspect", model), 4, "model type 'evil' is unknown")
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_no_causal_language_model_is_refused(
    model: Path, text: Path, tmp_path: Path
) -> None:
    edit_config(model, model_type="vit")

    assert_refused(run_compress(model, tmp_path / "out", text), 4, "no causal language model")


def test_a_model_that_cannot_be_compressed_is_refused_with_the_reason(
    text: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    # it halves its hidden states behind every second block
    config = RwkvConfig(hidden_size=32, num_hidden_layers=4, vocab_size=264, rescale_every=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(model)
    make_tokenizer().save_pretrained(model)

    done = run_compress(model, tmp_path / "out", text)

    assert_refused(done, 4, "block 2 is given something else than what block 1 returned")
    assert not (tmp_path / "out").exists()


def test_a_model_without_a_linear_that_can_be_factored_is_refused(
    model: Path, text: Path, tmp_path: Path
) -> None:
    nothing = mock.patch.object(sites, "_computes_a_linear", lambda module: False)

    with (
        nothing,
        pytest.raises(UnsupportedModelError, match=r"be factored \(a Linear, no linear\)"),
    ):
        compress(model, tmp_path / "out", text)


@pytest.mark.parametrize(
    "quantization",
    [
        {"quant_method": "awq", "bits": 4},
        {"quant_method": "compressed-tensors", "format": "pack-quantized"},
        {"quant_method": "gptq", "bits": 4, "group_size": 128},
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
    ],
    ids=lambda quantization: quantization["quant_method"],
)
def test_a_quantised_source_is_refused_by_its_method(
    quantization: dict[str, Any], model: Path, text: Path, tmp_path: Path
) -> None:
    edit_config(model, quantization_config=quantization)

    done = run_compress(model, tmp_path / "out", text)

    assert_refused(done, 4, rf"already quantised \({quantization['quant_method']}\)")
    assert not (tmp_path / "out").exists()


def test_weights_in_eight_bits_are_refused_also_where_no_config_says_so(
    text: Path, tmp_path: Path
) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        name = "model.layers.0.mlp.up_proj.weight"
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)

    model = save_edited(tmp_path / "model", change)

    assert_refused(run_compress(model, tmp_path / "out", text), 4, "is F8_E4M3.*already quantised")


def test_a_compressed_source_is_refused(
    pico: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    compress(pico("llama"), tmp_path / "first", text)

    done = run_compress(tmp_path / "first", tmp_path / "second", text)

    assert_refused(done, 4, "already compressed by streamcomp: start from the original")
    assert not (tmp_path / "second").exists()


EVIL = "import pathlib; pathlib.Path(__file__).with_name('RAN').touch()\n"


def add_code(model: Path, **settings: Any) -> Path:
    """Code in the model folder that says when it was run, and a config that asks for it."""
    for name in ("modeling_evil", "configuration_evil", "tokenization_evil"):
        (model / f"{name}.py").write_text(EVIL)
    names = {
        "AutoConfig": "configuration_evil.EvilConfig",
        "AutoModelForCausalLM": "modeling_evil.EvilForCausalLM",
    }
    return edit_config(model, auto_map=names, **settings)


def test_code_in_the_folder_of_an_unknown_model_is_never_run(
    model: Path, text: Path, tmp_path: Path
) -> None:
    add_code(model, model_type="evil")
    before = tree(model)

    done = run_compress(model, tmp_path / "out", text)

    assert_refused(done, 4, "unknown to transformers.*code in its folder is never run")
    assert tree(model) == before


def test_code_in_the_folder_of_a_known_model_is_neither_run_nor_copied(
    model: Path, text: Path, tmp_path: Path
) -> None:
    add_code(model)
    before, out = tree(model), tmp_path / "out"

    done = run_compress(model, out, text)

    assert (done.code, done.err) == (0, "")
    assert tree(model) == before
    assert [path.name for path in out.glob("*.py")] == ["streamcomp_plugin.py"]
    assert "evil" not in (out / "config.json").read_text()
    dest = tmp_path / "dense"
    assert run_cli("export", out, dest, "--quiet").code == 0
    assert not list(dest.glob("*.py"))
    assert "auto_map" not in json.loads((dest / "config.json").read_text())


def test_code_of_a_tokenizer_is_never_run(model: Path, text: Path, tmp_path: Path) -> None:
    add_code(model)
    path = model / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings["auto_map"] = {"AutoTokenizer": ["tokenization_evil.EvilTokenizer", None]}
    settings["tokenizer_class"] = "EvilTokenizer"
    path.write_text(json.dumps(settings))
    before = tree(model)

    done = run_compress(model, tmp_path / "out", text)

    assert done.code in (0, 9)  # with transformers' own code for the tokenizer, or not at all
    assert done.code == 0 or "the tokenizer in" in done.err
    assert tree(model) == before


def test_a_missing_tokenizer_is_missed(model: Path, text: Path, tmp_path: Path) -> None:
    for path in model.glob("tokenizer*"):
        path.unlink()

    done = run_compress(model, tmp_path / "out", text)

    assert_refused(done, 9, "model has no tokenizer .tokenizer.json or tokenizer.model.: fetch it")


def test_tokens_beyond_the_vocabulary_are_refused(text: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = tensors[name][:40].clone()

    model = save_edited(tmp_path / "model", change)
    edit_config(model, vocab_size=40, bos_token_id=1, eos_token_id=2)

    done = run_compress(model, tmp_path / "out", text)

    assert_refused(done, 3, "do not fit the 40 rows.*tokenizer belongs to another model")
    done = run_cli("eval", model, "--text", text, "--seq-len", 16, "--windows", 4, "--quiet")
    assert_refused(done, 3, "do not fit the 40 rows")


def test_a_tensor_of_another_shape_than_the_config_s_is_refused(
    model: Path, text: Path, tmp_path: Path
) -> None:
    edit_config(model, intermediate_size=64)

    done = run_compress(model, tmp_path / "out", text)

    assert_refused(done, 3, r"\[(48, 32|32, 48)\] on disk, config.json makes it \[")


def forget_in_the_last_block(tensors: dict[str, Tensor]) -> None:
    del tensors["model.layers.1.self_attn.o_proj.weight"]


def widen_the_head(tensors: dict[str, Tensor]) -> None:
    tensors["lm_head.weight"] = tensors["lm_head.weight"].repeat(2, 1)


def forget_the_last_norm(tensors: dict[str, Tensor]) -> None:
    del tensors["model.norm.weight"]


def count_in_a_linear(tensors: dict[str, Tensor]) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = torch.ones(tensors[name].shape, dtype=torch.int32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (forget_in_the_last_block, "layers.1.self_attn.o_proj.weight is in no shard"),
        (forget_the_last_norm, "model.norm.weight is in no shard"),
        (widen_the_head, r"lm_head.weight is \[\d+, 32\] on disk, config.json makes it"),
        (
            count_in_a_linear,
            "up_proj.weight is I32 on disk, a weight has to be F64, F32, F16, BF16",
        ),
    ],
)
def test_what_headers_show_is_refused_before_any_work(
    change: Callable[[dict[str, Tensor]], None], message: str, text: Path, tmp_path: Path
) -> None:
    model = save_edited(tmp_path / "model", change)

    assert_refused(run_cli("plan", model, "--seq-len", 16, "--threads", 1), 3, message)
    assert_refused(run_compress(model, tmp_path / "out", text), 3, message)
    assert not (tmp_path / "out").exists()
    done = run_cli("eval", model, "--text", text, "--seq-len", 16, "--windows", 4, "--quiet")
    assert_refused(done, 3, message)


def test_blocks_that_the_config_does_not_count_are_named(
    model: Path, text: Path, tmp_path: Path
) -> None:
    edit_config(model, num_hidden_layers=1)
    notes = Notes()

    compress(model, tmp_path / "out", text, progress=notes)

    (note,) = (note for note in notes.texts if "config.json has 1 blocks" in note)
    assert "9 tensors of others are copied as they are, model.layers.1." in note


@pytest.mark.parametrize("command", ["plan", "compress"])
@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--threads", 100_000], 2, "threads 100000: at most .* are of use on this machine"),
        (["--seed", 10**25], 2, "seed 1.*: must be 0 to 9223372036854775807"),
        (["--ratio", 0.3, "--size", "100K"], 2, "ratio and size both say how much to remove"),
        (["--ratio", 0.3, "--module-ratio", 0.4], 2, "ratio and module_ratio both say"),
        (["--calibration", ""], 2, "calibration '': a file, a folder or a dataset"),
        (["--calibration", "nowhere.txt"], 9, "nowhere.txt: no such file or folder"),
        (["--calibration", "/dev/null"], 9, "/dev/null is neither a file nor a folder"),
        (
            ["--method", "swsc", "--clusters", 49],
            2,
            "clusters 49: model.layers.0.self_attn.* has 32",
        ),
    ],
)
def test_settings_that_cannot_be_are_refused_while_planning(
    command: str,
    options: list[object],
    code: int,
    message: str,
    pico: Callable[..., Path],
    tmp_path: Path,
) -> None:
    out = [tmp_path / "out"] if command == "compress" else []
    settings = ["--seq-len", 16, "--samples", 8]

    assert_refused(run_cli(command, pico("llama"), *out, *settings, *options), code, message)
    assert not (tmp_path / "out").exists()


def test_out_may_not_be_a_link_to_nothing(
    pico: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    (tmp_path / "out").symlink_to(tmp_path / "nothing")

    done = run_compress(pico("llama"), tmp_path / "out", text)

    assert_refused(done, 6, "out is a link to what is not there")


@pytest.mark.parametrize(
    ("journal", "message"),
    [
        ("[]\n", "journal.jsonl is damaged: remove"),
        ('{"version": 7}\n', "journal.jsonl is damaged: remove"),
        ("[" * 100_000 + "\n", "journal.jsonl is damaged: remove"),
        (None, "journal.jsonl cannot be read: it is no regular file"),
    ],
)
def test_a_damaged_journal_is_one_line(
    journal: str | None, message: str, pico: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    work = tmp_path / "out" / ".streamcomp"
    work.mkdir(parents=True)
    if journal is None:
        (work / "journal.jsonl").mkdir()
    else:
        (work / "journal.jsonl").write_text(journal)

    assert_refused(run_cli("status", tmp_path / "out"), 6, message)
    assert_refused(run_compress(pico("llama"), tmp_path / "out", text), 6, message)


def test_a_damaged_report_is_one_line(
    pico: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    compress(pico("llama"), out, text)
    (out / "streamcomp_report.json").write_text("{")
    message = "streamcomp_report.json cannot be read as JSON.*: remove .*out and start again"

    assert_refused(run_cli("status", out), 6, message)
    assert_refused(run_compress(pico("llama"), out, text), 6, message)


def test_a_result_that_cannot_be_printed_is_one_line(pico: Callable[..., Path]) -> None:
    command = [sys.executable, "-m", "streamcomp", "inspect", "--json", str(pico("llama"))]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "error: No space left on device\n"


@pytest.mark.parametrize("command", ["compress", "plan", "eval", "inspect"])
def test_a_hub_name_without_a_network_says_so(command: str, tmp_path: Path) -> None:
    out = [tmp_path / "out"] if command == "compress" else []

    done = run_cli(command, "somebody/some-model", *out, "--quiet")

    assert_refused(done, 3, "somebody/some-model is no folder here, and the hub cannot be reached")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["no/such/folder", "/no/such", "./no", "no such"])
def test_a_folder_that_is_not_there_is_no_hub_name(name: str, tmp_path: Path) -> None:
    done = run_cli("compress", name, tmp_path / "out", "--quiet")

    assert_refused(done, 3, f"{re.escape(name)} is no folder here")
