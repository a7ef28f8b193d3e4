"""Work that is measured in a fork of its own, where no other work has left memory behind."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

__all__ = ["in_a_fork"]


def in_a_fork(work: Callable[..., Any], *arguments: Any, **settings: Any) -> Any:
    """The result of ``work``, which must be plain values; an AssertionError where it fails."""
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        os.close(reader)
        with os.fdopen(writer, "w") as file:
            json.dump(work(*arguments, **settings), file)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        text = file.read()
    assert os.waitpid(child, 0)[1] == 0, (arguments, settings)
    return json.loads(text)
