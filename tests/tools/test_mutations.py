"""What reads a compressed model refuses one that a stranger has altered, in one clear line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from tests.jobs import Finished, compress, factored_modules, run_cli, run_python
from tests.refusals import assert_refused
from tests.tools.mutations import MUTATIONS, UP, Mutation, mutated

SHARED = {"method": "swsc", "clusters": 4, "axis": "columns"}
HEADERS = [name for name, mutation in MUTATIONS.items() if mutation.in_headers]


@pytest.fixture(scope="module")
def whole(
    pico: Callable[..., Path], text: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """A compressed model for each form that mutations begin with."""
    folder = tmp_path_factory.mktemp("whole")
    settings: dict[str, dict[str, Any]] = {"pivot": {"form": "pivot"}, "shared": dict(SHARED)}
    for form, given in settings.items():
        compress(pico("llama"), folder / form, text, ratio=0.3, **given)
        assert factored_modules(folder / form)[UP]["form"] == form
    return {form: folder / form for form in settings}


@pytest.fixture(scope="module")
def folders(whole: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The model after each mutation, and after none, by the mutation's name."""
    parent = tmp_path_factory.mktemp("mutated")
    made = {
        name: mutated(whole[mutation.form], parent / str(number), mutation)
        for number, (name, mutation) in enumerate(MUTATIONS.items())
    }
    untouched = {form: Mutation(lambda *_: None, form) for form in whole}
    return made | {
        form: mutated(whole[form], parent / form, mutation) for form, mutation in untouched.items()
    }


def evaluate(folder: Path, text: Path) -> Finished:
    return run_cli(
        "eval", folder, "--text", text, "--seq-len", 16, "--windows", 2, "--threads", 1, "-q"
    )


# Loads each folder and tells the error's type and message.
ELSEWHERE = """
import json, sys
sys.modules["streamcomp"] = None  # importing it fails, were it installed
from transformers import AutoModelForCausalLM
from transformers.utils import logging

logging.set_verbosity_error()
logging.disable_progress_bar()
told = {}
for folder in sys.argv[1:]:
    try:
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        told[folder] = ["loaded", ""]
    except Exception as error:
        told[folder] = [type(error).__name__, str(error)]
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def by_plugin(
    folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[str]]:
    """What one process without streamcomp says to each of ``folders``."""
    cwd = tmp_path_factory.mktemp("elsewhere")
    environment = {"PYTHONPATH": "", "HF_MODULES_CACHE": str(cwd), "PYTHONSAFEPATH": "1"}
    done = run_python("-c", ELSEWHERE, *folders.values(), cwd=cwd, environment=environment)
    assert done.code == 0, done.err[-2000:]
    return {name: done.json[str(folder)] for name, folder in folders.items()}


def assert_clear(message: str) -> None:
    assert message.startswith("streamcomp: "), message
    assert "\n" not in message and len(message) < 400, message


def test_the_model_is_fine_without_a_mutation(
    folders: dict[str, Path],
    whole: dict[str, Path],
    by_plugin: dict[str, list[str]],
    text: Path,
    tmp_path: Path,
) -> None:
    for form in whole:
        AutoModelForCausalLM.from_pretrained(folders[form])
        assert by_plugin[form] == ["loaded", ""]
        assert evaluate(folders[form], text).code == 0
        assert run_cli("inspect", folders[form]).code == 0
        assert run_cli("export", folders[form], tmp_path / form, "-q").code == 0
        assert run_cli("verify", folders[form], "-q").code == 0


@pytest.mark.parametrize("name", MUTATIONS)
def test_the_loader_refuses_it(name: str, folders: dict[str, Path]) -> None:
    with pytest.raises(ValueError) as refusal:
        AutoModelForCausalLM.from_pretrained(folders[name])

    assert_clear(str(refusal.value))


@pytest.mark.parametrize("name", MUTATIONS)
def test_the_plugin_refuses_it(name: str, by_plugin: dict[str, list[str]]) -> None:
    kind, message = by_plugin[name]

    assert kind == "ValueError", message
    assert_clear(message)


@pytest.mark.parametrize("name", MUTATIONS)
def test_an_evaluation_refuses_it(name: str, folders: dict[str, Path], text: Path) -> None:
    done = evaluate(folders[name], text)

    assert done.code in (3, 4)
    assert_refused(done, done.code, "")


@pytest.mark.parametrize("name", HEADERS)
def test_inspect_refuses_it(name: str, folders: dict[str, Path]) -> None:
    done = run_cli("inspect", folders[name])

    assert done.code in (3, 4)
    assert_refused(done, done.code, "")


@pytest.mark.parametrize("name", MUTATIONS)
def test_export_refuses_it(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    done = run_cli("export", folders[name], tmp_path / "dest", "-q")

    assert done.code in (3, 4)
    assert_refused(done, done.code, "")
    assert not (tmp_path / "dest" / "config.json").exists()


@pytest.mark.parametrize("name", MUTATIONS)
def test_verify_names_it(name: str, folders: dict[str, Path]) -> None:
    done = run_cli("verify", folders[name], "--json")

    assert (done.code, done.err) == (6, "")
    assert not done.json["sound"] and done.json["faults"]
    assert all("\n" not in fault for fault in done.json["faults"])
