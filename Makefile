# `make demo` and `make test` set everything up in .venv on first use.
# `make test FAST=1` leaves out the tests marked as slow; continuous integration runs them all.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test rehearse clean

demo: $(READY)
	$(BIN)/python -m benchmarks.demo

test: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/python -m pytest --numprocesses=auto --dist=worksteal --quiet $(if $(FAST),-m "not slow")

# Both calls to a lent GPU, in small on this CPU. Needs a Python 3.12, and about ten minutes.
PYTHON312 ?= python3.12
rehearse: $(READY)
	$(BIN)/python -m benchmarks.gpu.rehearse --python $(PYTHON312) $(if $(DATA),--data-dir $(DATA))

$(READY): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv results
