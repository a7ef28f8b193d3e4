"""Jobs on pico models, run in this process, and what they leave read back without streamcomp."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

import streamcomp
from streamcomp import CompressResult, Recipe, Resources, cli
from streamcomp.job import plan
from streamcomp.job.levers import Levers
from streamcomp.job.planner import StepPlanner
from streamcomp.job.progress import SilentProgress
from streamcomp.machine.rates import MachineRates
from streamcomp.machine.session import Probe, probe, probed

REPOSITORY = Path(__file__).parents[1]

# Small, and yet more tokens (128) than the widest input of a pico model has channels (48).
SMALL: dict[str, Any] = {"samples": 8, "seq_len": 16}

# Memory for a job: enough for each of them beside what this process holds, also on a machine of
# 2 GiB, and the same however much others leave. One with another budget names it.
BUDGET = "1500M"
RESOURCES = Resources(BUDGET, threads=1)
_TAKE_A_BUDGET = ("compress", "plan", "eval")

# What a run of another process needs to be as quiet as one in this process.
ENVIRONMENT = {
    **os.environ,
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
}


def small_recipe(text: Path | str, **settings: Any) -> Recipe:
    return Recipe(**{**SMALL, "calibration": (str(text),), **settings})


def compress(
    model: Path,
    out: Path,
    text: Path | str,
    *,
    max_ram: str = BUDGET,
    work_dir: Path | None = None,
    keep_work: bool = False,
    progress: Any = None,
    **settings: Any,
) -> CompressResult:
    """``streamcomp.compress`` with a small recipe and one thread: two would wait for each other."""
    resources = Resources(max_ram=max_ram, threads=1, work_dir=work_dir, keep_work=keep_work)
    with quick_plan():
        return streamcomp.compress(
            model, out, small_recipe(text, **settings), resources, progress=progress
        )


RATES = MachineRates(1e9, 1e9, 1e9, 1e9, 1e9, 1e9)


@dataclass
class FakeProbe(Probe):
    """A machine whose speed is not measured, which takes longer than a small job.

    What a field holds is told instead of what this machine is like.
    """

    baseline: int | None = None
    kernels: int | None = None
    in_memory: Callable[[Path], bool] | None = None

    def baseline_bytes(self) -> int:
        return super().baseline_bytes() if self.baseline is None else self.baseline

    def is_memory_backed(self, folder: Path) -> bool:
        return (
            super().is_memory_backed(folder) if self.in_memory is None else self.in_memory(folder)
        )

    def kernel_bytes(self, device: torch.device, dtype: torch.dtype, **uses: bool) -> int:
        return super().kernel_bytes(device, dtype, **uses) if self.kernels is None else self.kernels

    def rates(self, device: torch.device, dtype: torch.dtype) -> MachineRates:
        return RATES


def quick_plan() -> contextlib.AbstractContextManager[None]:
    """Unless a test has put a probe of its own there."""
    return contextlib.nullcontext() if isinstance(probe(), FakeProbe) else probed(FakeProbe())


@contextlib.contextmanager
def set_levers(**levers: int) -> Iterator[None]:
    """Plans made inside have these ``levers`` instead of the largest that fit."""
    choose = plan._choose_levers

    def chosen(planner: StepPlanner, fixed: Levers | None) -> tuple[Levers, Levers]:
        smallest, largest = choose(planner, fixed)
        return smallest, replace(largest, **levers)

    with mock.patch.object(plan, "_choose_levers", chosen):
        yield


class Interrupted(Exception):
    """Raised by :class:`Interrupt`."""


class Interrupt(SilentProgress):
    """Ends a job right after its step number ``after`` has become durable."""

    def __init__(self, after: int) -> None:
        self.after = after

    def finish_step(self, step: int, name: str, seconds: float, detail: str) -> None:
        if step == self.after:
            raise Interrupted(name)


class Notes(SilentProgress):
    """Keeps what a job says, and where it began."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.done = -1
        self.steps: list[str] = []

    def begin(self, title: str, seconds: list[float], done: int, budget_bytes: int) -> None:
        self.done = done

    def finish_step(self, step: int, name: str, seconds: float, detail: str) -> None:
        self.steps.append(name)

    def note(self, text: str) -> None:
        self.texts.append(text)


@dataclass(frozen=True)
class Finished:
    """A command that has ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def run_cli(*arguments: object) -> Finished:
    """The command line in this process; an exception that is none of ours goes through.

    With ``BUDGET`` where the command takes one and none is given.
    """
    if "--max-ram" not in arguments and any(name in arguments for name in _TAKE_A_BUDGET):
        arguments = ("--max-ram", BUDGET, *arguments)
    out, err = io.StringIO(), io.StringIO()
    code = 0
    with (
        mock.patch.object(sys, "argv", ["streamcomp", *map(str, arguments)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        quick_plan(),
    ):
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
    return Finished(code, out.getvalue(), err.getvalue())


def run_python(
    *arguments: object, cwd: Path = REPOSITORY, environment: Mapping[str, str] | None = None
) -> Finished:
    """Another Python with ``arguments``; it sees the checkout only where ``cwd`` is that."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env={**ENVIRONMENT, **(environment or {})},
        capture_output=True,
        text=True,
        check=False,
    )
    return Finished(done.returncode, done.stdout, done.stderr)


def varied_text(path: Path, tokens: int, *, seed: int = 0) -> Path:
    """Write ``tokens`` random printable characters: more kinds than a pico model has channels."""
    random = torch.Generator().manual_seed(seed)
    path.write_bytes(bytes(torch.randint(32, 127, (tokens,), generator=random).tolist()))
    return path


