"""Weights of one block: memory-mapped, copied out of a map, or read.

    python benchmarks/mapping.py
    python benchmarks/mapping.py --shape Llama-3-70B --folder out/70b

Makes a block of a well-known shape (one file) and brings it into memory in several ways, each in
a process and a memory cgroup of its own. Prints a Markdown table:

- seconds from opening the file until every weight has been summed once, with a cold and a warm
  page cache (median of ``--repeats``);
- the process's peak resident memory above what it held before;
- the cgroup's peak above that of a process that loads nothing, and how much of it the kernel
  can take back at will (clean pages of files);
- what happens where the file is cut after its header was read: to half before it is opened, and
  to a stump between opening the largest tensor and using it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import mmap
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import torch
from cgroup import CgroupUnavailable, run_limited
from safetensors import safe_open
from shapes import SHAPES, make_shape
from torch import Tensor

from streamcomp.checkpoint.index import TensorInfo, read_header
from streamcomp.checkpoint.reader import TensorReader

LIMIT = 16 * 2**30  # bytes of the cgroup; never reached, it only counts
STUMP = 64 * 2**10  # bytes that stay of a file that is cut while it is open
MIB = 2**20

Hook = Callable[[], None]  # called between opening a tensor and using its bytes
Get = Callable[[TensorInfo], Tensor]


@contextmanager
def mapped_in_place(path: Path, opened: Hook) -> Iterator[Get]:
    with safe_open(path, "pt") as file:
        opened()
        yield lambda info: file.get_tensor(info.name)


@contextmanager
def copied_from_one_map(path: Path, opened: Hook) -> Iterator[Get]:
    with safe_open(path, "pt") as file:
        opened()
        yield lambda info: file.get_tensor(info.name).clone()


@contextmanager
def copied_map_by_map(path: Path, opened: Hook) -> Iterator[Get]:
    def get(info: TensorInfo) -> Tensor:
        with safe_open(path, "pt") as file:
            view: Tensor = file.get_tensor(info.name)
            opened()
            return view.clone()

    yield get


@contextmanager
def copied_from_ranges(path: Path, opened: Hook) -> Iterator[Get]:
    """Maps the tensor's pages alone, and tells the kernel that it will read all of them."""
    with path.open("rb") as file:

        def get(info: TensorInfo) -> Tensor:
            begin = info.start - info.start % mmap.ALLOCATIONGRANULARITY
            length = info.stop - begin
            with closing(mmap.mmap(file.fileno(), length, prot=mmap.PROT_READ, offset=begin)) as m:
                m.madvise(mmap.MADV_WILLNEED)
                opened()
                target = torch.empty(info.nbytes, dtype=torch.uint8)
                with memoryview(m) as view, view[info.start - begin :] as source:
                    target.numpy().data[:] = source
                return target.view(info.torch_dtype).reshape(info.shape)

        yield get


@contextmanager
def read_by_the_library(path: Path, opened: Hook) -> Iterator[Get]:
    with safe_open(path, "pt", backend="pread") as file:
        opened()
        yield lambda info: file.get_tensor(info.name)


@contextmanager
def read_by_range(path: Path, opened: Hook) -> Iterator[Get]:
    with path.open("rb", buffering=0) as file:
        opened()

        def get(info: TensorInfo) -> Tensor:
            target = torch.empty(info.nbytes, dtype=torch.uint8)
            count = os.preadv(file.fileno(), [target.numpy().data], info.start)
            if count < info.nbytes:
                raise OSError(f"{count} of {info.nbytes} bytes")
            return target.view(info.torch_dtype).reshape(info.shape)

        yield get


@contextmanager
def read_by_streamcomp(path: Path, opened: Hook) -> Iterator[Get]:
    with TensorReader() as reader:
        opened()
        yield reader.read


WAYS = {
    "`safe_open`, used as mapped": mapped_in_place,
    "`safe_open` once, tensors copied": copied_from_one_map,
    "`safe_open` per tensor, copied": copied_map_by_map,
    "`mmap` of one tensor, copied": copied_from_ranges,
    '`safe_open(backend="pread")`': read_by_the_library,
    "`preadv`": read_by_range,
    "`TensorReader` (with digest)": read_by_streamcomp,
}


