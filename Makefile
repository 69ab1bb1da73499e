# make demo: install, then the main job on the packaged model.
# make test: install, then lint, types and all tests.
# make docs: install, then the tables of results and the site (site/index.html).
PYTHON ?= python3
# Pinned first: a bare torch would bring several gigabytes of CUDA to a machine without a GPU.
TORCH ?= torch==2.13.0
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: demo test lint docs install

demo: $(INSTALLED)
	$(BIN)/krony demo

test: lint
	$(BIN)/pytest -n 2 --dist loadfile

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(INSTALLED)
	$(BIN)/python benchmarks/tables.py
	$(BIN)/python -m mkdocs build --strict

install: $(INSTALLED)

$(INSTALLED): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $@