def stored_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint folder, by their names on disk."""
    tensors: dict[str, Tensor] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(shard)
    return tensors


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text("utf-8"))
    return config


def factored_modules(folder: Path) -> dict[str, dict[str, Any]]:
    modules: dict[str, dict[str, Any]] = config_of(folder)["quantization_config"]["modules"]
    return modules


def product(tensors: Mapping[str, Tensor], name: str, form: str, axis: str = "") -> Tensor:
    """W' (m, n) of the linear ``name`` as docs/format.md describes it, in fp64."""
    right = tensors[f"{name}.weight"].double()  # (r, n)
    if form == "uv":
        return tensors[f"{name}.U"].double() @ right
    if form == "shared":
        codebook, labels = tensors[f"{name}.codebook"].double(), tensors[f"{name}.labels"].long()
        correction = tensors[f"{name}.U"].double() @ right
        return correction + (codebook[labels] if axis == "rows" else codebook[:, labels])
    rows = torch.cat((right, tensors[f"{name}.coef"].double() @ right))  # (m, n)
    return rows[tensors[f"{name}.pivots"].long()]


def products(folder: Path) -> dict[str, Tensor]:
    """W' of every factored linear in ``folder``, by its name on disk."""
    tensors = stored_tensors(folder)
    return {
        name: product(tensors, name, spec["form"], spec.get("axis", ""))
        for name, spec in factored_modules(folder).items()
        if "ranks" not in spec  # experts: see load_products
    }


def load_dense(folder: Path, weights: Mapping[str, Tensor] | None = None) -> PreTrainedModel:
    """The model in ``folder`` whole, with ``weights`` (by name on disk) in the place of its own.

    A linear's name on disk is its name in all pico models, but for a prefix.
    """
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    modules = dict(model.named_modules())
    for name, weight in (weights or {}).items():
        linear = modules[in_memory(model, name)]
        assert isinstance(linear, nn.Linear | Conv1D)
        weight = as_stored(linear, weight)
        assert linear.weight.shape == weight.shape
        linear.weight.data = weight.to(linear.weight.dtype)
    return model


def as_stored(linear: nn.Module, weight: Tensor) -> Tensor:
    """``weight`` (m, n) as ``linear`` holds it: the other way round in a ``Conv1D``."""
    return weight.T if isinstance(linear, Conv1D) else weight


def in_memory(model: nn.Module, disk_name: str) -> str:
    """The name that the module ``disk_name`` has in ``model``."""
    names = [name for name, _ in model.named_modules() if name]
    tail = re.split(r"(?:^|\.)(?:layers|h)\.", disk_name, maxsplit=1)[1]
    found: list[str] = [n for n in names if re.search(rf"\b(layers|h)\.{re.escape(tail)}$", n)]
    assert len(found) == 1, (disk_name, found)
    return found[0]


@torch.no_grad()
def load_products(dense: Path, out: Path) -> PreTrainedModel:
    """The dense model with W' instead of every weight that ``out`` holds factors of."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(dense, dtype="auto").eval()
    tensors = stored_tensors(out)
    for disk_name, spec in factored_modules(out).items():
        tail = disk_name.partition("layers.")[2].replace("block_sparse_moe", "mlp")
        module = next(
            m
            for n, m in model.named_modules()
            if n.partition("layers.")[2].replace("block_sparse_moe", "mlp") == tail
        )
        if "ranks" not in spec:
            weight = product(tensors, disk_name, spec["form"])
            module.get_parameter("weight").copy_(weight)
            continue
        for name, ranks in spec["ranks"].items():
            parameter = module.get_parameter(name)
            for expert, weight in expert_products(tensors, f"{disk_name}.{name}", spec, ranks):
                parameter[expert].copy_(weight.T if getattr(module, "is_transposed") else weight)  # noqa: B009
    return model


def expert_products(
    tensors: dict[str, Tensor], name: str, spec: dict[str, Any], ranks: list[int]
) -> Iterator[tuple[int, Tensor]]:
    """W' of each expert, as docs/format.md says that they are stored."""
    left = "U" if spec["form"] == "uv" else "coef"
    row, place = 0, 0
    for expert in sorted(range(len(ranks)), key=lambda e: ranks[e]):
        rank = ranks[expert]
        right = tensors[f"{name}_V"][row : row + rank].double()
        row += rank
        pivots = tensors.get(f"{name}_pivots")
        rows = pivots.shape[1] if pivots is not None else None
        if pivots is None:
            rows = max(ranks) if f"{name}_U" not in tensors else _rows(tensors, name, ranks)
        assert rows is not None
        if rank == rows:
            yield expert, right
            continue
        height = rows if pivots is None else rows - rank
        flat = tensors[f"{name}_{left}"][place : place + rank * height].double()
        place += rank * height
        if pivots is None:
            yield expert, flat.view(rank, height).T @ right
        else:
            stacked = torch.cat((right, flat.view(height, rank) @ right))
            yield expert, stacked[pivots[expert].long()]


def _rows(tensors: dict[str, Tensor], name: str, ranks: list[int]) -> int:
    """The rows m for which U has as many numbers as it has; dense experts have rank m."""
    numbers = len(tensors[f"{name}_U"])
    return next(m for m in range(1, numbers + 1) if sum(r * m for r in ranks if r != m) == numbers)


@torch.no_grad()
def logits_of(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=tokens, use_cache=False).logits
    return logits


@contextlib.contextmanager
def inputs_of(model: nn.Module, names: list[str]) -> Iterator[dict[str, list[Tensor]]]:
    """While open, what is fed to the linears ``names``: tensors (tokens, n), fp64."""
    seen: dict[str, list[Tensor]] = {name: [] for name in names}

    def watch(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen[name].append(args[0].detach().flatten(0, -2).double())

        return hook

    hooks = [model.get_submodule(name).register_forward_pre_hook(watch(name)) for name in names]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below ``folder`` with its bytes."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
