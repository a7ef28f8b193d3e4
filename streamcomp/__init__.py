"""Memory-constrained, layer-streaming compression of large language models.

Importing streamcomp teaches transformers to load what it writes.
"""

from streamcomp.api import (
    CompressResult,
    JobStatus,
    compress,
    evaluate,
    export,
    inspect,
    plan,
    redo,
    status,
)
from streamcomp.errors import (
    BudgetError,
    CalibrationError,
    CorruptShardError,
    JobLockedError,
    JobMismatchError,
    MissingShardError,
    NonFiniteError,
    OutputError,
    RecipeError,
    SourceError,
    StreamcompError,
    UnsupportedModelError,
)
from streamcomp.evaluation.inspection import Inspection
from streamcomp.evaluation.perplexity import Evaluation
from streamcomp.planning.plan import Plan
from streamcomp.recipe import Recipe, Resources

__version__ = "0.1.0"

__all__ = [
    "BudgetError",
    "CalibrationError",
    "CompressResult",
    "CorruptShardError",
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
    "compress",
    "evaluate",
    "export",
    "inspect",
    "plan",
    "redo",
    "status",
]
