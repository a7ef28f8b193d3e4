"""Experts one by one are the experts of the whole block, forward, back and in their moments."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from streamcomp.calibration.hidden_states import StreamShape
from streamcomp.calibration.observe import group_moments
from streamcomp.calibration.routing import Routing, RowFile, routing_bytes, scratch_bytes
from streamcomp.errors import NonFiniteError, OutputError
from streamcomp.methods import Moment
from streamcomp.model.experts import ExpertBank, answering
from streamcomp.model.sites import ExpertSite, find_sites
from streamcomp.model.skeleton import Skeleton
from streamcomp.model.streamer import BlockStreamer
from streamcomp.model.taps import LayerInputs
from tests.model.folders import CPU, open_skeleton
from tests.pico import HIDDEN, MIXTURES, pico_tokens

F64 = torch.float64
WINDOWS, SEQ, BLOCK = 3, 10, 1
STREAM = StreamShape(WINDOWS, SEQ, HIDDEN, F64)
PRIOR = 0.5  # tokens for each channel
CLOSE = 1e-6  # some routers compute in fp32, and round as the number of windows has it


class Case:
    """A block of a mixture in fp64, what it is given, and the gradient at its output."""

    def __init__(self, folder: Path) -> None:
        self.skeleton: Skeleton = open_skeleton(folder)
        self.skeleton.model.set_experts_implementation("eager")  # grouped products know no fp64
        sites = find_sites(self.skeleton, BLOCK)
        assert sites.bank is not None
        self.bank: ExpertBank = sites.bank
        self.sites = list(sites.experts)
        self.streamer = BlockStreamer(self.skeleton, CPU)
        tokens = pico_tokens(WINDOWS, SEQ)
        random = torch.Generator().manual_seed(3)
        self.hidden = torch.randn(WINDOWS, SEQ, HIDDEN, generator=random, dtype=F64)
        self.gradient = torch.randn(WINDOWS, SEQ, HIDDEN, generator=random, dtype=F64)
        self._tokens = tokens

    def inputs(self, windows: int) -> LayerInputs:
        return self.streamer.layer_inputs(self._tokens[:windows])[BLOCK]

    def route(self, folder: Path, *, back: bool = False) -> Routing:
        """All windows through the block, two at a time, and one expert after the other."""
        routing = Routing(self.bank, STREAM, F64, folder)
        with self.streamer.block(BLOCK, self.bank) as block:
            for start in range(0, WINDOWS, 2):
                hidden = self.hidden[start : start + 2]
                routing.capture(block, start, hidden, self.inputs(len(hidden)))
            self.each(routing.forward)
            if back:
                for start in range(0, WINDOWS, 2):
                    part = slice(start, start + 2)
                    hidden, gradient = self.hidden[part], self.gradient[part]
                    routing.descend(block, start, hidden, self.inputs(len(hidden)), gradient)
                self.each(routing.differentiate)
        return routing

    def each(self, do: Callable[..., object]) -> None:
        """``do`` with every expert, loaded one at a time."""
        for number in range(self.bank.count):
            with self.streamer.experts(self.bank, number, number + 1) as experts:
                do(experts, number)

    def moments(self, routing: Routing, *, gradients: bool) -> dict[ExpertSite, Moment]:
        found: dict[ExpertSite, Moment] = {}

        def take(experts: object, number: int) -> None:
            sites = [site for site in self.sites if site.expert == number]
            groups = group_moments(sites, (), gradients=gradients)
            found.update(routing.moments(experts, number, groups))  # type: ignore[arg-type]

        self.each(take)
        return found


@pytest.fixture
def case(pico: Callable[..., Path]) -> Callable[[str], Case]:
    return lambda kind: Case(pico(kind, dtype=F64))


@pytest.mark.parametrize("kind", MIXTURES)
def test_the_block_on_what_its_experts_gave_is_the_whole_block(
    kind: str, case: Callable[[str], Case], tmp_path: Path
) -> None:
    given = case(kind)
    inputs = given.inputs(WINDOWS)
    with given.streamer.block(BLOCK) as whole:
        expected = whole.run(given.hidden, inputs)
        gradient = whole.differentiate(given.hidden, inputs, given.gradient)
        digest = whole.digests

    with (
        given.route(tmp_path, back=True) as routing,
        given.streamer.block(BLOCK, given.bank) as block,
    ):
        with routing.replayed(block, 0, WINDOWS):
            output = block.run(given.hidden, inputs)
            below = block.differentiate(given.hidden, inputs, given.gradient)
        apart = block.digests

    torch.testing.assert_close(output, expected, rtol=CLOSE, atol=CLOSE)
    torch.testing.assert_close(below, gradient, rtol=CLOSE, atol=CLOSE)
    assert apart.items() < digest.items()  # the experts are not read with the block
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", MIXTURES)
def test_moments_are_those_that_autograd_finds(
    kind: str, case: Callable[[str], Case], tmp_path: Path
) -> None:
    given = case(kind)
    seen, pairs = _by_autograd(given)

    with given.route(tmp_path, back=True) as routing:
        moments = given.moments(routing, gradients=True)

    assert set(moments) == set(given.sites)
    for site, moment in moments.items():
        inputs, gradients = (torch.cat(rows) for rows in zip(*seen[site.name], strict=True))
        everyone = [rows for other in given.sites if other.leaf == site.leaf
                    for rows in seen[other.name]]  # fmt: skip
        extra = PRIOR * site.columns
        prior = extra * sum(float(x.square().sum()) for x, _ in everyone) / (pairs * site.columns)
        steep = extra * sum(float(g.square().sum()) for _, g in everyone) / (pairs * site.rows)
        scale = STREAM.tokens * (len(inputs) + 1) / (len(inputs) + extra) ** 2
        weight = _weight(given, site)
        h = inputs.T @ inputs + prior * torch.eye(site.columns, dtype=F64)
        gamma = gradients.T @ gradients + steep * torch.eye(site.rows, dtype=F64)
        expected = h if moment.side == "inputs" else weight @ h @ weight.T
        torch.testing.assert_close(moment.value, expected, rtol=CLOSE, atol=CLOSE)
        assert moment.gradient is not None
        smaller = gamma if site.rows <= site.columns else weight.T @ gamma @ weight
        torch.testing.assert_close(moment.gradient.value, scale * smaller, rtol=CLOSE, atol=CLOSE)
        assert moment.gradient.energy == pytest.approx(scale * float(gamma.trace()), rel=CLOSE)
        assert routing.reached(site.expert) == len(inputs)
        assert not moment.leaves_open(len(moment.value))


def test_moments_without_gradients_need_no_backward(
    case: Callable[[str], Case], tmp_path: Path
) -> None:
    given = case("qwen3_moe")
    with given.route(tmp_path, back=True) as routing:
        both = given.moments(routing, gradients=True)
    with given.route(tmp_path) as routing:
        alone = given.moments(routing, gradients=False)

    for site, moment in alone.items():
        assert moment.gradient is None
        assert moment.side == both[site].side
        torch.testing.assert_close(moment.value, both[site].value, rtol=1e-12, atol=1e-12)


def test_an_expert_that_no_token_reached_has_the_prior_alone(
    case: Callable[[str], Case], tmp_path: Path
) -> None:
    given = case("mixtral")
    with given.route(tmp_path, back=True) as routing:
        routing._chosen[routing._chosen == 2] = 3
        moments = given.moments(routing, gradients=True)

    for site in (site for site in given.sites if site.expert == 2):
        moment = moments[site]
        weight = _weight(given, site)
        plain = torch.eye(site.columns, dtype=F64) if moment.side == "inputs" else weight @ weight.T
        size = len(plain)
        scale = float(moment.value.trace() / plain.trace())
        assert scale > 0
        torch.testing.assert_close(moment.value, scale * plain)
        assert moment.rows == size


def test_overflowing_moments_name_the_expert(case: Callable[[str], Case], tmp_path: Path) -> None:
    given = case("mixtral")
    given.hidden[0, 0, 0] = torch.nan

    with given.route(tmp_path) as routing, pytest.raises(NonFiniteError, match=r"experts\.\d"):
        given.moments(routing, gradients=False)


# -- files -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32])
def test_rows_are_read_as_they_were_written(dtype: torch.dtype, tmp_path: Path) -> None:
    values = torch.arange(40).reshape(8, 5).to(dtype)
    file = RowFile(tmp_path, 12, 5, dtype)
    rows = torch.tensor([0, 1, 2, 5, 7, 8, 10, 11])

    file.write(rows, values)
    file.add(rows[2:5], values[:3])

    whole = torch.zeros(12, 5, dtype=dtype)
    whole[rows] = values
    whole[rows[2:5]] += values[:3]
    assert torch.equal(file.read(torch.arange(12)), whole)
    assert torch.equal(file.read(torch.tensor([11])), whole[11:])
    assert torch.equal(torch.cat(list(file.parts())), whole)
    assert list(tmp_path.iterdir()) == []
    file.close()


def test_a_full_disk_shows_when_the_file_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)

    with pytest.raises(OutputError, match="no space left"):
        RowFile(tmp_path, 4, 4, torch.float32)


def test_a_file_that_cannot_be_read_is_one_error(tmp_path: Path) -> None:
    file = RowFile(tmp_path, 4, 4, torch.float32)
    os.ftruncate(file._file.fileno(), 20)
    with pytest.raises(OutputError, match="cut short"):
        file.read(torch.arange(4))
    file.close()


def test_bytes_of_a_routing_are_counted(case: Callable[[str], Case], tmp_path: Path) -> None:
    given = case("mixtral")
    with given.route(tmp_path, back=True) as routing:
        held = (routing._chosen, routing._weights, routing._weight_gradients)
        nbytes = sum(value.nbytes for value in held if value is not None)
        files = sum(file._rows * file._row_bytes for file in routing._files)

    assert nbytes <= routing_bytes(given.bank, STREAM, gradients=True)
    assert files == scratch_bytes(given.bank, STREAM, F64, gradients=True)


# -- what is expected --------------------------------------------------------------------------


def _weight(given: Case, site: ExpertSite) -> Tensor:
    with given.streamer.experts(given.bank, site.expert, site.expert + 1) as experts:
        return experts.weight(site.expert, site.leaf).clone()


def _by_autograd(given: Case) -> tuple[dict[str, list[tuple[Tensor, Tensor]]], int]:
    """Inputs of each expert's matrices and gradients at their outputs, and pairs of token, expert.

    From one forward and backward of the whole block, whose experts multiply matrices in the open.
    """
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {site.name: [] for site in given.sites}
    pairs = 0
    first, second = (name for name, _, _ in given.bank.matrices)
    with given.streamer.block(BLOCK) as block:
        experts: Any = block.running(given.bank.name)

        def linear(expert: int, name: str, rows: Tensor) -> Tensor:
            weight = experts.get_parameter(name)[expert]
            bias = experts._parameters.get(f"{name}_bias")
            output = functional.linear(
                rows,
                weight.T if experts.is_transposed else weight,
                None if bias is None else bias[expert],
            )
            site = f"{given.bank.name}.{expert}.{name}"
            output.register_hook(lambda g: seen[site].append((rows.detach(), g.detach())))
            return output

        def forward(hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
            nonlocal pairs
            result = torch.zeros_like(hidden)
            for expert in range(given.bank.count):
                tokens, places = torch.where(index == expert)
                pairs += len(tokens)
                if len(tokens):
                    inner = experts._apply_gate(linear(expert, first, hidden[tokens]))
                    output = linear(expert, second, inner) * weights[tokens, places, None]
                    result = result.index_add(0, tokens, output)
            return result

        with answering(experts, forward):
            block.differentiate(given.hidden, given.inputs(WINDOWS), given.gradient)
    empty = torch.zeros(0, 1, dtype=F64)
    for site in given.sites:
        if not seen[site.name]:
            rows = empty.expand(0, site.columns), empty.expand(0, site.rows)
            seen[site.name].append(rows)
    return seen, pairs
