"""What the experts of a mixture lose by method, by ranks, and by the number of calibration tokens.

    python benchmarks/mixtures.py --wikitext FOLDER

Trains a tiny Qwen3-MoE on bytes of WikiText-2's ``valid.txt``, without a loss that balances its
experts, so that some see most tokens. It is calibrated on the same text and evaluated on
``test.txt``. Seeds are fixed. Whatever is done is kept in ``--out`` and not computed twice. Writes
``mixtures.json`` and the table ``mixtures.md``.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn

import streamcomp
from streamcomp import Recipe, Resources
from streamcomp.units import format_seconds

SEQ_LEN, BATCH, RATE = 128, 16, 4e-3
TOKENS, RATIOS = (512, 8192), (0.3, 0.5)
REACHES = {"experts alone": r"\.experts\.", "all linears": ""}
CONFIG: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 16,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 96,
    "norm_topk_prob": True,
    "max_position_embeddings": SEQ_LEN,
    "bos_token_id": None,
    "eos_token_id": None,
}


@dataclass(frozen=True)
class Row:
    """A line of the table: a method, and how it shares the ratio among matrices."""

    method: str
    allocation: str

    @property
    def name(self) -> str:
        ranks = "equal ranks" if self.allocation == "uniform" else "a rank for each"
        return f"{self.method}, {ranks}"


ROWS = tuple(Row(m, a) for m in ("svd-llm", "two-sided") for a in ("uniform", "loss"))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--wikitext", type=Path, required=True, help="folder of the two texts")
    parser.add_argument("--out", type=Path, default=Path("out/mixtures"))
    parser.add_argument("--steps", type=int, default=800, help="of training")
    parser.add_argument("--windows", type=int, default=512, help="of evaluation; 0: all")
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    options.out.mkdir(parents=True, exist_ok=True)
    model = options.out / "dense"
    kept = Kept(options.out / "mixtures.json")
    training = kept.of("training", lambda: _train(model, options.wikitext, options.steps))
    dense = kept.of("dense", lambda: _nll(model, options))
    for reach in REACHES:
        for tokens in TOKENS:
            for row in ROWS:
                name = f"{reach}, {tokens} tokens, {row.name}"
                kept.of(name, partial(_lost, options, dense, tokens, row, reach))
    table = _table(training, dense, kept.values)
    (options.out / "mixtures.md").write_text(table, "utf-8")
    print(table)


class Kept:
    """Figures by name in a file, each computed once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.values: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}

    def of(self, name: str, compute: Callable[[], Any]) -> Any:
        if name not in self.values:
            self.values[name] = compute()
            self._path.write_text(json.dumps(self.values, indent=1))
            print(name, self.values[name], flush=True)
        return self.values[name]


# -- the model -----------------------------------------------------------------------------------


def _train(folder: Path, wikitext: Path, steps: int) -> dict[str, Any]:
    """Train the mixture, save it, and count the tokens of each expert in ``max(TOKENS)``."""
    started = time.perf_counter()
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(**CONFIG)
    model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    text = torch.frombuffer(bytearray((wikitext / "valid.txt").read_bytes()), dtype=torch.uint8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps, pct_start=0.05)
    tokenizer = _byte_tokenizer()
    ids = torch.tensor(tokenizer.convert_tokens_to_ids(_letters()))
    tokens = ids[text.long()]
    for _ in range(steps):
        starts = torch.randint(len(tokens) - SEQ_LEN, (BATCH, 1))
        windows = tokens[starts + torch.arange(SEQ_LEN)]
        loss = model(input_ids=windows, labels=windows).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {
        "loss": loss.item(),
        "load": _load(model.eval(), tokens[: max(TOKENS)].view(-1, SEQ_LEN)),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "seconds": time.perf_counter() - started,
    }


@torch.no_grad()
def _load(model: nn.Module, windows: torch.Tensor) -> list[list[int]]:
    """How many tokens of ``windows`` (windows, seq) each expert of each block gets."""
    chosen = [
        logits.topk(CONFIG["num_experts_per_tok"]).indices.flatten()
        for logits in model(input_ids=windows, output_router_logits=True).router_logits
    ]
    return [block.bincount(minlength=CONFIG["num_experts"]).tolist() for block in chosen]


def _letters() -> list[str]:
    """The letter that stands for each byte, as in GPT-2."""
    plain = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = (byte for byte in range(256) if byte not in plain)
    renamed = {byte: chr(256 + place) for place, byte in enumerate(others)}
    return [renamed.get(byte, chr(byte)) for byte in range(256)]


def _byte_tokenizer() -> Any:
    """One token a byte."""
    vocabulary = {letter: number for number, letter in enumerate(_letters())}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)


# -- what it loses -------------------------------------------------------------------------------


def _lost(
    options: argparse.Namespace, dense: float, tokens: int, row: Row, reach: str
) -> dict[str, Any]:
    """Nats a byte lost at each ratio; jobs of one method share their analysis."""
    base = f"{reach.split()[0]}-{tokens}-{row.method}"
    recipe = Recipe(
        ratio=RATIOS,
        method=row.method,
        allocation=row.allocation,
        include=REACHES[reach],
        calibration=(str(options.wikitext / "valid.txt"),),
        samples=tokens // SEQ_LEN,
        seq_len=SEQ_LEN,
    )
    resources = Resources(threads=1, work_dir=options.out / f"work-{base}", keep_work=True)
    result = streamcomp.compress(
        options.out / "dense", options.out / f"{base}-{row.allocation}", recipe, resources
    )
    results = (result, *result.others)
    return {
        f"{ratio:g}": {
            "lost": _nll(each.out, options) - dense,
            "reached": each.report["model"]["ratio"],
            "bytes": each.report["model"]["bytes_kept"],
        }
        for ratio, each in zip(RATIOS, results, strict=True)
    }


def _nll(model: Path, options: argparse.Namespace) -> float:
    """Nats a byte on the text that is held out."""
    text, resources = str(options.wikitext / "test.txt"), Resources(threads=1)
    return streamcomp.evaluate(
        model, text, seq_len=SEQ_LEN, windows=options.windows, resources=resources
    ).nll


def _table(training: dict[str, Any], dense: float, values: dict[str, Any]) -> str:
    load = [count for block in training["load"] for count in block]
    columns = [(tokens, f"{ratio:g}") for tokens in TOKENS for ratio in RATIOS]
    lines = [
        f"{training['parameters']:,} parameters, trained in {format_seconds(training['seconds'])}; "
        f"{dense:.4f} nats a byte; {min(load)} to {max(load)} of {max(TOKENS)} tokens per expert.",
        "",
        "| | " + " | ".join(f"{tokens} tokens, {ratio}" for tokens, ratio in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for reach in REACHES:
        base = [0.0] * len(columns)
        for row in ROWS:
            lost = [values[f"{reach}, {t} tokens, {row.name}"][x]["lost"] for t, x in columns]
            base = lost if row is ROWS[0] else base
            cells = [f"{one:.4f} ({one / of:.2f})" for one, of in zip(lost, base, strict=True)]
            lines.append(f"| {reach}: {row.name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
