# Two commands do all the set-up on a fresh machine with Python >= 3.11: `make demo` (the tour) and `make test`
# (everything). They install into .venv; nothing else on the machine changes.
PYTHON ?= $(firstword $(shell command -v python3.11 python3 python))
VENV   ?= .venv
# The build of torch. On Linux plain `torch` brings the CUDA libraries along; a CPU build does for all of this.
TORCH  ?= torch==2.13.0
# Only where torch did not bring triton along, as on a machine without a GPU: the kernels' tests run in its interpreter.
TRITON ?= triton==3.6.0
JOBS   ?= 2

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check

.PHONY: demo test nightly lint format tables generated clean

$(VENV)/.demo: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "psmc needs Python 3.11 or newer: make PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) "$(TORCH)" "numpy<2.4"
	$(PIP) -e ".[demo]"
	touch $@

$(VENV)/.test: $(VENV)/.demo
	$(BIN)/python -c "import triton" 2>/dev/null || test "$$(uname -s)" != Linux || $(PIP) "$(TRITON)"
	$(PIP) -e ".[test]"
	touch $@

demo: $(VENV)/.demo
	$(BIN)/python examples/demo/demo.py

# One thread of torch a worker: the workers are the parallelism.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder --durations 15

# What takes hours: texts at random, all mutants and generated rules, every example's proof checked by two others.
NIGHTLY := build/nightly
INPUTS  ?= 100000
nightly: $(VENV)/.test
	mkdir -p $(NIGHTLY)
	$(BIN)/psmc check examples --second-opinion --certificate $(NIGHTLY)/certificates.json
	$(BIN)/psmc verify $(NIGHTLY)/certificates.json
	$(BIN)/python benchmarks/fuzz.py --inputs $(INPUTS) --jobs $(JOBS) \
	    --failures $(NIGHTLY)/failures.txt --out $(NIGHTLY)/fuzz.json
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/proofs.py --jobs $(JOBS) --out $(NIGHTLY)/proofs.json

lint: $(VENV)/.test
	$(BIN)/ruff check psmc tests examples benchmarks
	$(BIN)/mypy

format: $(VENV)/.test
	$(BIN)/ruff check --fix psmc tests examples benchmarks
	$(BIN)/ruff format psmc

# README's tables, from benchmarks/results/.
tables: $(VENV)/.demo
	$(BIN)/python benchmarks/tables.py

# Compile anew what lies there; read the diff before committing it.
generated: $(VENV)/.demo
	$(BIN)/psmc compile $(patsubst generated/%.py,examples/%.psm,$(wildcard generated/*.py)) -o generated

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
