"""A compressed model for tools that know no factors."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from streamcomp.checkpoint.atomic import make_folder, write_json
from streamcomp.checkpoint.index import CheckpointIndex, TensorInfo, read_header
from streamcomp.checkpoint.reader import TensorReader
from streamcomp.checkpoint.writer import Entry, write_shard
from streamcomp.errors import OutputError, RecipeError, SourceError, UnsupportedModelError
from streamcomp.job.progress import JobProgress
from streamcomp.job.publish import copy_companions, quantization_config, write_index
from streamcomp.modeling.modules import FORMS, FactoredLinear
from streamcomp.modeling.skeleton import Skeleton

__all__ = ["export_checkpoint"]

_FORMS = ("dense", "uv")
_MARKER = ".streamcomp-export.json"
