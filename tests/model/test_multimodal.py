from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Gemma3Config

from streamcomp.checkpoint.index import read_index
from streamcomp.model.skeleton import Skeleton
from streamcomp.model.streamer import BlockStreamer

CPU = torch.device("cpu")
# As many layers of images as of text: the number alone does not tell them apart.
TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "sliding_window": 8,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}


def test_of_a_model_with_a_tower_for_images_the_text_part_is_streamed(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = Gemma3Config(text_config=TEXT, vision_config=VISION)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.save_pretrained(tmp_path)
    tokens = torch.randint(1, 60, (2, 12))
    with torch.no_grad():
        whole = model(tokens).logits

    skeleton = Skeleton(read_index(tmp_path))
    streamer = BlockStreamer(skeleton, CPU)
    hidden, layer_inputs = streamer.capture(tokens)
    for number in range(len(skeleton)):
        with streamer.block(number) as block:
            hidden = block.run(hidden, layer_inputs[number])
    with streamer.head() as head:
        logits = head(hidden)

    assert torch.equal(logits, whole)
    tower = [n for n, p in skeleton.model.named_parameters() if "vision" in n and not p.is_meta]
    assert tower == []  # its weights were never read
