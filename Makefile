# Two commands do all the set-up on a fresh machine: `make demo` (the tour) and `make test` (everything).
PYTHON ?= python3
VENV   ?= .venv
# The build of torch to install; on Linux plain `torch` brings the CUDA libraries along.
TORCH  ?= torch==2.13.0
# triton's interpreter needs numpy < 2.4
TRITON ?= triton==3.6.0 numpy<2.4
BIN    := $(VENV)/bin

.PHONY: demo test lint format generated clean

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check $(foreach r,$(TORCH) $(TRITON),"$(r)")
	$(BIN)/python -m pip install -q --disable-pip-version-check -e ".[test]"
	touch $@

demo: $(VENV)/.installed
	$(BIN)/python examples/demo/demo.py

test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(VENV)/.installed
	$(BIN)/ruff check psmc tests examples benchmarks
	$(BIN)/ruff format --check psmc
	$(BIN)/mypy

format: $(VENV)/.installed
	$(BIN)/ruff check --fix psmc tests examples benchmarks
	$(BIN)/ruff format psmc

generated: $(VENV)/.installed
	$(BIN)/python -m tests.generated_list --write

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
