"""What a mixture of experts takes beyond a dense block: merging its experts, and their shapes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import MixtralConfig, MixtralForCausalLM

import streamcomp
from tests.jobs import RESOURCES, run_python, small_recipe, varied_text
from tests.pico import make_tokenizer

MEASURE = """
import json, sys
from streamcomp import Recipe, compress
from tests.jobs import RESOURCES

model, out, text = sys.argv[1:]
recipe = Recipe(samples=32, seq_len=128, batch=2, calibration=(text,))
report = compress(model, out, recipe, RESOURCES).report
print(json.dumps([[s["step"], s["peak_bytes"], s["predicted_bytes"]] for s in report["steps"]]))
"""


def test_tensors_that_become_one_parameter_are_held_beside_it(
    pico: Callable[..., Path], tmp_path: Path
) -> None:
    text = varied_text(tmp_path / "text.txt", 100)

    costs = [
        streamcomp.plan(pico(name), small_recipe(text), RESOURCES).outline.blocks[0]
        for name in ("mixtral", "llama")
    ]

    assert costs[0].merge_bytes == 4 * 2 * 48 * 32 * 4  # gate and up of four experts
    assert costs[1].merge_bytes == 0


def test_experts_that_meet_many_shapes_take_no_more_memory_than_predicted(tmp_path: Path) -> None:
    """Each batch sends another number of tokens to each expert, and a CPU keeps what it learnt."""
    text = varied_text(tmp_path / "text.txt", 10_000)
    config = MixtralConfig(
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        num_local_experts=8,
        vocab_size=300,
        max_position_embeddings=128,
    )
    MixtralForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")

    done = run_python("-c", MEASURE, tmp_path / "model", tmp_path / "out", text)

    assert done.code == 0, done.err[-2000:]
    for step, peak, predicted in json.loads(done.out):
        assert peak <= predicted, step