def status(field: str) -> int:
    """Bytes in a line of this process's /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def child(path: Path, way: str, before: int, during: int) -> dict[str, float]:
    """Load all tensors of ``path`` and sum them.

    Cuts the file to ``before`` bytes once its header is read, to ``during`` once it is open; 0
    leaves it whole.
    """
    header = {} if way == "nothing" else read_header(path)
    infos = list(header.values())
    if during:  # a tensor that reaches beyond the cut comes first
        infos.sort(key=lambda info: -info.nbytes)
    bring = WAYS.get(way, read_by_range)
    if before:
        os.truncate(path, before)

    def cut() -> None:
        if during:
            os.truncate(path, during)

    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    resident, start = status("VmRSS"), time.perf_counter()
    with bring(path, cut) as get:
        weights = [get(info) for info in infos]
        total = sum(float(weight.sum()) for weight in weights)
        seconds = time.perf_counter() - start
    return {"seconds": seconds, "peak": status("VmHWM") - resident, "total": total}


def command(path: Path, way: str, *cuts: int) -> list[str]:
    return [sys.executable, __file__, "--child", way, str(path), *map(str, cuts or (0, 0))]


def environment() -> dict[str, str]:
    root = str(Path(__file__).parents[1])
    return os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"}


def drop(path: Path) -> None:
    """Have the kernel forget the file's pages."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(path: Path, way: str, repeats: int) -> dict[str, float]:
    """Medians of seconds and peak; of the cgroup's bytes where one can be made."""
    figures: dict[str, list[float]] = {"cold": [], "warm": [], "peak": [], "usage": [], "held": []}
    for _ in range(repeats):
        for cache in ("cold", "warm"):
            if cache == "cold":
                drop(path)
            else:
                path.read_bytes()
            try:
                run = run_limited(command(path, way), LIMIT, environment())
                text = run.stdout
                if cache == "cold":
                    figures["usage"].append(run.max_usage_bytes)
                    figures["held"].append(run.peak_held_bytes)
            except CgroupUnavailable:
                text = subprocess.run(
                    command(path, way), env=environment(), capture_output=True, text=True
                ).stdout
            result = json.loads(text)
            figures[cache].append(result["seconds"])
            figures["peak"].append(result["peak"])
    return {name: statistics.median(values) for name, values in figures.items() if values}


def fate(path: Path, way: str, *, during: bool) -> str:
    """How the process ends whose file is cut before or while it is open."""
    size = path.stat().st_size
    cuts = (0, STUMP) if during else (size // 2, 0)
    done = subprocess.run(
        command(path, way, *cuts), env=environment(), capture_output=True, text=True
    )
    os.truncate(path, size)
    if done.returncode < 0:
        return f"killed by {signal.Signals(-done.returncode).name}"
    if done.returncode == 0:
        return "not noticed"
    return done.stderr.strip().splitlines()[-1].partition(":")[0].rpartition(".")[2]


def sparse_twin(path: Path) -> Path:
    """A file with the header of ``path`` and zeros, which takes no disk and may be cut."""
    twin = path.with_name("twin.safetensors")
    with path.open("rb") as file, twin.open("wb") as copy:
        prefix = file.read(8)
        copy.write(prefix + file.read(int.from_bytes(prefix, "little")))
        copy.truncate(path.stat().st_size)
    return twin


def digest_seconds(path: Path) -> float:
    data = path.read_bytes()
    start = time.perf_counter()
    hashlib.blake2b(data, digest_size=16).digest()
    return time.perf_counter() - start


def table(path: Path, repeats: int) -> Iterator[str]:
    size, twin = path.stat().st_size, sparse_twin(path)
    yield f"One block of {size / MIB:.0f} MiB; its digest takes {digest_seconds(path):.2f} s.\n"
    yield (
        "| way | s cold | s warm | peak RSS, MiB | cgroup's peak | of it reclaimable "
        "| cut before | cut while open |"
    )
    yield "|---|---:|---:|---:|---:|---:|---|---|"
    base = measure(path, "nothing", 1)
    for way in WAYS:
        found = measure(path, way, repeats)
        cells = [f"{found['cold']:.2f}", f"{found['warm']:.2f}", f"{found['peak'] / MIB:.0f}"]
        if "usage" in found:
            usage, held = found["usage"] - base["usage"], found["held"] - base["held"]
            cells += [f"{usage / MIB:.0f}", f"{(usage - held) / MIB:.0f}"]
        else:
            cells += ["-", "-"]
        cells += [fate(twin, way, during=False), fate(twin, way, during=True)]
        yield f"| {way} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="Llama-2-7B")
    parser.add_argument("--folder", type=Path, help="keep the files here")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        torch.set_num_threads(1)
        way, file, before, during = options.child
        print(json.dumps(child(Path(file), way, int(before), int(during))))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        block = folder / "block-000.safetensors"
        if not block.exists():
            make_shape(options.shape, folder, blocks=1)
        for line in table(block, options.repeats):
            print(line, flush=True)


if __name__ == "__main__":
    main()
