"""Show that two checkouts write the same bytes.

    python benchmarks/same_bytes.py --before ../older-checkout
    python benchmarks/same_bytes.py --before ../older-checkout --only svd-llm rom --json rows.json

24 jobs, each a whole process of ``streamcomp compress`` in either checkout: every method, form
and source of statistics on tiny models of many architectures, a job that is killed and resumed,
one on kept work, one with hardly more memory than it needs, and three on a real model with few
windows. Compared are the hashes of all shards and of their index, and from ``config.json`` what
is said of the factored linears, ranks included; of the job with little memory also the levers.
Prints a row of Markdown per job. Exits with 1 where anything differs, a job fails, or a job held
more memory than its plan predicted.

That a difference would be seen is shown by ``--seed-after 1``: the second checkout then draws
other calibration windows, so that every job which takes statistics must differ.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from streamcomp.units import format_bytes

HERE = Path(__file__).resolve().parents[1]
BUDGET = "1500M"  # enough for any of the jobs, so that levers do not depend on free memory
SMOLLM2 = "smollm2"

# Made by the first checkout's ``tests/pico.py``. Settings of ``save_pico`` and, for "wide", of
# the config: large enough that a budget decides how many windows run at a time.
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-tied": {"architecture": "llama", "tie": True, "blocks": 3},
    "llama-deep": {"architecture": "llama", "blocks": 8},
    "llama-bf16": {"architecture": "llama", "dtype": "bfloat16"},
    "mistral": {},
    "qwen2": {},
    "qwen3-bf16": {"architecture": "qwen3", "dtype": "bfloat16"},
    "gemma2": {"blocks": 4},
    "gemma3": {"blocks": 4},
    "phi3": {},
    "opt-f16": {"architecture": "opt", "dtype": "float16"},
    "gpt_neox": {},
    "mixtral": {},
    "gpt_neo": {},
    "codegen": {},
    "bloom-bf16": {"architecture": "bloom", "dtype": "bfloat16"},
    "mpt": {},
    "wide": {
        "architecture": "llama",
        "config": {
            "hidden_size": 128,
            "head_dim": 32,
            "intermediate_size": 4096,
            "max_position_embeddings": 2048,
        },
    },
}

_MAKE_MODELS = """
import json, sys
from pathlib import Path
import torch
from tests import pico

folder = Path(sys.argv[1])
make_config = pico.pico_config
for name, settings in json.loads(sys.argv[2]).items():
    changed = settings.pop("config", {})
    def config(*args, **kwargs):
        made = make_config(*args, **kwargs)
        for key, value in changed.items():
            setattr(made, key, value)
        return made
    pico.pico_config = config
    dtype = getattr(torch, settings.pop("dtype", "float32"))
    architecture = settings.pop("architecture", name)
    pico.save_pico(folder / name, architecture, dtype=dtype, **settings)
