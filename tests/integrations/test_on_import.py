"""Whatever is imported first, transformers loads a compressed model: each order in a process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.jobs import compress, logits_of, run_python, varied_text

TOKENS = torch.tensor([[5, 9, 77, 120, 3, 64, 31, 8]])


@pytest.fixture(scope="module")
def out(pico: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compressed pico model, not to be changed."""
    folder = tmp_path_factory.mktemp("compressed")
    text = varied_text(folder / "text.txt", 2000)
    compress(pico("llama"), folder / "out", text, ratio=0.3)
    return folder / "out"


SCRIPT = """
import json, sys

def load(**settings):
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], **settings).eval()
    made = {type(module) for module in model.modules() if hasattr(module, "dense_weight")}
    return {
        "modules": sorted(f"{kind.__module__}.{kind.__qualname__}" for kind in made),
        "logits": model(torch.tensor(json.loads(sys.argv[2]))).logits.tolist(),
    }

def light():
    return not {"torch", "transformers"} & sys.modules.keys()

ORDER
told["waiting"] = [f for f in sys.meta_path if type(f).__module__.startswith("streamcomp")] != []
print(json.dumps(told))
"""

ORDERS = {
    "streamcomp first": """
import streamcomp
assert light()
import transformers
assert "transformers.quantizers.auto" not in sys.modules
told = load()
""",
    "transformers first": """
import transformers
assert "transformers.quantizers.auto" not in sys.modules
import streamcomp
assert "transformers.quantizers.auto" not in sys.modules
told = load()
""",
    "quantisation first": """
import transformers.quantizers.auto as table
import streamcomp
assert "streamcomp" in table.AUTO_QUANTIZER_MAPPING
told = load()
""",
    "models first": """
from transformers import AutoModelForCausalLM, LlamaForCausalLM
import streamcomp
told = load()
""",
    "the integration itself": """
from streamcomp.integrations.transformers import PLUGIN
told = load()
""",
    "with the plugin as well": """
import streamcomp
told = load(trust_remote_code=True)
assert load()["modules"] == told["modules"]
""",
    "the configuration first, through the plugin": """
import streamcomp
from transformers import AutoConfig
AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True)
told = load(trust_remote_code=True)
""",
}


@pytest.mark.parametrize("order", ORDERS)
def test_a_compressed_model_is_loaded(order: str, out: Path, tmp_path: Path) -> None:
    script = SCRIPT.replace("ORDER", ORDERS[order])
    environment = {"HF_MODULES_CACHE": str(tmp_path)}

    done = run_python("-c", script, out, TOKENS.tolist(), environment=environment)

    assert done.code == 0, done.err[-2000:]
    told = json.loads(done.out)
    assert told["modules"] == ["streamcomp.forms.runtime.PivotLinear"]
    assert told["waiting"] is False  # it has had its use
    expected = logits_of(AutoModelForCausalLM.from_pretrained(out).eval(), TOKENS)
    torch.testing.assert_close(torch.tensor(told["logits"]), expected, rtol=1e-4, atol=1e-4)


def test_a_plugin_that_came_first_is_left_in_its_place(out: Path, tmp_path: Path) -> None:
    order = "first = load(trust_remote_code=True)\nimport streamcomp\ntold = load()\n"
    order += "assert told == first\n"

    done = run_python(
        "-c",
        SCRIPT.replace("ORDER", order),
        out,
        TOKENS.tolist(),
        environment={"HF_MODULES_CACHE": str(tmp_path)},
    )

    assert done.code == 0, done.err[-2000:]
    (module,) = json.loads(done.out)["modules"]
    assert module.startswith("transformers_modules.") and module.endswith(".PivotLinear")


def test_an_import_that_fails_is_tried_again() -> None:
    """The table that fails to be imported once is still found, and registered with, afterwards."""
    script = """
import sys
import streamcomp
sys.modules["transformers.quantizers.base"] = None
try:
    import transformers.quantizers.auto
except ImportError:
    pass
else:
    sys.exit("it was imported")
del sys.modules["transformers.quantizers.base"]
import transformers.quantizers.auto as table
assert "streamcomp" in table.AUTO_QUANTIZER_MAPPING
assert table.__spec__.loader is table.__loader__
assert not type(table.__loader__).__module__.startswith("streamcomp")
"""
    done = run_python("-c", script)

    assert done.code == 0, done.err[-2000:]
