# make demo: install, then the main job on the packaged model.
# make check: install, then lint, types and the quick tests: the daily loop.
# make test: install, then lint, types and all tests.
# make faults: install, then 200 kills; writes benchmarks/results/faults.json.
# make lowest: the lowest versions that pyproject.toml allows, in an environment of their own, and
#   the tests of files and commands with them. Of torch it is the pinned one, unless TORCH names a
#   lower one that pip finds without CUDA.
# make older: directories of every kind, read by transformers 4 in an environment of its own.
# make release-check: wheel and sdist, each installed into a fresh environment, and the demo there.
# make docs: install, then the tables of results and the site (site/index.html).
PYTHON ?= python3
# Pinned first: a bare torch would bring several gigabytes of CUDA to a machine without a GPU.
TORCH ?= torch==2.13.0
BIN := .venv/bin
INSTALLED := .venv/.installed

RELEASE := build/release

.PHONY: demo check test lint docs faults fuzz lowest older release-check install

demo: $(INSTALLED)
	$(BIN)/krony demo

check: lint
	$(BIN)/pytest -m "not slow" -n 2 --dist loadfile

test: lint
	$(BIN)/pytest -n 2 --dist loadfile

# Some minutes: what a model directory may hold, two thousand times each.
fuzz: $(INSTALLED)
	KRONY_FUZZ=2000 $(BIN)/pytest tests/fuzz

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(INSTALLED)
	$(BIN)/python benchmarks/tables.py
	$(BIN)/python -m mkdocs build --strict

faults: $(INSTALLED)
	$(BIN)/python tests/faults/trials.py 200

lowest:
	rm -rf build/lowest && $(PYTHON) -m venv build/lowest
	$(PYTHON) tests/lowest.py | grep -v '^torch==' > build/lowest/constraints.txt
	build/lowest/bin/python -m pip install --quiet "$(TORCH)"
	build/lowest/bin/python -m pip install --quiet -c build/lowest/constraints.txt \
		".[eval,gguf]" pytest hypothesis
	build/lowest/bin/python -m pytest -q tests/hf tests/fixtures tests/healing/test_states.py \
		tests/cli/test_cli.py

# OLDER: a Python that has transformers 4 already.
OLDER ?= build/older/env/bin/python
older: $(INSTALLED)
	test -x $(OLDER) || { $(PYTHON) -m venv build/older/env && \
		$(OLDER) -m pip install --quiet "$(TORCH)" && \
		$(OLDER) -m pip install --quiet "transformers==4.57.*" accelerate torchao; }
	rm -rf build/older/models
	$(BIN)/python tests/older.py write build/older/models
	HF_MODULES_CACHE=build/older/modules $(OLDER) tests/older.py read build/older/models

release-check:
	rm -rf $(RELEASE) && mkdir -p $(RELEASE)
	$(PYTHON) -m venv $(RELEASE)/tools
	$(RELEASE)/tools/bin/python -m pip install --quiet build
	$(RELEASE)/tools/bin/python -m build --outdir $(RELEASE)/dist .
	for file in $(RELEASE)/dist/*.whl $(RELEASE)/dist/*.tar.gz; do \
		rm -rf $(RELEASE)/fresh && $(PYTHON) -m venv $(RELEASE)/fresh && \
		$(RELEASE)/fresh/bin/python -m pip install --quiet "$(TORCH)" && \
		$(RELEASE)/fresh/bin/python -m pip install --quiet $$file && \
		(cd $(RELEASE) && fresh/bin/krony demo --out demo) || exit 1; \
	done

install: $(INSTALLED)

$(INSTALLED): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $@
