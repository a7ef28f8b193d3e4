"""What a stranger would try: one line that says what is wrong, and its exit code."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, RwkvConfig

import streamcomp
from streamcomp import BudgetError, OutputError
from streamcomp.checkpoint.index import SINGLE_FILE
from streamcomp.job.steps.loss import Loss
from streamcomp.job.steps.score import Score
from tests.jobs import (
    RESOURCES,
    SMALL,
    Finished,
    Interrupt,
    Interrupted,
    Notes,
    compress,
    run_cli,
    run_python,
    tree,
    varied_text,
)
from tests.model.folders import edit_config, save_edited
from tests.pico import make_tokenizer, save_pico

SETTINGS = ("--samples", SMALL["samples"], "--seq-len", SMALL["seq_len"], "--threads", 1)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return varied_text(tmp_path_factory.mktemp("text") / "calibration.txt", 4000)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A pico model to be damaged."""
    return save_pico(tmp_path / "model")


def run_compress(model: Path | str, out: Path, text: Path | str, *more: object) -> Finished:
    return run_cli("compress", model, out, "--calibration", text, *SETTINGS, "--quiet", *more)


def assert_refused(done: Finished, code: int, message: str) -> None:
    """One line on stderr, nothing on stdout."""
    assert done.err.startswith("error: "), done.err
    assert done.err.count("\n") == 1 and done.err.endswith("\n"), done.err
    assert re.search(message, done.err), done.err
    assert (done.code, done.out) == (code, ""), done.err
    assert "Traceback" not in done.err


# -- the source --------------------------------------------------------------------------


def remove_a_shard(model: Path) -> None:
    sorted(model.glob("*.safetensors"))[2].unlink()


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


def remove_the_weights(model: Path) -> None:
    for path in [*model.glob("*.safetensors"), *model.glob("*.index.json")]:
        path.unlink()


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


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (GPT2Config(n_embd=32, n_head=4, n_layer=2, vocab_size=264), "a Conv1D, no linear"),
        # it halves its hidden states behind every second block
        (
            RwkvConfig(hidden_size=32, num_hidden_layers=4, vocab_size=264, rescale_every=2),
            "block 2 is given something else than what block 1 returned",
        ),
    ],
    ids=["gpt2", "rwkv"],
)
def test_a_model_that_cannot_be_compressed_is_refused_with_the_reason(
    config: Any, message: str, text: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    AutoModelForCausalLM.from_config(config).save_pretrained(model)
    make_tokenizer().save_pretrained(model)

    done = run_compress(model, tmp_path / "out", text)

    assert_refused(done, 4, message)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "quantization",
    [
        {"quant_method": "fp8", "weight_block_size": [128, 128]},
        {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
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

    assert_refused(done, 3, r"\[48, 32\] on disk, config.json makes it \[64, 32\]")


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
        (["--seed", 10**25], 2, "seed 1.*: at most 9223372036854775807 is possible"),
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
        ('{"version": 6}\n', "journal.jsonl is damaged: remove"),
        ("[" * 100_000 + "\n", "journal.jsonl is damaged: remove"),
        (None, "journal.jsonl cannot be read: Is a directory"),
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


# -- the text ----------------------------------------------------------------------------


def write(path: Path, data: str | bytes) -> Path:
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("short.txt", "too short", "9 tokens, a window needs 16: give more text or a smaller"),
        ("empty.txt", "", "0 tokens, a window needs 16"),
        ("binary.txt", b"\xff\xfe\x00" * 99, "is no UTF-8 text"),
        ("plain.jsonl", "no json\n", 'every line must be {"text": "..."}'),
        ("other.jsonl", '{"body": "x"}\n', 'every line must be {"text": "..."}'),
        ("list.jsonl", '["x"]\n', 'every line must be {"text": "..."}'),
    ],
)
def test_a_text_that_cannot_be_used_is_refused_and_another_one_may_follow(
    name: str,
    data: str | bytes,
    message: str,
    pico: Callable[..., Path],
    text: Path,
    tmp_path: Path,
) -> None:
    bad, out = write(tmp_path / name, data), tmp_path / "out"

    assert_refused(run_compress(pico("llama"), out, bad), 9, message)
    assert not list(out.glob("*.safetensors"))
    assert run_compress(pico("llama"), out, text).code == 0


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no-such.txt", "no-such.txt: no such file or folder"),
        ("/no/such.txt", "/no/such.txt: no such file or folder"),
        ("somebody/some-text", "somebody/some-text is no file here, and as a hub dataset"),
    ],
)
def test_a_text_that_is_not_there_is_missed(
    source: str, message: str, pico: Callable[..., Path], tmp_path: Path
) -> None:
    assert_refused(run_compress(pico("llama"), tmp_path / "out", source), 9, message)


