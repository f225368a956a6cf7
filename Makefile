# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

export RAY_AUTH_MODE ?= disabled
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo test test-fast check format clean

demo: $(STAMP)
	$(BIN)/python -m pipeline.run manifests/demo.parquet --prompts manifests/demo_prompts.parquet --output output/demo

test: $(STAMP)  # the fast ones first
	$(BIN)/python -m pytest tests -m "not slow"
	$(BIN)/python -m pytest tests -m slow

test-fast: $(STAMP)
	$(BIN)/python -m pytest tests -m "not slow"

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python .ci/size_caps.py

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[demo,test,check,benchmarks]"
	touch $@

clean:
	rm -rf $(VENV) output
