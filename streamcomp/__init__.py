"""Memory-constrained, layer-streaming compression of large language models.

Importing streamcomp teaches transformers to load what it writes. It loads neither torch nor
transformers: what needs them is imported when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from streamcomp.errors import (
    BudgetError,
    CalibrationError,
    CorruptShardError,
    DamagedFileError,
    JobLockedError,
    JobMismatchError,
    MissingShardError,
    NonFiniteError,
    OutputError,
    RecipeError,
    SourceError,
    StreamcompError,
    UnsupportedModelError,
    UnsupportedSystemError,
)
from streamcomp.integrations.on_import import register_with_transformers
from streamcomp.recipe import Recipe, Resources

if TYPE_CHECKING:
    from streamcomp.api import (
        CompressResult,
        JobStatus,
        compress,
        evaluate,
        export,
        inspect,
        plan,
        status,
        verify,
    )
    from streamcomp.job.plan import Plan
    from streamcomp.tools.evaluate import Evaluation
    from streamcomp.tools.inspect import Inspection
    from streamcomp.tools.verify import Verification

__version__ = "0.1.0"

__all__ = [
    "BudgetError",
    "CalibrationError",
    "CompressResult",
    "CorruptShardError",
    "DamagedFileError",
    "Evaluation",
    "Inspection",
    "JobLockedError",
    "JobMismatchError",
    "JobStatus",
    "MissingShardError",
    "NonFiniteError",
    "OutputError",
    "Plan",
    "Recipe",
    "RecipeError",
    "Resources",
    "SourceError",
    "StreamcompError",
    "UnsupportedModelError",
    "UnsupportedSystemError",
    "Verification",
    "compress",
    "evaluate",
    "export",
    "inspect",
    "plan",
    "status",
    "verify",
]

# The module that has each name that is imported when it is first used.
_HOMES = {
    "Evaluation": "streamcomp.tools.evaluate",
    "Inspection": "streamcomp.tools.inspect",
    "Plan": "streamcomp.job.plan",
    "Verification": "streamcomp.tools.verify",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES.get(name, "streamcomp.api")), name)
    globals()[name] = value  # asked for once
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_with_transformers()