@pytest.mark.parametrize("command", ["plan", "compress", "eval"])
def test_a_text_in_another_format_is_refused_before_the_model_is_looked_for(
    command: str, tmp_path: Path
) -> None:
    table = write(tmp_path / "a.csv", "instruction,output\na,b\n")
    out = [tmp_path / "out"] if command == "compress" else []
    option = "--text" if command == "eval" else "--calibration"

    done = run_cli(command, tmp_path / "nowhere", *out, option, table, "--quiet")

    assert_refused(done, 9, "a.csv: its header must name a column text; it has 'instruction'")


def test_a_folder_without_text_is_refused(pico: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()

    done = run_compress(pico("llama"), tmp_path / "out", tmp_path / "empty")

    assert_refused(done, 9, "empty holds no text file")


def test_a_text_a_bit_short_gives_the_windows_it_has_and_a_warning(
    pico: Callable[..., Path], tmp_path: Path
) -> None:
    short, out = varied_text(tmp_path / "short.txt", 5 * SMALL["seq_len"] + 3), tmp_path / "out"

    result = compress(pico("llama"), out, short, progress=(notes := Notes()))

    assert notes.texts == [f"{short} is short: 5 windows instead of {SMALL['samples']}"]
    assert result.report["windows"] == 5
    assert result.report["notes"] == notes.texts
    done = run_cli("compress", pico("llama"), tmp_path / "again", "--calibration", short, *SETTINGS)
    assert done.code == 0
    assert f"note: {short} is short: 5 windows instead of 8\n" in done.err


# -- the folder --------------------------------------------------------------------------


def test_a_folder_with_something_else_in_it_is_not_touched(
    pico: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    write(out / "thesis.tex", "years of work")

    done = run_compress(pico("llama"), out, text)

    assert_refused(done, 6, r"out is not empty \(thesis.tex\) and holds no job")
    assert tree(out) == {"thesis.tex": b"years of work"}


def test_an_empty_folder_is_fine(pico: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()

    assert run_compress(pico("llama"), tmp_path / "out", text).code == 0


def test_the_model_s_own_folder_is_not_touched(model: Path, text: Path) -> None:
    before = tree(model)

    for same in (model, model / ".." / "model"):
        assert_refused(run_compress(model, same, text), 6, "is the model's own folder")

    assert tree(model) == before


def test_the_work_needs_a_folder_of_its_own(model: Path, text: Path, tmp_path: Path) -> None:
    before = tree(model)

    for work in (tmp_path / "out", model):
        done = run_compress(model, tmp_path / "out", text, "--work-dir", work)

        assert_refused(done, 6, "is OUT or the model's folder: give another --work-dir")
    assert tree(model) == before
    assert not (tmp_path / "out").exists()


def test_a_file_is_no_folder(pico: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "out", "a file")

    assert_refused(run_compress(pico("llama"), file, text), 6, "out is a file")
    assert_refused(run_compress(pico("llama"), file / "deep", text), 6, "cannot be written")
    assert file.read_text() == "a file"


@contextmanager
def small_disk(folder: Path, options: str) -> Iterator[Path]:
    """A disk of its own at ``folder``; the test is skipped where none can be made."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if (
        os.geteuid() != 0
        or not shutil.which("mount")
        or subprocess.run(mount, capture_output=True).returncode
    ):
        pytest.skip("this needs to mount a disk: run it as root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_folder_that_cannot_be_written_is_refused(
    pico: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    with small_disk(tmp_path / "disk", "size=1m,ro") as disk:
        done = run_compress(pico("llama"), disk / "out", text)

        assert_refused(done, 6, "out cannot be written: Read-only file system")
        done = run_compress(pico("llama"), tmp_path / "out", text, "--work-dir", disk / "work")
        assert_refused(done, 6, "work cannot be written: Read-only file system")


def test_a_folder_without_permission_is_refused(
    pico: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    (tmp_path / "locked").mkdir(mode=0o500)

    done = run_compress(pico("llama"), tmp_path / "locked" / "out", text)

    assert_refused(done, 6, "cannot be written: Permission denied")


LOCK = """
import fcntl, os, sys
descriptor = os.open(sys.argv[1], os.O_RDONLY)
fcntl.flock(descriptor, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


@contextmanager
def lock_held(folder: Path) -> Iterator[None]:
    """Another process holds the lock on ``folder``."""
    command = [sys.executable, "-c", LOCK, str(folder)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout and holder.stdout.readline() == "held\n"
        yield
        holder.kill()


def test_a_second_process_on_a_job_is_kept_out(
    pico: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    out, work = tmp_path / "out", tmp_path / "work"
    with pytest.raises(Interrupted):
        compress(pico("llama"), out, text, progress=Interrupt(2))
    before = tree(out)

    with lock_held(out):
        assert_refused(run_compress(pico("llama"), out, text), 8, "another process works on .*out")
        other = run_compress(pico("llama"), out, text, "--ratio", "0.37")
        assert_refused(other, 8, "another process works on .*out")  # not: remove that folder
        assert tree(out) == before
        assert run_cli("status", out).code == 0
    work.mkdir()
    with lock_held(work):
        done = run_compress(pico("llama"), tmp_path / "other", text, "--work-dir", work)
        assert_refused(done, 8, "another process works on .*work")
    assert run_compress(pico("llama"), out, text).code == 0  # the lock went with its process


def test_a_job_that_another_process_finished_meanwhile_is_not_done_again(
    pico: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    """The second process has looked at the folder, and is planning, when the first works."""
    from streamcomp.job import run

    dense = pico("llama")
    plan = run.make_plan  # type: ignore[attr-defined]

    for begun in (False, True):
        out = tmp_path / f"begun{begun}"
        left: dict[str, bytes] = {}
        if begun:
            with pytest.raises(Interrupted):
                compress(dense, out, text, progress=Interrupt(2))

        def finished_meanwhile(
            *args: Any, out: Path = out, left: dict[str, bytes] = left, **kwargs: Any
        ) -> Any:
            with mock.patch.object(run, "make_plan", plan):
                compress(dense, out, text)
            left.update(tree(out))
            return plan(*args, **kwargs)

        with mock.patch.object(run, "make_plan", finished_meanwhile):
            done = run_compress(dense, out, text)
        assert done.code == 0, done
        assert "already done" in done.out
        assert not (out / ".streamcomp").exists()
        assert tree(out) == left


def test_a_disk_with_too_little_space_is_refused_before_any_work(
    pico: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    with small_disk(tmp_path / "disk", "size=64k") as disk:
        done = run_compress(pico("llama"), disk / "out", text)

        assert_refused(done, 6, "at most and its disk has 64.0 KiB free")
        assert not list(disk.iterdir())


class Fill(Notes):
    """Fills the disk once step number ``after`` is done."""

    def __init__(self, after: int, filler: Path) -> None:
        super().__init__()
        self.after, self.filler = after, filler

    def finish_step(self, step: int, name: str, seconds: float, detail: str) -> None:
        super().finish_step(step, name, seconds, detail)
        if step == self.after:
            with self.filler.open("wb", buffering=0) as file:
                while True:
                    try:
                        file.write(b"\0" * 4096)
                    except OSError:
                        return


@pytest.mark.parametrize("after", range(11))
def test_a_disk_that_fills_up_ends_the_job_and_it_goes_on_once_there_is_space(
    after: int, pico: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    dense, whole = pico("llama"), tmp_path / "whole"
    compress(dense, whole, text)
    with small_disk(tmp_path / "disk", "size=4m") as disk:
        out, progress = disk / "out", Fill(after, disk / "filler")

        with pytest.raises(OutputError, match="no space left for .*: free some and run the same"):
            compress(dense, out, text, progress=progress)

        # a journal line, all that is left of the ranks, may fit into the page that it has
        assert after + 1 <= len(progress.steps) <= after + 1 + (after == 6)
        assert not (out / "config.json").exists()
        progress.filler.unlink()
        compress(dense, out, text, progress=(notes := Notes()))
        assert notes.done == len(progress.steps)
        for path in [*whole.glob("*.safetensors"), whole / "config.json"]:
            assert (out / path.name).read_bytes() == path.read_bytes()


def full_disk(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    "call", ["posix_fallocate", "pwrite", "fsync", "fdatasync", "replace", "write"]
)
def test_whatever_call_finds_the_disk_full_it_is_one_line(
    call: str, pico: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    dense, out = pico("llama"), tmp_path / "out"
    with pytest.raises(Interrupted):
        compress(dense, out, text, progress=Interrupt(4))  # the next writes files of every kind
    steps = streamcomp.status(out).steps_done

    with mock.patch.object(os, call, full_disk):
        done = run_compress(dense, out, text)

    assert_refused(done, 6, "no space left for .*: free some and run the same command again")
    assert streamcomp.status(out).steps_done == steps
    assert not list(out.glob("*.tmp")) and not list(out.glob(".*.tmp"))
    assert run_compress(dense, out, text).code == 0


# -- the budget --------------------------------------------------------------------------


def test_a_budget_too_small_is_refused_with_the_least_that_works(
    pico: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    command = ["-m", "streamcomp", "compress", pico("llama"), tmp_path / "out"]
    command += ["--calibration", text, *SETTINGS, "--quiet", "--json"]

    refused = run_python(*command, "--max-ram", "64M")

    assert_refused(refused, 5, r"needs \d+ MiB.*, the budget is 64\.0 MiB: --max-ram \d+M fits")
    assert not (tmp_path / "out").exists()
    match = re.search(r"--max-ram (\d+)M fits", refused.err)
    assert match
    least = int(match[1])
    done = run_python(*command, "--max-ram", f"{least}M")
    assert (done.code, done.err) == (0, "")
    assert done.json["memory"]["peak_bytes"] <= least * 2**20


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ("lots", "size 'lots' not understood: write 32G"),
        ("0", "must be above zero"),
        ("-1G", "not understood"),
        ("900P", "not understood"),
        ("900T", r"--max-ram 900T is more than the .* of this machine"),
        ("120%", "above 0% and at most 100%"),
    ],
)
def test_a_budget_that_is_none_is_refused(
    size: str, message: str, pico: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    done = run_compress(pico("llama"), tmp_path / "out", text, "--max-ram", size)

    assert_refused(done, 2, message)
    assert not (tmp_path / "out").exists()


# -- the settings ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--ratio", 0], 2, "ratio 0: the share to remove lies between 0 and 1"),
        (["--ratio", 1], 2, "ratio 1: the share"),
        (["--ratio", 1.5], 2, "ratio 1.5: the share"),
        (["--ratio", "nan"], 2, "ratio nan: the share"),
        (["--ratio", -0.2], 2, "ratio -0.2: the share"),
        (["--ratio", 0.99], 2, "ratio 0.99 cannot be reached: rank 1 everywhere removes 0.94"),
        (["--include", "("], 2, r"include '\(' is no regular expression"),
        (["--exclude", "*"], 2, r"exclude '\*' is no regular expression"),
        (["--include", "no_such_linear"], 2, "--include and --exclude leave no linear"),
        (["--exclude", "."], 2, "--include and --exclude leave no linear"),
        (["--ratio", "0.2,0.2"], 2, r"ratio \(0.2, 0.2\): each of several ratios"),
        (["--ratio", "0.2,1.2"], 2, "ratio 1.2: the share"),
        (["--ratio", "0.2,0.99"], 2, "ratio 0.99 cannot be reached"),
        (["--size", "many"], 2, "many"),
        (["--size", "1K"], 2, "--size 1K: .* stay in any case; give a size in between"),
        (["--size", "1G"], 2, "--size 1G: .* stay in any case; give a size in between"),
        (["--blocks", "last:3"], 2, "blocks last:3: the model has blocks 0 to 1"),
        (["--blocks", "1-0"], 2, "blocks 1-0: the model has blocks 0 to 1"),
        (["--blocks", "0-2"], 2, "blocks 0-2: the model has blocks 0 to 1"),
        (["--blocks", "first:0"], 2, "blocks first:0: the model has blocks 0 to 1"),
        (["--blocks", "all"], 2, "blocks 'all' unknown: last:12, first:4 or 3-10"),
        (["--blocks", "last:1", "--ratio", 0.6], 2, "too few to remove the share 0.6 of all"),
        (["--method", "swsc", "--ratio", 0.9], 2, "shared channels take .*smaller ratio"),
        (["--seq-len", 129], 2, "--seq-len 129: the model has 128 positions"),
        (["--seq-len", 1], 2, "seq_len 1: must be at least 2"),
        (["--samples", 0], 2, "samples 0: must be at least 1"),
        (["--batch", -1], 2, "batch -1: must be at least 0"),
        (["--seed", -1], 2, "seed -1: must be at least 0"),
        (["--device", "gpu"], 2, "device 'gpu' unknown: auto, cpu, cuda or cuda:N"),
        (["--device", "cpu", "--max-vram", "8G"], 2, "--max-vram 8G: the job runs on the CPU"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else None,
)
def test_a_setting_that_cannot_be_is_refused(
    options: list[Any],
    code: int,
    message: str,
    pico: Callable[..., Path],
    text: Path,
    tmp_path: Path,
) -> None:
    for command in (["compress", pico("llama"), tmp_path / "out"], ["plan", pico("llama")]):
        done = run_cli(*command, "--calibration", text, *SETTINGS, "--quiet", *options)

        assert_refused(done, code, message)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there_is_missed(
    pico: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    for device in ("cuda", "cuda:3"):
        done = run_compress(pico("llama"), tmp_path / "out", text, "--device", device)

        assert_refused(done, 2, "torch finds no CUDA GPU here; use --device cpu")
    assert not (tmp_path / "out").exists()


def test_a_gpu_that_is_full_ends_the_job_and_keeps_what_is_done(
    pico: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    full = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    with (
        mock.patch.object(Loss, "run", side_effect=full),
        pytest.raises(
            BudgetError, match="the loss needs more of the GPU .*--max-vram .*--device cpu"
        ),
    ):
        compress(pico("llama"), out, text)
    assert not (out / "config.json").exists()

    assert compress(pico("llama"), out, text).report["model"]["ratio"] > 0
    with (
        mock.patch.object(Score, "run", side_effect=full),
        pytest.raises(BudgetError, match="head needs more of the GPU"),
    ):
        streamcomp.evaluate(out, str(text), seq_len=32, resources=RESOURCES)


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ("ration = 0.2", "unknown setting 'ration'; known: ratio, size, method"),
        ("ratio = ", "cannot be read as TOML"),
        ("ratio = '0.2'", "ratio = '0.2' should be of type float"),
        ("[recipe]\nratio = 0.2", "unknown setting 'recipe'"),
        ("ratio = 2", "ratio 2: the share"),
        ("max_ram = '1G'", "unknown setting 'max_ram'"),
        (b"\xff", "cannot be read as TOML"),
    ],
)
def test_a_recipe_file_that_cannot_be_is_refused(
    toml: str | bytes, message: str, pico: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    recipe = write(tmp_path / "recipe.toml", toml)

    done = run_compress(pico("llama"), tmp_path / "out", text, "--config", recipe)

    assert_refused(done, 2, message)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options",
    [
        ["--config", "/no/such.toml"],
        ["--form", "svd"],
        ["--statistics", "sparse"],
        ["--ratio", "much"],
        ["--ratio", "0.2,"],
        ["--method", "magic"],
        ["--samples", "2.5"],
        ["--threads", "-1"],
        ["--no-such-option"],
    ],
    ids=" ".join,
)
def test_what_is_no_option_at_all_is_refused_with_the_usage(
    options: list[str], pico: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    done = run_compress(pico("llama"), tmp_path / "out", text, *options)

    assert done.code == 2
    assert options[0] in done.err and "Traceback" not in done.err
    assert not (tmp_path / "out").exists()


# -- the other commands ------------------------------------------------------------------


def test_there_is_no_status_where_there_is_no_job(
    pico: Callable[..., Path], tmp_path: Path
) -> None:
    for folder in (tmp_path / "nothing", pico("llama")):
        assert_refused(run_cli("status", folder), 6, "holds no job")


def test_export_writes_into_a_folder_of_its_own(
    pico: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    out, dest = tmp_path / "out", tmp_path / "dest"
    compress(pico("llama"), out, text)
    before = tree(out)
    dest.mkdir()
    write(dest / "thesis.tex", "years of work")

    assert_refused(run_cli("export", out, dest, "-q"), 6, "dest is not an empty folder")
    assert_refused(run_cli("export", out, out, "-q"), 6, "is the model's own folder")
    assert_refused(run_cli("export", out, out / "config.json", "-q"), 6, "not an empty folder")
    done = run_cli("export", pico("llama"), tmp_path / "new", "-q")
    assert_refused(done, 4, "is not compressed: there is nothing to export")
    assert tree(dest) == {"thesis.tex": b"years of work"}
    assert tree(out) == before
    assert not (tmp_path / "new").exists()


def test_an_evaluation_needs_a_text_of_one_window_at_least(
    pico: Callable[..., Path], tmp_path: Path
) -> None:
    short = write(tmp_path / "short.txt", "too short")

    done = run_cli("eval", pico("llama"), "--text", short, "--seq-len", 16, "-q")

    assert_refused(done, 9, "9 tokens, a window needs 16")


def test_an_evaluation_beyond_the_positions_is_refused(
    pico: Callable[..., Path], text: Path
) -> None:
    done = run_cli("eval", pico("llama"), "--text", text, "--seq-len", 129, "-q")

    assert_refused(done, 2, "--seq-len 129: the model has 128 positions")


def test_an_evaluation_within_too_small_a_budget_is_refused(
    pico: Callable[..., Path], text: Path
) -> None:
    done = run_cli("eval", pico("llama"), "--text", text, "--seq-len", 16, "--max-ram", "1M", "-q")

    assert_refused(done, 5, r"the budget is 1\.00 MiB: --max-ram \d+M fits")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 99}, "format version 99"),
        ({"modules": {"model.layers.0.mlp.up_proj": {"form": "new", "rank": 3}}}, "unknown form"),
        (
            {"modules": {"model.layers.0.mlp.up_proj": {"form": "uv", "rank": 3, "bits": 4}}},
            "unknown key 'bits'",
        ),
        ({"modules": {"model.layers.9.mlp": {"form": "uv", "rank": 3}}}, "has no module"),
    ],
)
def test_a_compressed_model_of_another_format_is_refused(
    change: dict[str, Any],
    message: str,
    pico: Callable[..., Path],
    text: Path,
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    compress(pico("llama"), out, text)
    quantization = json.loads((out / "config.json").read_text())["quantization_config"]
    edit_config(out, quantization_config={**quantization, **change})

    assert_refused(run_cli("inspect", out), 4, message)
    assert_refused(run_cli("eval", out, "--text", text, "-q"), 4, message)
    assert_refused(run_cli("export", out, tmp_path / "dest", "-q"), 4, message)


def test_an_error_of_the_whole_program_is_one_line_too(model: Path, tmp_path: Path) -> None:
    remove_a_shard(model)

    done = run_python("-m", "streamcomp", "compress", model, tmp_path / "out")

    assert_refused(done, 3, "shards are missing")


def test_a_single_file_that_is_no_safetensors_is_refused(
    model: Path, text: Path, tmp_path: Path
) -> None:
    remove_the_weights(model)
    for data in (b"", b"PK\x03\x04" * 99, b"\xff" * 99, (8).to_bytes(8, "little") + b"[1, 2, 3]"):
        write(model / SINGLE_FILE, data)

        done = run_compress(model, tmp_path / "out", text)

        assert_refused(done, 3, "model.safetensors")


def test_names_that_look_like_markup_are_printed_as_they_are(
    pico: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tmp_path / "50% [" / "red]:cat: ö"
    shutil.copytree(pico("llama"), folder / "model")
    text = varied_text(folder / "text[i].txt", 4000)

    commands: list[list[object]] = [
        ["plan", folder / "model", *SETTINGS],
        ["compress", folder / "model", folder / "out", "--calibration", text, *SETTINGS],
        ["status", folder / "out"],
        ["inspect", folder / "out"],
        ["eval", folder / "out", "--text", text, "--seq-len", 16, "--windows", 2],
        ["export", folder / "out", folder / "dense"],
    ]
    for command in commands:
        done = run_cli(*command)

        assert done.code == 0, done.err
        told = "".join(done.out.split())  # tables wrap
        assert "[/red]:cat:ö" in told or command[0] in ("eval", "status")


def test_an_empty_checkpoint_is_refused(model: Path, text: Path, tmp_path: Path) -> None:
    remove_the_weights(model)
    save_file({"other": torch.zeros(3)}, model / SINGLE_FILE, metadata={"format": "pt"})

    done = run_compress(model, tmp_path / "out", text)

    assert done.code in (3, 4) and done.err.startswith("error: ")
    assert done.err.count("\n") == 1
