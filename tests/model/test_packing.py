"""Models that hand their blocks more than one vector for each token, streamed as rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from streamcomp.errors import CorruptShardError
from streamcomp.model.packing import Packing, Part, part_of
from streamcomp.model.streamer import BlockStreamer
from streamcomp.model.taps import LayerInputs
from tests.families.tiny import causal_types, save_tiny
from tests.jobs import compress
from tests.model.folders import CPU, open_skeleton, streamed_logits
from tests.pico import pico_tokens, whole_logits

KINDS = sorted({"gemma3n_text", "gemma4_text"} & set(causal_types()))
each_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind)
            save_tiny(kind, made[kind])
        return made[kind]

    return make


@pytest.mark.parametrize(
    ("shape", "part"),
    [
        ((3, 5, 8), Part((8,), (0, 1))),
        ((4, 3, 5, 8), Part((4, 8), (1, 2))),
        ((3, 2, 5, 8), Part((2, 8), (0, 2))),
        ((5, 3, 8), Part((8,), (1, 0))),
    ],
)
def test_the_axes_of_a_tensor_are_told_by_their_sizes(shape: tuple[int, ...], part: Part) -> None:
    tensor = torch.arange(3 * 5 * part.numbers).view(shape)

    assert part_of(shape, 3, 5) == part
    assert part.flat(tensor).shape == (3, 5, part.numbers)
    assert torch.equal(part.whole(part.flat(tensor)), tensor)
    assert part.plain == (shape == (3, 5, 8))


@pytest.mark.parametrize("shape", [(3, 5), (3, 3, 5), (3, 5, 5, 2), (3, 4, 8), (4, 5, 8)])
def test_axes_that_cannot_be_told_are_not_guessed(shape: tuple[int, ...]) -> None:
    assert part_of(shape, 3, 5) is None


def test_a_row_holds_hidden_states_then_inputs_then_what_blocks_leave(
    random: torch.Generator,
) -> None:
    flat, heads = Part((2,), (0, 1)), Part((2, 3), (0, 2))
    packing = Packing(Part((4, 6), (1, 2)), ({1: flat}, {}, {0: flat}), {"kv": (heads, heads)})
    hidden = torch.randn(4, 3, 5, 6, generator=random)
    first, last = (torch.randn(3, 5, 2, generator=random) for _ in range(2))

    rows, inputs = packing.pack(
        hidden, [LayerInputs(("a", first), {}), LayerInputs((), {}), LayerInputs((last,), {})]
    )

    assert rows.shape == (3, 5, packing.width) == (3, 5, 24 + 2 + 2 + 12)
    assert torch.equal(packing.hidden_in(rows), hidden)
    assert torch.equal(rows[..., 24:26], first) and torch.equal(rows[..., 26:28], last)
    assert not rows[..., 28:].any()
    assert inputs[0].args[0] == "a" and not inputs[0].tensors and not inputs[2].tensors


@each_kind
def test_streamed_rows_give_the_whole_models_logits(kind: str, tiny: Callable[[str], Path]) -> None:
    assert torch.equal(
        streamed_logits(tiny(kind), pico_tokens()), whole_logits(tiny(kind), pico_tokens())
    )


@each_kind
def test_rows_of_a_window_do_not_depend_on_the_others(
    kind: str, tiny: Callable[[str], Path]
) -> None:
    folder, tokens = tiny(kind), pico_tokens()

    together = streamed_logits(folder, tokens)

    alone = torch.cat([streamed_logits(folder, window[None]) for window in tokens])
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-5)


@each_kind
def test_of_tables_by_token_only_the_rows_in_use_are_read(
    kind: str, tiny: Callable[[str], Path]
) -> None:
    skeleton = open_skeleton(tiny(kind))
    streamer = BlockStreamer(skeleton, CPU)
    seen: dict[str, tuple[int, ...]] = {}
    tables = {"model.embed_tokens", "model.embed_tokens_per_layer"}
    for name in tables:
        module = skeleton.model.get_submodule(name)
        weights = module._parameters
        module.register_forward_hook(
            lambda *_, name=name, weights=weights: seen.update({name: weights["weight"].shape})
        )

    streamer.capture(torch.tensor([[7, 9, 7, 11]]))

    assert skeleton.rehearsal.tables == tables
    assert {shape[0] for shape in seen.values()} == {3} and seen.keys() == tables
    assert all(skeleton.model.get_parameter(f"{name}.weight").is_meta for name in tables)


@each_kind
def test_update_and_refinement_run_on_rows(
    kind: str, tiny: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"method": "svd-llm", "update": True, "refine": 1, "ratio": 0.3}
    result = compress(tiny(kind), tmp_path / "out", text, **settings)

    assert all(math.isfinite(row["relative_loss"]) for row in result.report["linears"])
    made = streamed_logits(tmp_path / "out", pico_tokens())
    torch.testing.assert_close(
        made, whole_logits(tmp_path / "out", pico_tokens()), rtol=1e-4, atol=1e-5
    )


def test_a_table_of_positions_is_read_whole_although_it_is_given_the_tokens(
    tiny: Callable[[str], Path],
) -> None:
    skeleton = open_skeleton(tiny("bart"))

    assert skeleton.rehearsal.tables == {"model.decoder.embed_tokens"}


def test_a_plain_model_has_rows_of_hidden_states_alone_and_no_hooks(
    pico: Callable[..., Path],
) -> None:
    skeleton = open_skeleton(pico("gemma3"))

    assert skeleton.packing is None
    assert skeleton.hidden_size == 32
    assert not skeleton.block(0)._forward_hooks and not skeleton.block(0)._forward_pre_hooks


@each_kind
def test_tokens_that_no_row_is_for_are_refused(kind: str, tiny: Callable[[str], Path]) -> None:
    streamer = BlockStreamer(open_skeleton(tiny(kind)), CPU)

    with pytest.raises(CorruptShardError, match="tokenizer belongs to another model"):
        streamer.capture(torch.tensor([[7, 9, 10**6]]))
