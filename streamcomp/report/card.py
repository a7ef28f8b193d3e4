"""The model card of an output."""

from __future__ import annotations

import html
import re

from streamcomp.forms import find_form
from streamcomp.job.rows import Report
from streamcomp.methods import find_method
from streamcomp.recipe import Recipe
from streamcomp.units import format_bytes

__all__ = ["model_card"]


def model_card(report: Report, recipe: Recipe) -> str:
    """``README.md`` of the output: what it is, how to load it, how it was made."""
    model = report.model
    return f"""---
library_name: transformers
tags:
- streamcomp
- low-rank
---

# {_as_text(model.source)}, compressed

{model.ratio:.1%} of the parameters of its linears removed with streamcomp
(`{recipe.method}`, form `{recipe.form}`): {format_bytes(model.bytes)} are now
{format_bytes(model.bytes_kept)}.

```python
import streamcomp  # pip install streamcomp
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH")
tokenizer = AutoTokenizer.from_pretrained("PATH")
```

Without streamcomp installed, `from_pretrained("PATH", trust_remote_code=True)` does the same
through `streamcomp_plugin.py` in this folder. The licence of the original model applies.

| | |
|---|---|
| parameters | {model.parameters:,} -> {model.parameters_kept:,} |
| methods | {", ".join(_sources(recipe))} |
| calibration | {report.windows} windows of {recipe.seq_len} tokens |
| peak memory while compressing | {format_bytes(report.memory.peak_bytes)} |
| details | `streamcomp_report.json`, `streamcomp_report.html` |
"""


def _as_text(name: str) -> str:
    """A name from outside as text of a Markdown line: no HTML, no markup, no second line."""
    line = html.escape(" ".join(name.encode("utf-8", "replace").decode().split()), quote=False)
    return re.sub(r"([\\`*_\[\]~|])", r"\\\1", line)


def _sources(recipe: Recipe) -> list[str]:
    """Where each part of the way that the model was made was published, each once."""
    sources = [find_method(recipe.method).source]
    if recipe.update:
        sources.append(find_method("svd-llm").source)
    if source := find_form(recipe.form).source:
        sources.append(source)
    if recipe.refine:
        sources.append("AA-SVD (arXiv 2604.02119)")
    return list(dict.fromkeys(sources))
