"""Which types of causal language models streamcomp works with, tried on a tiny model of each.

    python benchmarks/families.py --jobs 2 --markdown docs/families.md
    python benchmarks/families.py --only llama mixtral

Run it in the root of the repository: what is built and checked is in ``tests/families``. Every type
that the installed transformers knows is tried in a process of its own, which a crash or a lack of
time ends alone. A line is printed for each type, and exit code 1 tells that something is wrong.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import os
import platform
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1]))  # for tests.families

import torch  # noqa: E402
import transformers  # noqa: E402

from tests.families.checks import (  # noqa: E402
    NOT_BUILT,
    REFUSED,
    TRACEBACK,
    WRONG,
    Family,
    Step,
    check_family,
)
from tests.families.tiny import causal_types, variants  # noqa: E402

WORKS, FAULTS = "works", (WRONG, TRACEBACK)
_WORTH_A_WORD = 0.005  # least share of what stays dense to be named

_PAGE = """# Families of models

Every type of causal language model that transformers knows, tried on a tiny model with random
weights:

    python benchmarks/families.py --jobs 2 --markdown docs/families.md

{date}, transformers {transformers}, torch {torch} on a CPU, Python {python}, fp32.
{counts}.

A type **works** if all of this does, on two to four blocks, one at least of each kind that the
type's default config has:

- `inspect` and `plan` run;
- streamed block by block, logits are those of transformers' whole model: the same bits, or as close
  as a remark says; so are the perplexity, and the loss's gradient at the first block's input;
- with experts run one by one, as in a job, logits and that gradient are the same, as close as a
  remark says: what experts give is summed in another order;
- `compress` with the default recipe, and with `--method svd-llm --form uv`, leaves the settings in
  `config.json` as they were, and byte by byte all weights but those of factored linears and
  experts, whose tensors are those of [docs/format.md](format.md);
- plain transformers loads the result, and its logits are those of `export --form dense`, whose
  weights, each expert's too, are the products of the stored factors;
- it generates text, where the original does, and its streamed perplexity is the whole model's.

A name with a plus is a type with settings of well-known models that its default config does not
have. **In reach** is the share of the numbers in the blocks' matrices that compression can make
fewer, for a model as large as the type's default config; the remarks name what stays dense and why.
**Refused** means that streamcomp stops with the error given, **not built** that transformers gives
no model to try.
"""
_FORK = multiprocessing.get_context("fork")


def main() -> int:
    options = _options()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    families: list[Family] = []
    for family, seconds in _all(options.only or _everything(), options.jobs, options.timeout):
        families.append(family)
        print(_line(family, seconds), flush=True)
        if options.json:
            found = sorted(families, key=lambda family: family.kind)
            options.json.write_text(json.dumps([family.to_dict() for family in found], indent=1))
    print(_counts(families))
    if options.markdown:
        options.markdown.parent.mkdir(parents=True, exist_ok=True)
        options.markdown.write_text(page(sorted(families, key=lambda family: family.kind)))
    return 1 if any(family.verdict in FAULTS for family in families) else 0


def _everything() -> list[str]:
    return sorted([*causal_types(), *variants()])


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", metavar="TYPE", help="these types alone")
    parser.add_argument("--jobs", type=int, default=1, help="types at a time")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds for a type")
    parser.add_argument("--json", type=Path, help="all that came out, rewritten after each type")
    parser.add_argument("--markdown", type=Path, help="the tables, of a run of all types")
    options = parser.parse_args()
    if options.only and options.markdown:
        parser.error("--markdown is for a run of all types")
    if unknown := set(options.only or ()) - set(_everything()):
        parser.error(f"transformers {transformers.__version__} has no {', '.join(sorted(unknown))}")
    return options


# -- one process a type ------------------------------------------------------------------


class _Child:
    """A process that checks one type and tells after each step what it has so far."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.family, self.started = Family(kind), time.perf_counter()
        self.folder = folder
        self.pipe, end = _FORK.Pipe(duplex=False)
        self.process = _FORK.Process(target=_check, args=(kind, folder, end), daemon=True)
        self.process.start()
        end.close()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.started

    def listen(self) -> bool:
        """Take what the child has told; False when it has ended."""
        with suppress(EOFError):
            while self.pipe.poll():
                self.family = self.pipe.recv()
            return True
        return False

    def end(self, fault: str = "") -> Family:
        """Wait for the child, or kill it for ``fault``."""
        if fault:
            self.process.kill()
        self.process.join()
        if not fault and self.process.exitcode:
            fault = f"the process ended with exit code {self.process.exitcode}"
        if fault:
            last = self.family.steps[-1].name if self.family.steps else "the start"
            self.family.steps.append(Step("process", TRACEBACK, f"{fault}, after {last}"))
        shutil.rmtree(self.folder, ignore_errors=True)
        return self.family


