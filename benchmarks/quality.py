"""Perplexity of every method, form and step of the way, on one protocol.

    python benchmarks/quality.py .cache/SmolLM2-135M --wikitext FOLDER

FOLDER holds WikiText-2's ``valid.txt`` (calibration: 64 windows of 512 tokens, seed 0) and
``test.txt`` (evaluation). Two more domains show over-fitting to the calibration text: the held-out
part of Python's language reference, and source code of Python's standard library, which is in no
calibration. The textbook SVD-LLM runs whole in memory (``textbook_svd_llm.py``), the rest streams
under ``--max-ram``. Whatever is done is kept in ``--out`` and not computed twice, so the benchmark
may be stopped and started again; rows of one analysis share it. Writes ``quality.json``, the table
``quality.md`` and the plot ``quality.svg``.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import math
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamcomp.units import format_bytes, format_seconds

SAMPLES, SEQ_LEN = "64", "512"
HERE = Path(__file__).parent
REFERENCE, HELD_OUT = "python-reference", "python-reference:held-out"
SOURCE_MODULES = ("argparse", "ast", "csv", "decimal", "difflib", "email.message", "tarfile")


@dataclass(frozen=True)
class Row:
    """One line of the table: options of ``streamcomp compress`` beside ratio and calibration."""

    name: str
    options: tuple[str, ...]
    shares: str = ""  # rows that share their analysis have this in common
    mixed: bool = False  # calibrated on both domains, evenly
    ratios: tuple[str, ...] = ()  # those asked for on the command line, or these alone


REFINE = ("--refine", "300")
SVD, TWO = ("--method", "svd-llm"), ("--method", "two-sided")
ROWS = (
    Row("svd-llm, uv", (*SVD, "--form", "uv"), "svd"),
    Row("svd-llm, pivot", (*SVD, "--form", "pivot"), "svd"),
    Row("svd-llm, pivot, allocated", (*SVD, "--allocation", "loss"), "svd"),
    Row("svd-llm, pivot, sequential", (*SVD, "--statistics", "compressed")),
    Row("svd-llm, pivot, update", (*SVD, "--update"), "svd"),
    Row("svd-llm, pivot, anchored 0.5", (*SVD, "--update", "--anchor", "0.5"), "svd"),
    Row("rom, uv", ("--method", "rom", "--form", "uv")),
    Row("rom, uv, last 12 blocks", ("--method", "rom", "--form", "uv", "--blocks", "last:12"),
        ratios=("0.2",)),
    Row("swsc, data-free", ("--method", "swsc", "--statistics", "none")),
    Row("swsc, whitened", ("--method", "swsc")),
    Row("two-sided, uv", (*TWO, "--form", "uv", "--allocation", "uniform"), "two"),
    Row("two-sided, pivot", (*TWO, "--allocation", "uniform"), "two"),
    Row("two-sided, uv, allocated", (*TWO, "--form", "uv"), "two"),
    Row("two-sided, pivot, allocated", TWO, "two"),
    Row("two-sided, pivot, allocated, anchored 0.5", (*TWO, "--update", "--anchor", "0.5"), "two"),
    Row("two-sided, pivot, allocated, refined", (*TWO, *REFINE), "two"),
    Row("the same, 800 steps on 512 windows", (*TWO, "--refine", "800", "--samples", "512"),
        ratios=("0.6",)),
    Row("two-sided, pivot, allocated, both domains", TWO, "mixed", mixed=True),
    Row("both domains, refined", (*TWO, *REFINE), "mixed", mixed=True),
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--wikitext", type=Path, required=True, help="folder of the two texts")
    parser.add_argument("--out", type=Path, default=Path("out/quality"))
    parser.add_argument("--ratios", default="0.2,0.4,0.6")
    parser.add_argument("--rows", default="", help="names of those to do, a;b")
    parser.add_argument("--max-ram", default="1G")
    parser.add_argument("--windows", default="0", help="of each text, for evaluation; 0: all")
    parser.add_argument("--texts", default="wikitext,reference,source", help="to evaluate on")
    parser.add_argument("--no-textbook", action="store_true")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    texts = _texts(options)
    ratios = options.ratios.split(",")
    wanted = [name for name in options.rows.split(";") if name]
    rows = [_dense(options, texts)]
    if not options.no_textbook:
        rows += [_textbook(options, ratio) for ratio in ratios]
    for row in ROWS:
        if not wanted or row.name in wanted:
            rows += [_ours(options, texts, row, r) for r in ratios if r in (row.ratios or ratios)]
            _write(options, rows)
    _write(options, rows)
    print((options.out / "quality.md").read_text("utf-8"))


def _texts(options: argparse.Namespace) -> dict[str, str]:
    """Name -> text to evaluate on; the third is made of the standard library's own source."""
    source = options.out / "python-source.txt"
    if not source.is_file():
        modules = (importlib.import_module(name) for name in SOURCE_MODULES)
        source.write_text("\n\n".join(map(inspect.getsource, modules)), "utf-8")
    return {
        "wikitext": str(options.wikitext / "test.txt"),
        "reference": HELD_OUT,
        "source": str(source),
    }


