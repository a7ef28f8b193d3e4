"""Model folders with something changed, and a model run block by block."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from streamcomp.checkpoint.index import SINGLE_FILE, read_index
from streamcomp.model.skeleton import Skeleton
from streamcomp.model.streamer import BlockStreamer
from tests.pico import save_pico

CPU = torch.device("cpu")


def open_skeleton(folder: Path) -> Skeleton:
    return Skeleton(read_index(folder))


def streamed_logits(folder: Path, tokens: Tensor) -> Tensor:
    """Logits (windows, seq, vocabulary) with one block in memory at a time."""
    skeleton = open_skeleton(folder)
    streamer = BlockStreamer(skeleton, CPU)
    hidden, layer_inputs = streamer.capture(tokens)
    for number in range(len(skeleton)):
        with streamer.block(number) as block:
            hidden = block.run(hidden, layer_inputs[number])
    with streamer.head() as head:
        return head(hidden)


def edit_config(folder: Path, **settings: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    return folder


def save_edited(
    folder: Path,
    change: Callable[[dict[str, Tensor]], Any],
    architecture: str = "llama",
    **settings: Any,
) -> Path:
    """A pico model in a single file whose tensors went through ``change``."""
    save_pico(folder, architecture, shard_size="1GB", **settings)
    tensors = load_file(folder / SINGLE_FILE)
    change(tensors)
    save_file(tensors, folder / SINGLE_FILE, metadata={"format": "pt"})
    return folder
