"""The interface of methods: a weight, a moment and an allowance in, factors out.

Nothing here or at the top of a method's file imports torch, so that a recipe can read the methods'
defaults without loading it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from streamcomp.forms import Allowance
    from streamcomp.linalg.low_rank import Decomposition

__all__ = [
    "Factors",
    "Figures",
    "GradientMoment",
    "Method",
    "Moment",
    "Settings",
    "Side",
    "Site",
]

Side = Literal["inputs", "outputs"]


@dataclass(frozen=True)
class GradientMoment:
    """Second moment of the loss's gradients G = dL/dY at one linear (m x n), on its smaller side.

    ``value`` is Gamma = G G^T (m, m) for m <= n, else the moment of W^T g (n, n); ``energy`` is
    tr(Gamma) in either case.
    """

    value: Tensor
    energy: float


@dataclass(frozen=True)
class Moment:
    """Second moment of a linear's inputs, H (n, n), or of its outputs, K (m, m).

    ``rows`` is the number of rows that were summed. ``min_damping`` is the smallest damping with
    which an earlier linear of the group could factor this moment.
    """

    side: Side
    value: Tensor
    rows: int = 0
    gradient: GradientMoment | None = None
    min_damping: float = 0.0

    @property
    def is_empty(self) -> bool:
        """Whether no row ever ran through the linear, so that nothing tells which errors count."""
        return self.rows == 0

    def leaves_open(self, directions: int) -> bool:
        """Whether it sums fewer rows than there are ``directions``, so that some have no data."""
        return 0 < self.rows < directions

    def damped(self, damping: float) -> Moment:
        """This moment for the group's next linear, after one that needed ``damping``."""
        return replace(self, min_damping=max(self.min_damping, damping))


class Site(Protocol):
    """The facts about a weight that methods read: m = ``rows`` outputs, n = ``columns`` inputs."""

    @property
    def disk_name(self) -> str: ...

    @property
    def rows(self) -> int: ...

    @property
    def columns(self) -> int: ...

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weight on disk, and of the factors."""


class Settings(Protocol):
    """The settings of a recipe that methods read."""

    @property
    def form(self) -> str: ...

    @property
    def statistics(self) -> str: ...

    @property
    def damping(self) -> float:
        """Relative to the mean of a moment's diagonal; 0 is the method's default."""

    @property
    def clusters(self) -> int: ...

    @property
    def axis(self) -> str: ...

    @property
    def seed(self) -> int: ...


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Results of the compression of one linear; a row of the report."""

    name: str  # on disk
    rows: int  # outputs
    columns: int  # inputs
    energy: float | None = None  # sum of the spectrum; None where no moment was decomposed
    damping: float  # added to a moment, as a share of the mean of its diagonal
    condition: float | None  # largest over smallest eigenvalue of the moment; None: not finite
    fallback: str  # what was done instead, where the data did not allow the method; or ""
    rank: int
    relative_loss: float  # share of the energy of its outputs that the factors miss
    loss: float | None = None  # in the unit of the method's energies
    numbers: int | None = None  # how many are stored, where the method chose it
    bits_per_weight: float | None = None  # likewise

    def values(self) -> dict[str, Any]:
        """Plain values by name, without those that the method leaves None."""
        absent = {f.name for f in fields(self) if f.default is None and vars(self)[f.name] is None}
        return {name: value for name, value in vars(self).items() if name not in absent}


@dataclass(frozen=True)
class Factors:
    """The tensors stored instead of one weight, by their names on disk."""

    tensors: dict[str, Tensor]
    spec: dict[str, Any]  # its entry in config.json, without the dtype
    figures: Figures
    min_damping: float = 0.0  # for :meth:`Moment.damped`

    def spare(self, allowance: Allowance) -> int:
        """Unused numbers of ``allowance``, which the next linear may use."""
        stored = self.figures.numbers
        return 0 if stored is None else allowance.numbers - stored


class Method(ABC):
    """Compresses one linear at a time; knows no model and no file."""

    name: ClassVar[str]  # as ``--method`` spells it
    source: ClassVar[str]  # where it was published
    # Allowed values of these settings; "auto" is the first.
    forms: ClassVar[tuple[str, ...]]
    statistics: ClassVar[tuple[str, ...]]
    # Settings of a recipe that no other method reads.
    settings: ClassVar[tuple[str, ...]] = ()
    # Whether it needs moments of the loss's gradients too; moments of inputs, not of outputs.
    needs_gradients: ClassVar[bool] = False
    needs_inputs: ClassVar[bool] = False
    # Whether it computes spectra, and whether their energies compare across linears.
    has_spectra: ClassVar[bool] = True
    losses_compare: ClassVar[bool] = False
    # Whether it factors the experts of mixtures, too.
    factors_experts: ClassVar[bool] = True
    # Whether its factors may be changed afterwards, by update and refine.
    can_follow: ClassVar[bool] = True

    @abstractmethod
    def compress(
        self,
        site: Site,
        weight: Tensor,
        moment: Moment | None,
        allowance: Allowance,
        settings: Settings,
    ) -> Factors:
        """Factors to store instead of ``weight`` (m, n), within ``allowance``."""

    def check(self, weight: Site, settings: Settings) -> None:  # noqa: B027
        """RecipeError where ``settings`` are impossible for a weight of this shape."""

    # -- reusable analysis -----------------------------------------------------------------

    def can_be_analysed(self, settings: Settings) -> bool:
        """Whether :meth:`analyse` depends on the dense model alone, so that one serves all ratios.

        Methods with ``has_spectra`` implement :meth:`analyse` and :meth:`factors`.
        """
        return self.has_spectra and settings.statistics == "dense"

    def analyse(
        self, weight: Tensor, moment: Moment | None, settings: Settings, rank: int | None = None
    ) -> Decomposition:
        """A decomposition that gives factors of every rank, or of ranks up to ``rank``."""
        raise NotImplementedError(f"method {self.name} keeps no analysis")

    def factors(
        self,
        site: Site,
        weight: Tensor,
        analysis: Decomposition,
        allowance: Allowance,
        settings: Settings,
    ) -> Factors:
        """Factors of ``weight`` from the result of :meth:`analyse`."""
        raise NotImplementedError(f"method {self.name} keeps no analysis")

    # -- memory and time -------------------------------------------------------------------

    @property
    def default_damping(self) -> float:
        """The damping that is used where the setting is 0."""
        return 0.0

    @abstractmethod
    def working_bytes(
        self,
        site: Site,
        side: Side,
        tokens: int,
        dtype: torch.dtype,
        settings: Settings,
    ) -> int:
        """Peak of :meth:`analyse`, or of :meth:`compress` for methods without it.

        Excludes the weight, of ``dtype``, and its moments, which were taken on ``side`` over
        ``tokens`` rows.
        """

    def analysis_bytes(self, site: Site, dtype: torch.dtype) -> int:
        """Bytes of the result of :meth:`analyse`, with bases in ``dtype``."""
        from streamcomp.linalg.low_rank import basis_bytes

        return basis_bytes(site.rows, site.columns, dtype, gradients=self.needs_gradients)

    def flops(self, site: Site, side: Side) -> dict[str, float]:
        """Operations of :meth:`analyse` without ``eigh``, by the rate that they run at."""
        from streamcomp.linalg.low_rank import decomposition_flops

        return decomposition_flops(site.rows, site.columns, side, gradients=self.needs_gradients)
