# make demo    train the demo to its end
# make test    run the test suite               make chaos   run the tests that break runs on purpose, minutes each
# make lint    check style, imports and types   make docs    write the generated pages anew
# Each target makes .venv first. Without a GPU the smaller CPU build of torch is enough:
#   make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu
PYTHON ?= python3
TORCH_INDEX ?=
VENV := .venv
TESTS :=
# One process runs all tests of a file, because they share what is prepared for them. Three processes on two cores,
# because tests mostly wait.
PARALLEL := --numprocesses 3 --dist loadfile --no-loadscope-reorder
# The versions that were tested. Every line applies to one version of Python and is ignored by the others.
CONSTRAINTS := constraints/cpu.txt

.PHONY: demo test chaos lint docs

demo: $(VENV)/.installed
	$(VENV)/bin/detour-train demo

test: $(VENV)/.installed
	$(VENV)/bin/python -m pytest $(PARALLEL) $(TESTS)

chaos: $(VENV)/.installed
	$(VENV)/bin/python -m pytest -m chaos

lint: $(VENV)/.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/lint-imports --no-cache
	$(VENV)/bin/mypy detour_train.py configs datapipe monitoring engine launcher studies benchmarks

docs: $(VENV)/.installed
	$(VENV)/bin/python -m configs.docs
	$(VENV)/bin/python -m monitoring.docs
	$(VENV)/bin/python -m monitoring.grafana.dashboards

$(VENV)/.installed: pyproject.toml $(CONSTRAINTS)
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS) \
		$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) --editable '.[dev]'
	touch $@
