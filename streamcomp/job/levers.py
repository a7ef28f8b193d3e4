"""Levers: how much runs at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

__all__ = ["Levers"]


@dataclass(frozen=True)
class Levers:
    """What runs at a time; a job keeps those that it began with, for they change rounding.

    All but ``linears`` and ``groups``, which cost time alone: a block is read once for every so
    many of its linears where they are factored from kept decompositions, and read and run once
    for every so many of its groups where their moments are taken.
    """

    batch: int  # windows per forward
    reverse_batch: int  # windows per forward and backward
    head_tokens: int  # tokens per call of the head
    feed_forward_tokens: int  # tokens of each window per call of a block's feed-forward
    linears: int  # linears per reading of a block, where no window runs
    groups: int  # moment groups of a block per pass over the windows

    @classmethod
    def of_journal(cls, held: Mapping[str, Any]) -> Levers:
        """Those that a job began with, among ``held``, all of its journal's."""
        return cls(**{field.name: held[field.name] for field in fields(cls)})
