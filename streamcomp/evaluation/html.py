"""The report as one HTML file: tables and plots, no script, nothing fetched."""

from __future__ import annotations

from typing import Any

__all__ = ["html_report"]


def html_report(report: dict[str, Any]) -> str:
    """``streamcomp_report.html`` of a finished job."""
    return "<!doctype html>"
