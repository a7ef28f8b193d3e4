"""Checkpoints of the shapes of well-known models, with random weights or without any.

    python benchmarks/shapes.py Llama-3-70B out/70b --blocks 2
    python benchmarks/shapes.py Llama-3-70B out/70b-headers --headers-only

Peak memory and seconds per block depend on shapes alone, so that a few blocks of random weights
stand for a model that nobody has to download. With ``--headers-only`` the files are sparse: they
have headers and lengths, and take no disk; that is all ``streamcomp plan`` reads. The tokenizer
knows bytes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

# hidden, feed-forward, heads, key-value heads, vocabulary, blocks
SHAPES = {
    "TinyLlama-1.1B": (2048, 5632, 32, 4, 32000, 22),
    "Llama-2-7B": (4096, 11008, 32, 32, 32000, 32),
    "Llama-3-8B": (4096, 14336, 32, 8, 128256, 32),
    "Llama-3-70B": (8192, 28672, 64, 8, 128256, 80),
    "Llama-3.1-405B": (16384, 53248, 128, 8, 128256, 126),
}
POSITIONS = 8192


def make_shape(
    name: str, folder: Path, blocks: int = 0, *, headers_only: bool = False, seed: int = 0
) -> Path:
    """The checkpoint ``folder`` of shape ``name`` with ``blocks`` blocks (0: as many as it has).

    One file per block and one for what lies in none; weights are bf16, normal with deviation
    1/sqrt(columns). Holds the largest of these files.
    """
    hidden, feed_forward, heads, kv_heads, vocabulary, depth = SHAPES[name]
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=feed_forward,
        num_hidden_layers=blocks or depth,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=False,
        bos_token_id=256,
        eos_token_id=257,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    folder.mkdir(parents=True, exist_ok=True)
    random = torch.Generator().manual_seed(seed)
    index: dict[str, str] = {}
    for file, shapes in _files(model.state_dict()):
        path = folder / f"{file}.safetensors"
        if headers_only:
            _write_header(path, shapes)
        else:
            tensors = {key: _weight(shape, random) for key, shape in shapes.items()}
            save_file(tensors, path, metadata={"format": "pt"})
        index |= dict.fromkeys(shapes, path.name)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": index})
    )
    config.save_pretrained(folder)
    _byte_tokenizer().save_pretrained(folder)
    return folder


def _files(state: dict[str, torch.Tensor]) -> Iterator[tuple[str, dict[str, tuple[int, ...]]]]:
    """File name -> names and shapes of its tensors."""
    files: dict[str, dict[str, tuple[int, ...]]] = {}
    for key, value in state.items():
        number = key.partition("layers.")[2].partition(".")[0]
        file = f"block-{int(number):03d}" if number else key.partition(".weight")[0]
        files.setdefault(file, {})[key] = tuple(value.shape)
    yield from files.items()


def _weight(shape: tuple[int, ...], random: torch.Generator) -> torch.Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    weight = torch.empty(shape, dtype=torch.bfloat16)
    return weight.normal_(0.0, shape[1] ** -0.5, generator=random)


def _write_header(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    header, offset = {}, 0
    for key, shape in shapes.items():
        size = 2 * int(torch.Size(shape).numel())
        header[key] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: place for place, letter in enumerate([*letters, "<s>", "</s>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 256)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--blocks", type=int, default=0, help="0: as many as the model has")
    parser.add_argument("--headers-only", action="store_true", help="sparse files without weights")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    make_shape(options.shape, options.folder, options.blocks, headers_only=options.headers_only)


if __name__ == "__main__":
    main()
