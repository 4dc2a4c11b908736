# Every target sets up what it needs: a fresh clone, git and Python 3.11 or newer are enough.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.DEFAULT_GOAL := help
.PHONY: help book test lab export check bench fuzz site serve clean

help:  ## what each target does
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(READY): settings.ini setup.py pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "metabook needs Python 3.11 or newer: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

book: $(READY)  ## execute every chapter and build the site; says where to open it
	$(BIN)/python tools/build_site.py

test: $(READY)  ## the whole test suite (make test ARGS="--device cuda" and the like)
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadgroup $(ARGS)

lab: $(READY)  ## read and run the chapters in JupyterLab
	$(BIN)/python -m jupyterlab --notebook-dir nbs

export: $(READY)  ## write the library and the chapter tests from the notebooks
	$(BIN)/nbdev_export
	$(BIN)/python tools/cells_to_tests.py nbs tests/chapters
	$(BIN)/python tools/folds.py nbs

check: $(READY)  ## fast: generated files are up to date, notebooks clean, import order kept, ruff passes
	$(BIN)/python tools/check.py
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(READY)  ## measure speed, sampling and growth beside the peers (make bench ARGS="--device cuda")
	@$(BIN)/python -c 'import higher, torchopt' 2>/dev/null || $(BIN)/python -m pip install --quiet --editable '.[bench]'
	$(BIN)/python -m bench all $(ARGS)

fuzz: $(READY)  ## damaged files for every reader, a minute each (make fuzz ARGS="--seconds 600 --only config")
	@$(BIN)/python -c 'import atheris' 2>/dev/null || $(BIN)/python -m pip install --quiet --editable '.[fuzz]'
	@$(BIN)/python -m fuzz $(ARGS)

site: $(READY)  ## build the site again; executes only the chapters that changed
	$(BIN)/python tools/build_site.py

serve: $(READY)  ## look at the built site: http://127.0.0.1:8000
	$(BIN)/python -m http.server --bind 127.0.0.1 --directory _site 8000

clean:  ## remove everything that can be made again, but the environment
	rm -rf _site _build docs/api docs/_nbs build dist *.egg-info .jupyter_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