pico.pico_text(folder / "text.txt", 40_000)
"""


@dataclass(frozen=True)
class Job:
    """A model and the options of ``compress``."""

    name: str
    model: str
    options: str
    then: str = ""  # options of a second job, on the kept work of the first
    kill_after: int = 0  # finished steps after which the job is killed, to be resumed
    spare: int = 0  # bytes above the smallest budget; 0 = BUDGET


_SMALL = "--samples 8 --seq-len 16"
_FEW = "--samples 2 --seq-len 128"

JOBS = (
    Job("two-sided pivot, 2 ratios", "llama", f"{_SMALL} --ratio 0.2,0.4"),
    Job("two-sided uv, uniform", "qwen2", f"{_SMALL} --form uv --allocation uniform"),
    Job("two-sided, store every 2", "gemma3", f"{_SMALL} --store-every 2 --ratio 0.3"),
    Job("two-sided, size", "llama-tied", f"{_SMALL} --size 90K"),
    Job("two-sided, refine", "mistral", f"{_SMALL} --refine 4"),
    Job("two-sided, update, refine, store every 2, some linears", "gemma2",
        f"{_SMALL} --update --refine 2 --store-every 2 --include mlp|q_proj --exclude down_proj"),
    Job("two-sided, experts left dense", "mixtral", f"{_SMALL} --ratio 0.1 --exclude experts"),
    Job("svd-llm pivot, loss", "qwen3-bf16", f"{_SMALL} --method svd-llm --allocation loss"),
    Job("svd-llm uv, compressed", "bloom-bf16",
        f"{_SMALL} --method svd-llm --form uv --statistics compressed"),
    Job("svd-llm, no statistics", "opt-f16", f"{_SMALL} --method svd-llm --statistics none"),
    Job("svd-llm, update, damping", "phi3",
        f"{_SMALL} --method svd-llm --update --damping 1e-3 --batch 3"),
    Job("svd-llm uv, update, anchor, 2 ratios", "gpt_neox",
        f"{_SMALL} --method svd-llm --form uv --update --anchor 0.5 --ratio 0.2,0.5"),
    Job("svd-llm, last block, module ratio", "codegen",
        f"{_SMALL} --method svd-llm --blocks last:1 --module-ratio 0.3"),
    Job("rom pivot, compressed", "llama-bf16", f"{_SMALL} --method rom"),
    Job("rom uv, dense", "mpt", f"{_SMALL} --method rom --form uv --statistics dense"),
    Job("rom, update", "gpt_neo", f"{_SMALL} --method rom --update"),
    Job("swsc, dense", "llama", f"{_SMALL} --method swsc --ratio 0.4"),
    Job("swsc, no statistics, clusters", "qwen2",
        f"{_SMALL} --method swsc --statistics none --clusters 4 --axis rows --ratio 0.5"),
    Job("two-sided, killed and resumed", "llama-deep",
        "--samples 32 --seq-len 64 --refine 2", kill_after=15),
    Job("two-sided, kept work", "llama", f"{_SMALL} --keep-work", then="--ratio 0.4"),
    Job("two-sided, little memory", "wide", "--samples 4 --seq-len 2048 --update",
        spare=24 * 2**20),
    Job("SmolLM2 two-sided, 2 ratios", SMOLLM2, f"{_FEW} --blocks 12-17 --ratio 0.05,0.1"),
    Job("SmolLM2 svd-llm uv, update", SMOLLM2,
        f"{_FEW} --method svd-llm --form uv --update --anchor 0.5 --blocks last:4 "
        "--module-ratio 0.2"),
    Job("SmolLM2 swsc, no statistics", SMOLLM2,
        f"{_FEW} --method swsc --statistics none --blocks first:2 --clusters 32 "
        "--module-ratio 0.2"),
)  # fmt: skip


@dataclass
class Result:
    """What a job has left in one checkout."""

    hashes: dict[str, str] = field(default_factory=dict)  # file -> sha256
    modules: dict[str, Any] = field(default_factory=dict)  # output -> its quantization_config
    levers: dict[str, Any] = field(default_factory=dict)
    predicted: int = 0  # bytes
    measured: int = 0  # bytes
    seconds: float = 0.0
    failure: str = ""


class JobFailed(Exception):
    """A job did not end as it should."""


@dataclass(frozen=True)
class Checkout:
    """A checkout of streamcomp, and how its jobs are run."""

    folder: Path
    work: Path  # for its outputs, one job at a time
    threads: int
    seed: int

    def python(self, *arguments: object, heard: bool = True) -> subprocess.Popen[str]:
        settings = {
            "PYTHONPATH": str(self.folder),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": str(self.threads),
            "MKL_NUM_THREADS": str(self.threads),
        }
        stream = subprocess.PIPE if heard else subprocess.DEVNULL
        return subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            cwd=self.work,
            env={**os.environ, **settings},
            stdout=stream,
            stderr=stream,
            text=True,
        )

    def call(self, *arguments: object) -> str:
        """Standard output of a Python that has ended well."""
        process = self.python(*arguments)
        out, err = process.communicate()
        if process.returncode:
            raise JobFailed(f"exit code {process.returncode}: {err.strip()[-500:]}")
        return out

    def check(self) -> None:
        """JobFailed where Python would import another checkout."""
        home = Path(self.call("-c", "import streamcomp; print(streamcomp.__file__)").strip())
        if not home.is_relative_to(self.folder):
            raise JobFailed(f"{home} is imported instead of {self.folder}")

    def run(self, job: Job, model: Path, text: Path | None, budget: str) -> Result:
        """Run ``job`` and read what it wrote, which is then deleted."""
        outs, kept = self.work / "outs", self.work / "kept"
        first = (model, outs / "first", "--work-dir", kept)
        again = (model, outs / "again", "--work-dir", kept)
        started = time.monotonic()
        result = Result()
        try:
            arguments = ("-m", "streamcomp", "compress", *self.options(job, text, budget))
            if job.kill_after:
                self._kill(job, (*arguments, *first), kept)
            self.call(*arguments, *first)
            if job.then:
                self.call(*arguments, *job.then.split(), *again)
            result = read_result(outs)
        except JobFailed as failure:
            result.failure = str(failure)
        finally:
            shutil.rmtree(outs, ignore_errors=True)
            shutil.rmtree(kept, ignore_errors=True)
        result.seconds = round(time.monotonic() - started, 1)
        return result

    def options(self, job: Job, text: Path | None, budget: str) -> tuple[str, ...]:
        source = ("--calibration", str(text)) if text else ()
        threads = ("--threads", str(self.threads), "--max-ram", budget, "--seed", str(self.seed))
        return (*job.options.split(), *source, *threads, "--quiet")

    def smallest_budget(self, job: Job, model: Path, text: Path | None) -> int:
        """Bytes of the smallest budget that a plan fits in."""
        options = self.options(job, text, BUDGET)
        plan = self.call("-m", "streamcomp", "plan", model, *options, "--json")
        return int(json.loads(plan)["minimum_bytes"])

    def _kill(self, job: Job, arguments: tuple[object, ...], kept: Path) -> None:
        """Start ``job`` and kill it when its journal holds ``kill_after`` steps."""
        process = self.python(*arguments, heard=False)
        journal = kept / "journal.jsonl"
        while process.poll() is None:
            if journal.exists() and journal.read_bytes().count(b"\n") > job.kill_after:
                process.send_signal(signal.SIGKILL)
                process.wait()
            time.sleep(0.001)
        if process.returncode != -signal.SIGKILL:
            raise JobFailed(f"ended with {process.returncode} before it could be killed")


def read_result(out: Path) -> Result:
    """Hashes, settings and peaks of all models in the folder ``out``."""
    result = Result()
    for report in sorted(out.rglob("streamcomp_report.json")):
        folder, told = report.parent, json.loads(report.read_text("utf-8"))
        name = folder.relative_to(out).as_posix()
        for path in sorted((*folder.glob("*.safetensors"), *folder.glob("*.index.json"))):
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            result.hashes[path.relative_to(out).as_posix()] = digest
        config = json.loads((folder / "config.json").read_text("utf-8"))
        result.modules[name] = config["quantization_config"]
        result.levers = told["levers"]
        memory = told["memory"]
        peaks = memory["predicted_bytes"], memory["peak_bytes"]
        if not result.predicted or peaks[0] - peaks[1] < result.predicted - result.measured:
            result.predicted, result.measured = peaks  # of the model that came closest to its plan
    if not result.hashes:
        raise JobFailed("no finished model")
    return result


def differences(job: Job, before: Result, after: Result) -> list[str]:
    """Names of what is not the same in both."""
    names = [f"before failed: {before.failure}"] if before.failure else []
    names += [f"after failed: {after.failure}"] if after.failure else []
    if names:
        return names
    names += unequal(before.hashes, after.hashes)
    for output, wanted in before.modules.items():
        made = after.modules.get(output, {})
        names += [f"{output}: {name}" for name in unequal(wanted, made) if name != "modules"]
        ranks = unequal(wanted.get("modules", {}), made.get("modules", {}))
        names += [f"{output}: entry of {name}" for name in ranks]
    if job.spare:
        shared = before.levers.keys() & after.levers.keys()  # the newer checkout may have more
        differ = (name for name in sorted(shared) if before.levers[name] != after.levers[name])
        names += [f"lever {name}" for name in differ]
    return names


def unequal(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    return [name for name in sorted({*one, *other}) if one.get(name) != other.get(name)]


def row(job: Job, before: Result, after: Result) -> str:
    """The job's line of the table."""
    names = differences(job, before, after)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    same = f"**differs**: {', '.join(names[:3])}{more}" if names else "same"
    figures = (
        f"{format_bytes(result.predicted)} | {format_bytes(result.measured)}"
        if result.predicted
        else "- | -"
        for result in (before, after)
    )
    kept = "yes" if fits(before) and fits(after) else "**no**"
    seconds = f"{before.seconds:.0f} / {after.seconds:.0f}"
    return f"| {job.name} | {job.model} | {same} | {' | '.join(figures)} | {kept} | {seconds} |"


