"""safetensors files put together by hand, so that they can be wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FOUR_FLOATS = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}


def write_parts(
    path: Path, header: Any, data: bytes = bytes(16), length: int | None = None
) -> Path:
    """A file with ``header`` (JSON, or bytes as they are) that says to be ``length`` long."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path
