"""What the fuzzer attacks: for each kind of file, a mutation and the call that reads it.

A target is a function that takes a case, writes a damaged input into the case's folder and reads
it. It returns if the input was accepted, and raises what the call raised.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import streamcomp
from streamcomp.calibration.corpus import load_windows
from streamcomp.checkpoint.index import read_header, read_index
from streamcomp.machine.memory import PeakMeter
from streamcomp.machine.session import probed
from tests.attack.mutations import (
    mutated_bytes,
    mutated_header,
    mutated_json,
    mutated_lines,
    replace_by_special,
)
from tests.jobs import (
    RESOURCES,
    FakeProbe,
    Interrupt,
    Interrupted,
    compress,
    small_recipe,
    tree,
    varied_text,
)
from tests.pico import make_tokenizer, save_pico

__all__ = ["TARGETS", "Case", "WronglyAccepted", "make_bases", "target_of"]

ARCHITECTURES = ("llama", "mixtral", "gemma3", "opt", "gpt_neox", "phi3", "qwen2", "bloom")
# Compressed folders, and the settings that make them.
COMPRESSED: dict[str, dict[str, Any]] = {
    "pivot": {"method": "svd-llm"},
    "uv": {"method": "svd-llm", "form": "uv"},
    "shared": {"method": "swsc"},
}
INDEX, REPORT = "model.safetensors.index.json", "streamcomp_report.json"
JOURNAL = Path(".streamcomp", "journal.jsonl")
_TEXT = "text.txt"
_RATIOS = (0.2, 0.5)
_TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
_TEMPLATES = (
    *("", "{{", "{% for %}", "{{ 'x' * 10**10 }}", "{{ messages[99].content }}", "{{ 1 / 0 }}"),
    *("{% for a in range(10**9) %}{% endfor %}", "{{ raise_exception('no') }}", "{{ none.x }}"),
    *("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "{{ ''.__class__.__mro__ }}", "\ufffe"),
    *("{{ [0] * 10**9 }}", "{{ 'a'.ljust(10**10) }}", "{{ '%10000000000d' % 1 }}", _TEMPLATE * 9),
)
_SPECIAL = 0.01  # share of cases in which a file becomes a pipe, a link, a folder or nothing


class WronglyAccepted(Exception):
    """An input was read without an error that should have been refused."""


@dataclass(frozen=True)
class Case:
    """One attack: a source of random numbers, folders to copy from, and an empty folder."""

    random: Random
    bases: Path
    folder: Path

    def copy(self, name: str, *, links: bool = True) -> Path:
        """The base folder ``name``; as hard links where no file is changed in its place."""
        target = self.folder / name
        shutil.copytree(self.bases / name, target, copy_function=os.link if links else shutil.copy2)
        return target

    def write(self, path: Path, data: bytes) -> None:
        """Put ``data`` at ``path``, or now and then something that is no plain file."""
        if self.random.random() < _SPECIAL:
            replace_by_special(path, self.random)
            return
        path.unlink()
        path.write_bytes(data)


def target_of(random: Random) -> str:
    """A name of ``TARGETS``, drawn by their shares."""
    shares = [share for share, _ in TARGETS.values()]
    return random.choices(list(TARGETS), shares)[0]


# -- what is attacked ----------------------------------------------------------------------------


def make_bases(folder: Path) -> None:
    """Make the folders that cases begin with, the same ones on every run.

    Times and memory that a job writes down are replaced by fixed numbers. The working directory
    must be ``folder``: paths in journals are relative.
    """
    for name in ARCHITECTURES:
        save_pico(folder / name, name, shard_size="1GB" if name == "opt" else "20KB")
    varied_text(folder / _TEXT, 4000)
    tensors = {
        "a.weight": torch.ones(4, 6),
        "b.weight": torch.ones(6, 4, dtype=torch.bfloat16),
        "b.bias": torch.ones(6, dtype=torch.float16),
        "c": torch.arange(5, dtype=torch.int32),
        "d": torch.ones((), dtype=torch.float64),
        "e": torch.ones(0, 3),
    }
    (folder / "small").mkdir()
    save_file(tensors, folder / "small" / "model.safetensors", metadata={"format": "pt"})
    tokenizer = make_tokenizer(bos=True)
    tokenizer.chat_template = _TEMPLATE
    tokenizer.save_pretrained(folder / "tokenizer")
    for path in folder.rglob("*"):
        os.utime(path, ns=(0, 10**18))
    with (
        probed(FakeProbe(baseline=2**28, kernels=0)),
        mock.patch("time.perf_counter", itertools.count(0.0, 0.001).__next__),
        mock.patch.object(PeakMeter, "peak", lambda meter: 2**28),
    ):
        for name, settings in COMPRESSED.items():
            compress(Path("llama"), Path(name), _TEXT, **settings)
        compress(Path("llama"), Path("done"), _TEXT)
        with contextlib.suppress(Interrupted):
            compress(Path("llama"), Path("running"), _TEXT, progress=Interrupt(8))
        with contextlib.suppress(Interrupted):
            compress(Path("llama"), Path("ratios"), _TEXT, ratio=_RATIOS, progress=Interrupt(12))
        compress(Path("llama"), Path("ratios-done"), _TEXT, ratio=_RATIOS)


def _plan(model: Path) -> None:
    with probed(FakeProbe(baseline=2**28, kernels=0)):
        streamcomp.plan(model, small_recipe(_TEXT), RESOURCES)


# -- a model from a stranger ---------------------------------------------------------------------


def header(case: Case) -> None:
    """A safetensors file: nothing is accepted that the library refuses, or reads otherwise."""
    path = case.folder / "model.safetensors"
    bases = [case.bases / "small", case.bases / "small", case.bases / "llama"]
    base = sorted(case.random.choice(bases).glob("*.safetensors"))[0]
    data = mutated_header(base.read_bytes(), case.random)
    path.write_bytes(data)
    tensors = read_header(path)
    try:
        others = dict(safetensors.deserialize(data))  # type: ignore[no-untyped-call]
    except Exception as error:
        raise WronglyAccepted(f"safetensors refuses it: {error}") from None
    for name, info in tensors.items():
        if data[info.start : info.stop] != bytes(others[name]["data"]):
            raise WronglyAccepted(f"safetensors reads other bytes for {name[:50]!r}")


def index(case: Case) -> None:
    """``model.safetensors.index.json`` of a sharded model."""
    model = case.copy("llama")
    path = model / INDEX
    case.write(path, mutated_json(json.loads(path.read_bytes()), case.random))
    for info in read_index(model).tensors.values():
        if not info.shard.resolve().is_relative_to(model.resolve()):
            raise WronglyAccepted(f"{info.shard} is outside of the model")


def config(case: Case) -> None:
    """``config.json`` of a model, or a header that does not go with it; then a plan."""
    model = case.copy(case.random.choice(ARCHITECTURES))
    if case.random.random() < 0.2:
        path = case.random.choice(sorted(model.glob("*.safetensors")))
        case.write(path, mutated_header(path.read_bytes(), case.random))
    else:
        path = model / "config.json"
        case.write(path, mutated_json(json.loads(path.read_bytes()), case.random))
    _plan(model)


def tokenizer(case: Case) -> None:
    """Files of a tokenizer, its chat template included; then windows."""
    folder, chat = case.copy("tokenizer"), case.random.random() < 0.3
    path = case.random.choice(sorted(folder.iterdir()))
    if path.suffix == ".json":
        data = mutated_json(json.loads(path.read_bytes()), case.random)
    elif case.random.random() < 0.5:
        data = case.random.choice(_TEMPLATES).encode()
    else:
        data = mutated_bytes(path.read_bytes(), case.random)
    case.write(path, data)
    load_windows(folder, [str(case.bases / _TEXT)], 4, 16, 0, chat=chat)


# -- a compressed model from a stranger ----------------------------------------------------------


def _compressed(case: Case, *, headers: bool) -> tuple[Path, bool]:
    """A damaged compressed model, and whether it has to be refused."""
    model = case.copy(case.random.choice(list(COMPRESSED)))
    draw = case.random.random()
    if draw < 0.5:
        path = model / "config.json"
        whole = json.loads(path.read_bytes())
        section = whole["quantization_config"]
        method = section.pop("quant_method")
        data = mutated_json(section, case.random)
        if data[:1] == b"{":  # what names the format is transformers' to read
            data = b'{"quant_method": "%s", %s' % (method.encode(), data[1:])
        whole["quantization_config"] = "<section>"
        path.unlink()
        path.write_bytes(json.dumps(whole).encode().replace(b'"<section>"', data))
        return model, False
    names = json.loads((model / "config.json").read_bytes())["quantization_config"]["modules"]
    path = case.random.choice(sorted(model.glob("model-*.safetensors"))[:-1])
    if headers and draw < 0.7:
        data = mutated_header(path.read_bytes(), case.random)
        path.unlink()
        path.write_bytes(data)
        return model, False
    tensors = load_file(path)
    factors = sorted(name for name in tensors if name.rpartition(".")[0] in names)
    name = case.random.choice(factors)
    refuse = _damage(tensors, name, case.random)
    path.unlink()
    save_file(tensors, path, metadata={"format": "pt"})
    return model, refuse


def _damage(tensors: dict[str, Tensor], name: str, random: Random) -> bool:
    """Change one factor; whether no reader may accept the result."""
    tensor = tensors[name]
    if random.random() < 0.4:
        ways: dict[str, Callable[[], Tensor]] = {
            "cut": lambda: tensor[:-1],
            "transposed": lambda: tensor.mT if tensor.dim() == 2 else tensor[:, None],
            "deeper": lambda: tensor[None],
            "none": lambda: tensor[:0],
            "float": lambda: tensor.double() if tensor.is_floating_point() else tensor.float(),
            "wide": lambda: tensor.half() if tensor.is_floating_point() else tensor.long(),
            "moved": lambda: tensors.pop(name),
        }
        way = random.choice(list(ways))
        key = f"{name}.x" if way == "moved" else name
        tensors[key] = ways[way]().clone().contiguous()
        # a loader may convert the dtype, but not make integers of floats
        whole = way == "float" and not tensor.is_floating_point()
        return way == "moved" or whole or tensors[key].shape != tensor.shape
    flat = tensor.clone().view(-1)
    place = random.randrange(len(flat))
    if tensor.is_floating_point():
        flat[place] = random.choice((float("nan"), float("inf"), float("-inf")))
    else:
        flat[place] = random.choice((-1, len(flat), 32767, -32768))
        if name.endswith(".pivots") and random.random() < 0.5:
            flat[place] = flat[place - 1]
    tensors[name] = flat.view(tensor.shape)
    return True


def _refuse(refuse: bool, how: str) -> None:
    if refuse:
        raise WronglyAccepted(f"a damaged factor is {how}")


def inspect(case: Case) -> None:
    """``inspect`` of a compressed model, which reads headers alone."""
    streamcomp.inspect(_compressed(case, headers=True)[0])


def export(case: Case) -> None:
    """``export`` of a compressed model to a dense one."""
    model, refuse = _compressed(case, headers=True)
    streamcomp.export(model, case.folder / "dense")
    _refuse(refuse, "exported")


def load(case: Case) -> None:
    """A compressed model through transformers, run once."""
    model, refuse = _compressed(case, headers=False)
    try:
        config = AutoConfig.from_pretrained(model)
    except Exception:  # transformers chokes on it before a line of this package has run
        return
    if not isinstance(getattr(config, "quantization_config", None), dict):
        return
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    with torch.no_grad():
        loaded(input_ids=torch.arange(8)[None])
    _refuse(refuse, "loaded")


# -- own files -----------------------------------------------------------------------------------


def _damaged_journal(case: Case, path: Path) -> bool:
    """Damage a journal; whether its checksums show it."""
    data, random = path.read_bytes(), case.random
    lines = data.splitlines(keepends=True)
    number = random.randrange(len(lines))
    entry = json.loads(lines[number])
    if random.random() < 0.5 or entry.pop("checksum", None) is None:
        case.write(path, mutated_lines(data, random))
        return True
    text = mutated_json(entry, random)
    checksum = hashlib.blake2b(text, digest_size=16).hexdigest()
    lines[number] = text[:-1] + b', "checksum": "%s"}\n' % checksum.encode()
    case.write(path, b"".join(lines))
    return False


def journal_status(case: Case) -> None:
    """``status`` of a job whose journal is damaged, also with checksums that agree."""
    out = case.copy("running")
    _damaged_journal(case, out / JOURNAL)
    streamcomp.status(out)


def journal_resumed(case: Case) -> None:
    """A job continued with a damaged journal: refused, or where it shows, the right bytes."""
    several = case.random.random() < 0.5
    out = case.copy("ratios" if several else "running", links=False)
    shows = _damaged_journal(case, out / JOURNAL)
    _compress_again(case, out, compare=shows, ratio=_RATIOS if several else 0.2)


def report_status(case: Case) -> None:
    """``status`` of a finished job whose report is damaged."""
    out = case.copy("done")
    case.write(out / REPORT, mutated_json(json.loads((out / REPORT).read_bytes()), case.random))
    streamcomp.status(out)


def report_compressed(case: Case) -> None:
    """The command of a finished job again, with a damaged report."""
    out = case.copy("done", links=False)
    case.write(out / REPORT, mutated_json(json.loads((out / REPORT).read_bytes()), case.random))
    _compress_again(case, out)


def _compress_again(case: Case, out: Path, *, compare: bool = True, ratio: Any = 0.2) -> None:
    with probed(FakeProbe(baseline=2**28, kernels=0)):
        compress(Path("llama"), out, _TEXT, ratio=ratio)
    if not compare:
        return
    whole = case.bases / ("ratios-done" if ratio == _RATIOS else "done")
    wanted, now = (tree(folder) for folder in (whole, out))
    names = [name for name in wanted if Path(name).name.startswith("model")]
    other = [name for name in names if now.get(name) != wanted[name]]
    if other:
        raise WronglyAccepted(f"finished with other bytes in {', '.join(other)}")


# Name -> share of the cases, and the function. Cheap ones have large shares.
TARGETS: dict[str, tuple[float, Callable[[Case], None]]] = {
    "header": (0.40, header),
    "index": (0.13, index),
    "config": (0.09, config),
    "tokenizer": (0.05, tokenizer),
    "journal, status": (0.12, journal_status),
    "journal, compress": (0.01, journal_resumed),
    "report, status": (0.10, report_status),
    "report, compress": (0.03, report_compressed),
    "compressed, inspect": (0.03, inspect),
    "compressed, load": (0.03, load),
    "compressed, export": (0.01, export),
}
