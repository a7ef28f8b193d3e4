"""One ``with`` that configures this computer for a job, and restores everything.

Facts about the computer are read through a :class:`Probe`. :func:`probed` replaces it, for tests
that must not depend on free memory or speed.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from streamcomp.errors import UnsupportedSystemError
from streamcomp.machine import memory
from streamcomp.machine.addresses import AddressLimit, address_limit
from streamcomp.machine.allocator import release, settled
from streamcomp.machine.device import choose_device, device_budget_bytes, limit_device
from streamcomp.machine.kernels import warm_up
from streamcomp.machine.rates import MachineRates, measure_disk, measure_rates
from streamcomp.recipe import Resources

__all__ = ["Machine", "Probe", "check_system", "machine", "probe", "probed"]

# System calls used for files that not every system has; macOS lacks the first two.
_SYSTEM_CALLS = ("posix_fadvise", "posix_fallocate", "preadv", "pwrite", "O_DIRECTORY")


class Probe:
    """Facts about this computer that plans depend on."""

    def budget_bytes(self, max_ram: str | None, *, elsewhere: bool = False) -> int:
        """Bytes that a job may hold (:func:`streamcomp.machine.memory.budget_bytes`)."""
        return memory.budget_bytes(max_ram, elsewhere=elsewhere)

    def address_limit(self, threads: int) -> AddressLimit | None:
        """Bytes that may be mapped (:func:`streamcomp.machine.addresses.address_limit`)."""
        return address_limit(threads)

    def baseline_bytes(self) -> int:
        """Resident bytes of this process once free pages of its heap are returned."""
        release()
        return memory.resident_bytes()

    def is_memory_backed(self, folder: Path) -> bool:
        """Whether files in ``folder`` are in memory."""
        return memory.is_memory_backed(folder)

    def kernel_bytes(
        self, device: torch.device, dtype: torch.dtype, *, gradients: bool, training: bool
    ) -> int:
        """Bytes that products take in addition to their operands."""
        return warm_up(device, dtype, gradients=gradients, training=training)

    def rates(self, device: torch.device, dtype: torch.dtype) -> MachineRates:
        """Operations per second, except for the disk."""
        return measure_rates(device, dtype)

    def disk_rate(self, folder: Path) -> float:
        """Bytes per second at which a file in ``folder`` is written."""
        return measure_disk(folder)


_probe: ContextVar[Probe] = ContextVar("probe", default=Probe())  # noqa: B039 (it has no state)


def probe() -> Probe:
    """The probe in use."""
    return _probe.get()


@contextmanager
def probed(other: Probe) -> Iterator[None]:
    """While open, ``other`` is asked instead of the computer."""
    token = _probe.set(other)
    try:
        yield
    finally:
        _probe.reset(token)


@dataclass
class Machine:
    """This computer as configured for a job, inside of :func:`machine`."""

    device: torch.device
    budget_bytes: int
    device_budget: int  # bytes of the GPU; 0 on the CPU
    addresses: AddressLimit | None  # None where ulimit -v sets no limit
    _leaving: ExitStack = field(repr=False)

    def kernel_bytes(
        self, dtype: torch.dtype, *, gradients: bool = False, training: bool = False
    ) -> int:
        """Run each kind of product once, so that its code and buffers are resident.

        ``gradients`` are those of the loss in a reverse sweep, ``training`` is a refinement's.
        Returns the bytes that products take in addition to their operands.
        """
        return probe().kernel_bytes(self.device, dtype, gradients=gradients, training=training)

    def rates(self, dtype: torch.dtype, folder: Path | None = None) -> MachineRates:
        """Measured speed, for a model in ``dtype`` and work in ``folder``."""
        rates = probe().rates(self.device, dtype)
        return rates if folder is None else replace(rates, disk_bytes=probe().disk_rate(folder))

    def limit_device(self) -> None:
        """Limit torch's allocator to the budget of the GPU until :func:`machine` is left."""
        self._leaving.callback(limit_device(self.device, self.device_budget))


@contextmanager
def machine(resources: Resources, *, elsewhere: bool = False) -> Iterator[Machine]:
    """Set threads and the allocator, and resolve the budgets, as ``resources`` say.

    The budget may be that of a larger machine where the job is to run ``elsewhere``. On leaving,
    also after an error, threads, allocator, environment and the GPU's limit are restored. Raises
    UnsupportedSystemError, or RecipeError where this machine lacks the resources asked for, or
    BudgetError where it allows too few addresses for the threads.
    """
    check_system()
    device = choose_device(resources.device)
    with ExitStack() as leaving:
        threads = resources.threads or torch.get_num_threads()
        addresses = None if elsewhere else probe().address_limit(threads)
        leaving.callback(torch.set_num_threads, torch.get_num_threads())
        if resources.threads:
            torch.set_num_threads(resources.threads)
        leaving.enter_context(settled())
        budget = probe().budget_bytes(resources.max_ram, elsewhere=elsewhere)
        device_budget = device_budget_bytes(device, resources.max_vram)
        yield Machine(device, budget, device_budget, addresses, leaving)


def check_system() -> None:
    """UnsupportedSystemError where the system lacks calls that a job makes later."""
    missing = [call for call in _SYSTEM_CALLS if not hasattr(os, call)]
    if missing:
        raise UnsupportedSystemError(
            f"streamcomp needs Linux: this system ({platform.system()}) has no "
            f"{', '.join(missing)}; use a container or a virtual machine with Linux (inspect, "
            "status and loading a compressed model with transformers work here too)"
        )