def fits(result: Result) -> bool:
    """Whether the plan predicted no less than was measured."""
    return result.predicted >= result.measured


def main() -> None:
    options = parse()
    work = Path(tempfile.mkdtemp(prefix="same-bytes-", dir=options.work)).resolve()
    started, rows, bad = time.monotonic(), [], 0
    try:
        print("| job | model | bytes | predicted before | measured before | predicted after "
              "| measured after | predicted >= measured | seconds |")  # fmt: skip
        print("|---|---|---|---|---|---|---|---|---|", flush=True)
        for job, before, after in compared(options, work):
            print(row(job, before, after), flush=True)
            names = differences(job, before, after)
            bad += bool(names) or not (fits(before) and fits(after))
            rows.append({"job": asdict(job), "differs": names,
                         "before": asdict(before), "after": asdict(after)})  # fmt: skip
    except JobFailed as failure:  # before any job could be compared
        sys.exit(f"error: {failure}")
    finally:
        shutil.rmtree(work)
        if options.json:
            options.json.write_text(json.dumps(rows, indent=1))
    print(f"\n{len(rows)} jobs, {bad} of them with a difference or above their plan, "
          f"{time.monotonic() - started:.0f} s")  # fmt: skip
    sys.exit(bad > 0 or not rows)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--before", type=Path, required=True, metavar="DIR", help="older checkout")
    parser.add_argument("--after", type=Path, default=HERE, metavar="DIR", help="default: this one")
    parser.add_argument("--model", type=Path, default=Path(".cache/SmolLM2-135M"), metavar="DIR",
                        help="SmolLM2; its jobs are left out where it is not there")  # fmt: skip
    parser.add_argument("--text", type=Path, help="its calibration; default: Python's reference")
    parser.add_argument("--work", type=Path, default=Path("."), help="where folders are made")
    parser.add_argument("--only", nargs="+", default=[""], metavar="NAME",
                        help="jobs whose name or model contains one of these")  # fmt: skip
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--at-once", type=int, default=1, choices=(1, 2),
                        help="2: either checkout's job at the same time")  # fmt: skip
    parser.add_argument("--seed-after", type=int, default=0, metavar="N",
                        help="of the second checkout's jobs: any but 0 must differ")  # fmt: skip
    parser.add_argument("--json", type=Path, help="write the results there as well")
    return parser.parse_args()