def _dense(options: argparse.Namespace, texts: dict[str, str]) -> dict[str, Any]:
    found = _evaluations(options, options.model, "dense", texts)
    return {"name": "dense", "ratio": None, "bytes": found["wikitext"]["bytes"], "texts": found}


def _textbook(options: argparse.Namespace, ratio: str) -> dict[str, Any]:
    """The reference's perplexity; its peak and its seconds are of the whole model in memory."""
    command = [
        str(HERE / "textbook_svd_llm.py"),
        str(options.model),
        *("--calibration", str(options.wikitext / "valid.txt")),
        *("--text", str(options.wikitext / "test.txt")),
        *("--samples", SAMPLES, "--seq-len", SEQ_LEN, "--ratio", ratio),
        *("--windows", options.windows),
    ]
    kept = options.out / f"textbook-{ratio}-{options.windows}.json"
    found = _kept(kept, lambda: json.loads(_python(*command)))
    seconds = found["seconds"]
    return {
        "name": "SVD-LLM as published, uv, whole model in memory",
        "ratio": ratio,
        "bytes": None,
        "peak_bytes": found["peak_rss_bytes"],
        "seconds": sum(v for k, v in seconds.items() if not k.endswith("perplexity")),
        "texts": {"wikitext": {"perplexity": found["compressed_perplexity"]}},
    }


def _ours(
    options: argparse.Namespace, texts: dict[str, str], row: Row, ratio: str
) -> dict[str, Any]:
    name = "-".join(f"{row.name} {ratio}".replace(",", "").split())
    folder = options.out / name
    sources = ["--calibration", str(options.wikitext / "valid.txt")]
    sources += ["--calibration", REFERENCE] if row.mixed else []
    work = ["--keep-work", "--work-dir", str(options.out / f"work-{row.shares}")]
    arguments = (
        *sources,
        *("--samples", SAMPLES, "--seq-len", SEQ_LEN, "--ratio", ratio),
        *("--max-ram", options.max_ram),
        *(work if row.shares else []),
        *row.options,
    )
    if not (folder / "streamcomp_report.json").is_file():
        _python("-m", "streamcomp", "compress", str(options.model), str(folder), *arguments,
                "--quiet")  # fmt: skip
    report = json.loads((folder / "streamcomp_report.json").read_text("utf-8"))
    linears = report["linears"]
    bits = [m["bits_per_weight"] * m["rows"] * m["columns"] for m in linears
            if "bits_per_weight" in m]  # fmt: skip
    weights = sum(m["rows"] * m["columns"] for m in linears)
    return {
        "name": row.name,
        "ratio": ratio,
        "reached": report["model"]["ratio"],
        "bytes": report["model"]["bytes_kept"],
        "bits_per_weight": sum(bits) / weights if bits else None,
        "peak_bytes": report["memory"]["peak_bytes"],
        "seconds": report["seconds"],
        "texts": _evaluations(options, folder, name, texts),
    }


def _evaluations(
    options: argparse.Namespace, model: Path, name: str, texts: dict[str, str]
) -> dict[str, dict[str, Any]]:
    """Perplexity on the texts asked for, and on those that were kept before."""
    found = {}
    for key, text in texts.items():
        kept = options.out / f"{name}-{key}-{options.windows}.json"

        def evaluate(text: str = text) -> dict[str, Any]:
            command = ("-m", "streamcomp", "eval", str(model), "--text", text, "--json")
            limits = ("--windows", options.windows, "--seq-len", SEQ_LEN)
            result = json.loads(_python(*command, *limits, "--max-ram", options.max_ram))
            return {
                "perplexity": result["perplexity"],
                "windows": result["windows"],
                "bytes": result["checkpoint_bytes"],
            }

        if kept.is_file() or key in options.texts.split(","):
            found[key] = _kept(kept, evaluate)
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


# -- what is written ---------------------------------------------------------------------