def _check(kind: str, folder: Path, end: Connection) -> None:
    folder.mkdir(parents=True)
    log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):  # what transformers has to say would drown the lines
        os.dup2(log, stream)
    check_family(kind, folder, end.send)


def _all(kinds: Sequence[str], jobs: int, timeout: float) -> Iterator[tuple[Family, float]]:
    """Check ``kinds``, ``jobs`` at a time; each family with its seconds as it ends."""
    waiting, running = list(kinds), list[_Child]()
    with tempfile.TemporaryDirectory(prefix="families-") as work:
        while waiting or running:
            while waiting and len(running) < jobs:
                kind = waiting.pop(0)
                running.append(_Child(kind, Path(work) / kind))
            wait([child.pipe for child in running], timeout=1.0)
            for child in list(running):
                slow = child.seconds > timeout
                if child.listen() and not slow:
                    continue
                running.remove(child)
                yield child.end(f"no end after {timeout:.0f} s" if slow else ""), child.seconds


# -- what is told ------------------------------------------------------------------------


def _counts(families: Sequence[Family]) -> str:
    types = Counter(family.verdict for family in families if "+" not in family.kind)
    return f"{types.total()} types: " + ", ".join(
        f"{types[verdict]} {'work' if verdict == WORKS else verdict}"
        for verdict in (WORKS, REFUSED, NOT_BUILT, *FAULTS)
    )


def _line(family: Family, seconds: float) -> str:
    line = f"{family.kind:24} {family.verdict:10} {seconds:5.1f} s"
    if reason := family.reason:
        return f"{line}  {reason.name}: {reason.detail[:160]} {reason.where}".rstrip()
    streamed = f"to {family.difference:.0e}" if family.difference else "exact"
    return f"{line}  {family.share or 0.0:4.0%} in reach, streamed {streamed}"


def page(families: Sequence[Family]) -> str:
    """docs/families.md: what it says of each type."""
    heading = _PAGE.format(
        date=datetime.date.today(),
        transformers=transformers.__version__,
        torch=torch.__version__.partition("+")[0],
        python=platform.python_version(),
        counts=_counts(families),
    )
    tables = [
        _table(f"{title} ({{count}})", columns, families, verdict)
        for title, columns, verdict in (
            ("Works", ("in reach", "remarks"), WORKS),
            ("Refused", ("reason",), REFUSED),
            ("Not built", ("what transformers says",), NOT_BUILT),
            ("WRONG", ("what",), WRONG),
            ("Traceback", ("what",), TRACEBACK),
        )
    ]
    return "\n".join([heading, *filter(None, tables)])


def _table(title: str, columns: Sequence[str], families: Sequence[Family], verdict: str) -> str:
    rows = [family for family in families if family.verdict == verdict]
    if not rows:
        return ""
    lines = [f"## {title.format(count=len(rows))}", ""]
    lines += ["| type | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    lines += ["| " + " | ".join([family.kind, *_cells(family)]) + " |" for family in rows]
    return "\n".join([*lines, ""])


def _cells(family: Family) -> list[str]:
    if reason := family.reason:
        base = family.kind.partition("+")[0]
        return [
            reason.detail.removeprefix(f"{base}: ").removeprefix("source: ").replace("|", "\\|")
        ]
    share = family.share if family.default_share is None else family.default_share
    told = _dense(family)
    if family.default_share is None and "+" not in family.kind:
        told.append("shares of the tiny model")
    if family.difference:
        told.append(f"streamed = whole to {family.difference:.0e}")
    if family.apart:
        told.append(f"experts one by one = whole to {family.apart:.0e}")
    return [f"{_floor(share or 0.0)}", "; ".join([*told, *family.remarks]).replace("|", "\\|")]


def _dense(family: Family) -> list[str]:
    """What stays dense, with the reason and its share."""
    groups: dict[str, list[str]] = {}
    for described, share in family.dense.items():
        name, _, reason = described.partition(": ")
        if share >= _WORTH_A_WORD:
            groups.setdefault(reason, []).append(name)
    shares = {
        f"{', '.join(names)} ({reason})": sum(family.dense[f"{name}: {reason}"] for name in names)
        for reason, names in groups.items()
    }
    parts = [f"{what} {shares[what]:.0%}" for what in sorted(shares, key=lambda w: -shares[w])]
    return [f"dense: {'; '.join(parts)}"] if parts else []


def _floor(share: float) -> str:
    """In percent, never rounded up to all."""
    return f"{share:.0%}" if share == 1 or share < 0.99 else f"{int(share * 1000) / 10}%"


if __name__ == "__main__":
    sys.exit(main())
