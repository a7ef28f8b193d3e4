"""Bytes and seconds, as people write them: ``"6GiB"`` <-> 6442450944, 73 -> ``"1m13s"``."""

from __future__ import annotations

import re

from streamcomp.errors import RecipeError

__all__ = ["format_bytes", "format_seconds", "parse_bytes"]

_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:I?B)?", re.IGNORECASE)
_SHARE = re.compile(r"(\d+(?:\.\d+)?)\s*%")


def parse_bytes(text: str, *, whole: int | None = None) -> int:
    """Bytes meant by ``text``.

    ``K``, ``M``, ``G``, ``T`` are powers of 1024, with or without ``iB`` or ``B``. A share
    such as ``"75%"`` is taken of ``whole`` (bytes) where one is given.
    """
    stripped = text.strip()
    if whole is not None and (share := _SHARE.fullmatch(stripped)):
        percent = float(share[1])
        if not 0 < percent <= 100:
            raise RecipeError(f"size {text!r}: a share must be above 0% and at most 100%")
        return int(whole * percent / 100)
    match = _SIZE.fullmatch(stripped)
    if match is None:
        raise RecipeError(f"size {text!r} not understood: write 32G, 900MiB or 1073741824")
    size = int(float(match[1]) * 1024 ** _POWERS[match[2].upper()])
    if size <= 0:
        raise RecipeError(f"size {text!r} must be above zero")
    return size


def format_bytes(size: float) -> str:
    """``size`` bytes with three significant digits, in powers of 1024."""
    value = float(size)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1024 or unit == "TiB":
            break
        value /= 1024
    digits = 0 if unit == "B" or abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:.{digits}f} {unit}"


def format_seconds(seconds: float) -> str:
    """``seconds`` as ``4.2s``, ``1m13s`` or ``2h05m``."""
    if seconds < 10:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