def _write(options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    (options.out / "quality.json").write_text(json.dumps(rows, indent=1))
    (options.out / "quality.md").write_text(_table(rows), "utf-8")
    (options.out / "quality.svg").write_text(_plot(rows), "utf-8")


def _table(rows: list[dict[str, Any]]) -> str:
    dense = rows[0]["texts"]
    counts = ", ".join(f"{key} {value['windows']}" for key, value in dense.items())
    lines = [
        f"Perplexity, and in brackets over dense; windows of {SEQ_LEN} tokens: {counts}.",
        "",
        "| method | ratio | " + " | ".join(dense) + " | weights | peak RAM | time |",
        "|---|---|" + "---|" * (len(dense) + 3),
    ]
    for row in rows:
        cells = [row["name"], row["ratio"] or ""]
        for key in dense:
            value = row["texts"].get(key)
            share = value and value["perplexity"] / dense[key]["perplexity"]
            cells.append(f"{value['perplexity']:.2f} ({share:.3f})" if value else "")
        cells.append(format_bytes(row["bytes"]) if row["bytes"] else "")
        if row.get("bits_per_weight"):
            cells[-1] += f", {row['bits_per_weight']:.2f} bits a weight"
        cells.append(format_bytes(row["peak_bytes"]) if row.get("peak_bytes") else "")
        cells.append(format_seconds(row["seconds"]) if row.get("seconds") else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


_WIDTH, _HEIGHT, _LEFT, _TOP, _PLOT_WIDTH, _PLOT_HEIGHT = 980, 480, 60, 24, 560, 400
_COLORS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#ff8ab7", "#a463f2", "#97bbf5",
           "#9c6b4e", "#9498a0")  # fmt: skip


def _plot(rows: list[dict[str, Any]]) -> str:
    """Perplexity on WikiText against bytes of weights: a line for each method, one for dense."""
    series: dict[str, list[tuple[float, float]]] = {}
    for row in rows[1:]:
        if row["bytes"]:
            point = (row["bytes"] / 2**20, row["texts"]["wikitext"]["perplexity"])
            series.setdefault(row["name"], []).append(point)
    dense = rows[0]["texts"]["wikitext"]["perplexity"]
    points = [point for line in series.values() for point in line] or [(1.0, dense)]
    low_x, high_x = min(x for x, _ in points) - 5, max(x for x, _ in points) + 5
    top = min(max(y for _, y in points), 40 * dense)

    def place(x: float, y: float) -> tuple[float, float]:
        share = math.log(min(y, top) / dense * 1.05) / math.log(top / dense * 1.05 + 1e-9)
        right = _LEFT + (x - low_x) / (high_x - low_x) * _PLOT_WIDTH
        return right, _TOP + _PLOT_HEIGHT * (1 - share)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        'font-family="system-ui, sans-serif" font-size="12">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
    ]
    for tick in (1, 1.5, 2, 3, 5, 10, 20, 40):
        if tick * dense <= top * 1.01:
            _, y = place(low_x, tick * dense)
            color = "#333" if tick == 1 else "#ddd"
            parts.append(f'<path d="M{_LEFT} {y:.1f}h{_PLOT_WIDTH}" stroke="{color}"/>')
            label = "dense" if tick == 1 else f"{tick:g} x"
            parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
    for x in range(math.ceil(low_x / 20) * 20, int(high_x) + 1, 20):
        across, _ = place(x, dense)
        parts.append(
            f'<text x="{across:.1f}" y="{_TOP + _PLOT_HEIGHT + 20}" text-anchor="middle">{x}</text>'
        )
    parts.append(
        f'<text x="{_LEFT}" y="{_HEIGHT - 10}">MiB of weights; perplexity over dense, log</text>'
    )
    for place_in_list, (name, line) in enumerate(series.items()):
        color = _COLORS[place_in_list % len(_COLORS)]
        dashes = ' stroke-dasharray="5 3"' if place_in_list >= len(_COLORS) else ""
        path = " ".join("{:.1f},{:.1f}".format(*place(x, y)) for x, y in sorted(line))
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"{dashes}/>'
        )
        for size, y in line:
            across, up = place(size, y)
            tip = f"<title>{name}: {y:.2f} at {size:.0f} MiB</title>"
            parts.append(
                f'<circle cx="{across:.1f}" cy="{up:.1f}" r="4" fill="{color}">{tip}</circle>'
            )
        down = _TOP + 18 * place_in_list
        left = _LEFT + _PLOT_WIDTH + 24
        parts.append(
            f'<path d="M{left} {down}h20" stroke="{color}" stroke-width="3"{dashes}/>'
            f'<text x="{left + 28}" y="{down + 4}">{name}</text>'
        )
    return "\n".join([*parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    main()