def compared(options: argparse.Namespace, work: Path) -> Iterator[tuple[Job, Result, Result]]:
    """Each job with its results in both checkouts."""
    before, after = (
        Checkout(folder.resolve(), work / name, options.threads, seed)
        for name, folder, seed in (
            ("before", options.before, 0),
            ("after", options.after, options.seed_after),
        )
    )
    for checkout in (before, after):
        checkout.work.mkdir()
        checkout.check()
    jobs = [job for job in JOBS if any(n in f"{job.name} {job.model}" for n in options.only)]
    if not options.model.is_dir():
        print(f"{options.model} is not there: no jobs on SmolLM2", file=sys.stderr)
        jobs = [job for job in jobs if job.model != SMOLLM2]
    models = {job.model for job in jobs} - {SMOLLM2}
    wanted = {name: settings for name, settings in MODELS.items() if name in models}
    before.call("-c", _MAKE_MODELS, work / "models", json.dumps(wanted))
    for job in jobs:
        real = job.model == SMOLLM2
        model = options.model.resolve() if real else work / "models" / job.model
        text = options.text and options.text.resolve() if real else work / "models" / "text.txt"
        budget = BUDGET
        if job.spare:
            budget = str(before.smallest_budget(job, model, text) + job.spare)
        with ThreadPoolExecutor(options.at_once) as pool:
            first = pool.submit(before.run, job, model, text, budget)
            second = pool.submit(after.run, job, model, text, budget)
        yield job, first.result(), second.result()


if __name__ == "__main__":
    main()
