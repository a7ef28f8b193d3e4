# make demo    compress and evaluate a real model under 1 GiB of RAM
# make quick   linters, type checker and the tests that need no job, in under a minute
# make test    linters, type checker and the whole test suite
PYTHON ?= python3
BIN := .venv/bin
MODEL := .cache/SmolLM2-135M
OUT := out/SmolLM2-135M

QUICK := tests/checkpoint tests/linalg tests/methods tests/test_docs.py tests/test_errors.py tests/test_imports.py \
	tests/test_recipe.py tests/test_rules.py tests/test_units.py

.PHONY: demo quick test clean

demo: .venv/ready
	$(BIN)/python benchmarks/smollm2.py $(MODEL)
	$(BIN)/python benchmarks/demo.py $(MODEL) $(OUT)

quick: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2 --ignore tests/linalg/test_bytes.py $(QUICK)

test: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# Built anew whenever what it is made of changes; "ready" is written last.
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[demo,dev]'
	touch $@

clean:
	rm -rf .venv .cache out
