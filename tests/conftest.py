"""What every test may use."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: the suite asks no network
# Before torch is imported: threads that share a busy core wait for each other at each barrier. So
# says the environment of what tests start, too.
os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

import psutil  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from transformers.utils import logging  # noqa: E402

from tests.jobs import varied_text  # noqa: E402
from tests.pico import save_pico  # noqa: E402

_WORKER_BYTES = 3 * 2**29  # a worker of pytest-xdist at its largest, with a process that it starts


def pytest_xdist_auto_num_workers() -> int:
    """A worker for each core, as far as memory is free for them."""
    fit = int(psutil.virtual_memory().available) // _WORKER_BYTES
    return max(1, min(len(os.sched_getaffinity(0)), fit))


# Files that take longest, which begin first: a long one at the end keeps one worker alone busy.
_LONG = ("test_plan.py", "test_kill_and_resume.py", "test_sweeps.py", "test_families.py",
         "test_smollm2.py", "test_evaluate.py", "test_refine.py")  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files of ``_LONG`` first, in that order."""
    order = {name: place for place, name in enumerate(_LONG)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


logging.set_verbosity_error()
logging.disable_progress_bar()


@pytest.fixture(scope="session")
def pico(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes ``pico("llama", tie=True)``, a folder of ``save_pico``, once; not to be changed."""
    folders: dict[str, Path] = {}

    def make(architecture: str = "llama", **settings: object) -> Path:
        key = repr((architecture, sorted(settings.items(), key=str)))
        if key not in folders:
            folder = tmp_path_factory.mktemp(architecture)
            folders[key] = save_pico(folder, architecture, **settings)  # type: ignore[arg-type]
        return folders[key]

    return make


@pytest.fixture
def random() -> torch.Generator:
    """A seeded generator of random numbers."""
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return varied_text(tmp_path_factory.mktemp("text") / "calibration.txt", 4000)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A pico model to be damaged."""
    return save_pico(tmp_path / "model")
