"""Compressed models that a stranger could hand over: one thing in each is not as it has to be."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.jobs import config_of, stored_tensors

__all__ = ["MUTATIONS", "UP", "Mutation", "mutated"]

UP = "model.layers.0.mlp.up_proj"  # 48 x 32, factored

Tensors = dict[str, Tensor]
Settings = dict[str, Any]


@dataclass(frozen=True)
class Mutation:
    """``change`` is given the tensors and the config of a model with linears of ``form``."""

    change: Callable[[Tensors, Settings], Any]
    form: str = "pivot"
    in_headers: bool = True  # and so seen without reading tensors


def mutated(source: Path, target: Path, mutation: Mutation) -> Path:
    """A copy of ``source``, in one shard and without a report, after ``mutation``."""
    shutil.copytree(source, target)
    tensors, config = stored_tensors(target), config_of(target)
    for path in target.glob("*"):
        if path.suffix == ".safetensors" or "index" in path.name or "report" in path.name:
            path.unlink()
    mutation.change(tensors, config)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    (target / "config.json").write_text(json.dumps(config))
    return target


def quantization(**settings: Any) -> Mutation:
    return Mutation(lambda _, config: config["quantization_config"].update(settings))


def without(key: str) -> Mutation:
    return Mutation(lambda _, config: config["quantization_config"].pop(key))


def modules(change: Callable[[Settings], Any]) -> Mutation:
    return Mutation(lambda _, config: change(config["quantization_config"]["modules"]))


def spec(of: str = "pivot", **settings: Any) -> Mutation:
    def change(_: Tensors, config: Settings) -> None:
        config["quantization_config"]["modules"][UP].update(settings)

    return Mutation(change, of)


def spec_by(name: str, step: int, form: str = "pivot") -> Mutation:
    def change(_: Tensors, config: Settings) -> None:
        config["quantization_config"]["modules"][UP][name] += step

    return Mutation(change, form)


def spec_without(key: str, form: str = "pivot") -> Mutation:
    return Mutation(lambda _, config: config["quantization_config"]["modules"][UP].pop(key), form)


def tensor(leaf: str, change: Callable[[Tensor], Tensor], form: str = "pivot") -> Mutation:
    def replace(tensors: Tensors, _: Settings) -> None:
        tensors[f"{UP}.{leaf}"] = change(tensors[f"{UP}.{leaf}"]).contiguous()

    return Mutation(replace, form)


def values(leaf: str, value: float, form: str = "pivot", *, at: int | None = 0) -> Mutation:
    """The number at ``at``, or all of them, become ``value``."""

    def change(tensors: Tensors, _: Settings) -> None:
        flat = tensors[f"{UP}.{leaf}"].view(-1)
        flat[slice(None) if at is None else at] = value

    return Mutation(change, form, in_headers=False)


def lost(leaf: str) -> Mutation:
    return Mutation(lambda tensors, _: tensors.pop(f"{UP}.{leaf}"))


def renamed(tensors: Tensors, _: Settings) -> None:
    tensors[f"{UP}.koef"] = tensors.pop(f"{UP}.coef")


def multiplied_out(tensors: Tensors, _: Settings) -> None:
    del tensors[f"{UP}.coef"], tensors[f"{UP}.pivots"]
    tensors[f"{UP}.weight"] = torch.ones(48, 32)


def repeated(tensors: Tensors, _: Settings) -> None:
    pivots = tensors[f"{UP}.pivots"]
    pivots[0] = pivots[1].clone()


def setting(**settings: Any) -> Mutation:
    return Mutation(lambda _, config: config.update(settings))


PLAIN = {"form": "uv", "rank": 3, "dtype": "F32"}

MUTATIONS: dict[str, Mutation] = {
    # -- quantization_config
    "modules null": quantization(modules=None),
    "modules a list": quantization(modules=[UP]),
    "modules a string": quantization(modules=UP),
    "modules missing": without("modules"),
    "modules empty": quantization(modules={}),
    "version true": quantization(version=True),
    "version 2": quantization(version=2),
    "version a string": quantization(version="1"),
    "version a float": quantization(version=1.0),
    "version missing": without("version"),
    "an unknown setting": quantization(bits=4),
    "a setting called self": quantization(self=4),
    # -- which linears
    "a linear not listed": modules(lambda listed: listed.pop(UP)),
    "the head listed": modules(lambda listed: listed.update(lm_head=PLAIN)),
    "the embedding listed": modules(lambda listed: listed.update({"model.embed_tokens": PLAIN})),
    "a norm listed": modules(lambda listed: listed.update({"model.norm": PLAIN})),
    "a block listed": modules(lambda listed: listed.update({"model.layers.0": PLAIN})),
    "a linear that is not there": modules(
        lambda listed: listed.update({"model.layers.7.mlp.up_proj": PLAIN})
    ),
    "a linear without a name": modules(lambda listed: listed.update({"": PLAIN})),
    "a linear by two names": modules(
        lambda listed: listed.update({UP.removeprefix("model."): listed[UP]})
    ),
    "a dense linear listed": Mutation(multiplied_out),
    # -- the entry of a linear
    "an entry that is a list": modules(lambda listed: listed.update({UP: ["pivot", 3]})),
    "an entry that is null": modules(lambda listed: listed.update({UP: None})),
    "an entry that is a number": modules(lambda listed: listed.update({UP: 3})),
    "an entry that is empty": modules(lambda listed: listed.update({UP: {}})),
    "an unknown key": spec(scale=2),
    "an unknown form": spec(form="sparse"),
    "a form that is a list": spec(form=["pivot"]),
    "form missing": spec_without("form"),
    "another form": spec(form="uv"),
    "form shared": spec(form="shared", clusters=4, axis="rows"),
    "rank missing": spec_without("rank"),
    "rank 0": spec(rank=0),
    "rank -1": spec(rank=-1),
    "rank a float": spec(rank=3.0),
    "rank a string": spec(rank="3"),
    "rank true": spec(rank=True),
    "rank 1e12": spec(rank=10**12),
    "rank one more": spec_by("rank", 1),
    "rank one less": spec_by("rank", -1),
    "dtype of integers": spec(dtype="I8"),
    "dtype an object": spec(dtype={"F32": 1}),
    # -- the rest of the config
    "another hidden size": setting(hidden_size=64),
    "a block less": setting(num_hidden_layers=1),
    # -- headers
    "weight missing": lost("weight"),
    "coef missing": lost("coef"),
    "pivots missing": lost("pivots"),
    "coef by another name": Mutation(renamed),
    "a factor too many": Mutation(lambda all_, _: all_.update({f"{UP}.U": torch.ones(48, 3)})),
    "weight too short": tensor("weight", lambda weight: weight[:-1]),
    "coef transposed": tensor("coef", lambda coef: coef.T),
    "coef flat": tensor("coef", lambda coef: coef.flatten()),
    "coef of half precision": tensor("coef", lambda coef: coef.half()),
    "weight of integers": tensor("weight", lambda weight: weight.int()),
    "pivots too short": tensor("pivots", lambda pivots: pivots[:-1]),
    "pivots of floats": tensor("pivots", lambda pivots: pivots.float()),
    "pivots of 64 bits": tensor("pivots", lambda pivots: pivots.long()),
    # -- values
    "pivots all equal": values("pivots", 0, at=None),
    "pivots twice": Mutation(repeated, in_headers=False),
    "pivots beyond the rows": values("pivots", 2**30),
    "pivots negative": values("pivots", -1),
    "NaN in coef": values("coef", float("nan")),
    "infinity in weight": values("weight", float("inf")),
    # -- shared channels
    "a label beyond the clusters": values("labels", 99, "shared"),
    "a negative label": values("labels", -1, "shared"),
    "NaN in the codebook": values("codebook", float("nan"), "shared"),
    "labels of 64 bits": tensor("labels", lambda labels: labels.long(), "shared"),
    "labels of floats": tensor("labels", lambda labels: labels.float(), "shared"),
    "codebook transposed": tensor("codebook", lambda codebook: codebook.T, "shared"),
    "clusters one more": spec_by("clusters", 1, "shared"),
    "clusters 0": spec("shared", clusters=0),
    "clusters missing": spec_without("clusters", "shared"),
    "the other axis": spec("shared", axis="rows"),
    "an unknown axis": spec("shared", axis="diagonal"),
}
