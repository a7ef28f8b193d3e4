"""Perplexity of every form against dense and against the textbook SVD-LLM, on one protocol.

    python benchmarks/quality.py .cache/SmolLM2-135M --wikitext FOLDER

FOLDER holds ``valid.txt`` (calibration: 64 windows of 512 tokens) and ``test.txt``
(evaluation: its first 64 windows). The textbook runs whole in memory
(``textbook_svd_llm.py``), the rest streams under ``--max-ram``. Results are kept in ``--out``
and not computed twice.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from streamcomp.units import format_bytes, format_seconds

SAMPLES, SEQ_LEN = "64", "512"
HERE = Path(__file__).parent
# name -> options of `streamcomp compress`
VARIANTS = {
    "uv": ("--form", "uv"),
    "pivot": ("--form", "pivot"),
    "pivot, statistics of the compressed stream": ("--form", "pivot", "--statistics", "compressed"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--wikitext", type=Path, required=True, help="folder of the two texts")
    parser.add_argument("--out", type=Path, default=Path("out/quality"))
    parser.add_argument("--ratio", default="0.2")
    parser.add_argument("--max-ram", default="1G")
    parser.add_argument("--windows", default="64", help="for evaluation; 0: all")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    rows = [_dense(options), _textbook(options), *(_ours(options, name) for name in VARIANTS)]
    (options.out / f"quality-{options.ratio}.json").write_text(json.dumps(rows, indent=1))
    _print(options, rows)


def _dense(options: argparse.Namespace) -> dict[str, Any]:
    found = _kept(options.out / "dense.json", lambda: _evaluate(options, options.model))
    return {
        "name": "dense",
        "perplexity": found["perplexity"],
        "bytes": found["checkpoint_bytes"],
        "peak_bytes": found["peak_bytes"],
        "seconds": None,
    }


def _textbook(options: argparse.Namespace) -> dict[str, Any]:
    """The reference's perplexity; its peak and its seconds are of the whole model in memory."""
    command = [
        str(HERE / "textbook_svd_llm.py"),
        str(options.model),
        *("--calibration", str(options.wikitext / "valid.txt")),
        *("--text", str(options.wikitext / "test.txt")),
        *("--samples", SAMPLES, "--seq-len", SEQ_LEN, "--ratio", options.ratio),
        *("--windows", options.windows),
    ]
    kept = options.out / f"textbook-{options.ratio}.json"
    found = _kept(kept, lambda: json.loads(_python(*command)))
    seconds = found["seconds"]
    return {
        "name": "textbook SVD-LLM (uv)",
        "perplexity": found["compressed_perplexity"],
        "bytes": None,
        "peak_bytes": found["peak_rss_bytes"],
        "seconds": sum(v for k, v in seconds.items() if not k.endswith("perplexity")),
    }


def _ours(options: argparse.Namespace, name: str) -> dict[str, Any]:
    folder = options.out / f"{name.replace(', ', '-').replace(' ', '-')}-{options.ratio}"
    arguments = (
        *("--calibration", str(options.wikitext / "valid.txt")),
        *("--samples", SAMPLES, "--seq-len", SEQ_LEN, "--ratio", options.ratio),
        *("--max-ram", options.max_ram),
    )
    _python("-m", "streamcomp", "compress", str(options.model), str(folder), *arguments,
            *VARIANTS[name], "--quiet")  # fmt: skip
    report = json.loads((folder / "streamcomp_report.json").read_text("utf-8"))
    kept = folder.with_name(f"{folder.name}.json")
    found = _kept(kept, lambda: _evaluate(options, folder))
    return {
        "name": f"streamcomp {name}",
        "perplexity": found["perplexity"],
        "bytes": report["model"]["bytes_kept"],
        "peak_bytes": report["memory"]["peak_bytes"],
        "seconds": report["seconds"],
    }


def _evaluate(options: argparse.Namespace, model: Path) -> dict[str, Any]:
    text = str(options.wikitext / "test.txt")
    arguments = ("--text", text, "--windows", options.windows, "--seq-len", SEQ_LEN, "--json")
    limit = ("--max-ram", options.max_ram)
    found: dict[str, Any] = json.loads(
        _python("-m", "streamcomp", "eval", str(model), *arguments, *limit)
    )
    return found


def _kept(path: Path, compute: Any) -> dict[str, Any]:
    """What ``path`` holds, computed and written first where it does not exist."""
    if not path.is_file():
        path.write_text(json.dumps(compute()))
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def _python(*arguments: str) -> str:
    print("$ python", *arguments, file=sys.stderr, flush=True)
    done = subprocess.run([sys.executable, *arguments], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout


def _print(options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    table = Table("", "perplexity", "/ dense", "bytes", "peak RAM", "time")
    table.title = f"{options.model.name}, ratio {options.ratio}, WikiText-2 test"
    for row in rows:
        table.add_row(
            row["name"],
            f"{row['perplexity']:.2f}",
            f"{row['perplexity'] / rows[0]['perplexity']:.3f}",
            format_bytes(row["bytes"]) if row["bytes"] else "",
            format_bytes(row["peak_bytes"]),
            format_seconds(row["seconds"]) if row["seconds"] else "",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
