# make demo: train the demo to the end.  make test: the whole test suite.  Each makes .venv first.
# A machine without a GPU can have the smaller CPU build of torch: make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu
PYTHON ?= python3
TORCH_INDEX ?=
VENV := .venv
TESTS :=
# The tests wait more than they work. The tests of a file share what is prepared for them, so one process runs them all.
PARALLEL := --numprocesses 2 --dist loadfile --no-loadscope-reorder

.PHONY: demo test chaos lint

demo: $(VENV)/.installed
	$(VENV)/bin/detour-train demo

test: $(VENV)/.installed
	$(VENV)/bin/python -m pytest $(PARALLEL) $(TESTS)

chaos: $(VENV)/.installed
	$(VENV)/bin/python -m pytest -m chaos

lint: $(VENV)/.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy detour_train.py configs datapipe monitoring engine launcher studies benchmarks

$(VENV)/.installed: pyproject.toml
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) --editable '.[dev]'
	touch $@
