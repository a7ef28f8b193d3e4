"""How many bytes of a hub model's shards a job keeps on disk, where it fetches them as it goes."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from streamcomp.checkpoint.index import TensorInfo
from streamcomp.errors import RecipeError
from streamcomp.job.steps.base import Step
from streamcomp.model.skeleton import Skeleton
from streamcomp.recipe import Resources
from streamcomp.units import format_bytes, parse_bytes

__all__ = ["allow_shards", "bytes_to_fetch"]


def allow_shards(skeleton: Skeleton, resources: Resources) -> int:
    """Bytes of shards that a job keeps on disk at most; 0 where it fetches none by itself.

    By default as many as any two neighbouring blocks need, so that the next block's shards can be
    fetched while a block is compressed. RecipeError where ``max_shards`` is less than what one
    block needs.
    """
    if not resources.stream_download:
        return 0
    index = skeleton.index
    sizes = {shard: index.stamp(shard)[1] for shard in index.shards}
    blocks = [_shards(skeleton.block_tensors(number)) for number in range(len(skeleton))]
    single = [{shard} for shard in sizes]
    least = max(_total(shards, sizes) for shards in (*blocks, *single))
    pairs = [here | after for here, after in zip(blocks, blocks[1:], strict=False)]
    usual = max([least, *(_total(shards, sizes) for shards in pairs)])
    allowed = usual
    if resources.max_shards:
        allowed = parse_bytes(resources.max_shards)
        if allowed < least:
            raise RecipeError(
                f"max_shards {resources.max_shards}: a block needs {format_bytes(least)} of shards "
                f"at a time, --max-shards {-(-least // 2**20)}M fits"
            )
    if index.store is not None:
        index.store.most_bytes, index.store.fetches_ahead = allowed, allowed >= usual
    return min(allowed, sum(sizes.values()))


def bytes_to_fetch(skeleton: Skeleton, steps: Iterable[Step], allowed: int) -> int:
    """Bytes that blocks of a job have fetched in the end, with ``allowed`` bytes on disk at most.

    Tensors outside of blocks, which a few steps read, may add some shards.
    """
    sizes = {shard: skeleton.index.stamp(shard)[1] for shard in skeleton.index.shards}
    blocks = [sorted(_shards(skeleton.block_tensors(n))) for n in range(len(skeleton))]
    held: list[Path] = []  # the last used last
    fetched = 0
    for shard in (shard for step in steps if step.block >= 0 for shard in blocks[step.block]):
        if shard in held:
            held.remove(shard)
        else:
            fetched += sizes[shard]
            while held and _total(held, sizes) + sizes[shard] > allowed:
                held.pop(0)
        held.append(shard)
    return fetched


def _shards(tensors: Iterable[TensorInfo]) -> set[Path]:
    return {info.shard for info in tensors}


def _total(shards: Iterable[Path], sizes: dict[Path, int]) -> int:
    return sum(sizes[shard] for shard in shards)
