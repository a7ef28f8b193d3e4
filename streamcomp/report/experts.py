"""The section of the page on the experts of mixtures: how many tokens reached each."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from statistics import median

from streamcomp.job.rows import LinearRow
from streamcomp.report.linears import block_of, span
from streamcomp.report.section import Section, Table, counted

__all__ = ["experts_section"]


def experts_section(linears: Sequence[LinearRow]) -> Section | None:
    """Tokens of the experts of each block, and the experts that saw few or none."""
    blocks: dict[int, dict[str, tuple[int, int]]] = defaultdict(dict)
    for row in linears:
        if row.tokens is not None:
            expert = row.name.removeprefix(f"{row.within}.").partition(".")[0]
            tokens, channels = row.tokens, row.columns
            widest = max(channels, blocks[block_of(row.name)].get(expert, (0, 0))[1])
            blocks[block_of(row.name)][expert] = tokens, widest
    if not blocks:
        return None
    rows, few_in_all, experts = [], 0, 0
    for block, seen in sorted(blocks.items()):
        reached = [count for count, _ in seen.values()]
        few = [name for name, (count, channels) in seen.items() if 0 < count < channels]
        none = [name for name, (count, _) in seen.items() if not count]
        experts += len(seen)
        few_in_all += len(few) + len(none)
        middle = f"{median(reached):.0f}"
        rows.append((block, len(seen), span(reached), middle, _listed(few), _listed(none)))
    told = (
        f"{few_in_all} of {counted(experts, 'expert')} saw fewer calibration tokens than a token "
        "has channels, or none: where tokens say nothing, they are compressed as if all channels "
        "mattered alike. More windows (--samples) tell more."
    )
    head = ["block", "experts", "tokens", "median", "with few", "with none"]
    return Section("Experts", told, tables=[Table(head, rows, summary="experts by block")])


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) or "–"
