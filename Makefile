# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
TOOLS := $(VENV)/.tools
IMAGE ?= textual-inversion-ray
IMAGE_TARGET ?= cpu

export RAY_AUTH_MODE ?= disabled
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: install demo test test-fast check format image clean

install: $(INSTALLED)  # what runs the pipeline, HEIC photos included; test and check install the rest

demo: $(INSTALLED)  # learns in both ways: from words, and from the encoder; then compares
	$(BIN)/python -m pipeline.run manifests/demo.parquet --prompts manifests/demo_prompts.parquet \
		--config demo --output output/demo
	$(BIN)/python -m pipeline.run manifests/demo.parquet --limit 10 --config encoder-fast \
		--set inversion.augment.flip=false --set preview.steps=50 --output output/demo-encoder
	$(BIN)/python -m pipeline.compare output/demo output/demo-encoder --output output/both-ways.html
	$(BIN)/python -m demo.both_ways output/demo output/demo-encoder --output output/both-ways.png

test: $(TOOLS)  # every group runs, and the last lines repeat what failed in each
	$(BIN)/python .ci/run_tests.py

test-fast: $(TOOLS)
	$(BIN)/python -m pytest tests -m "not slow"

check: $(TOOLS)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python .ci/size_caps.py

format: $(TOOLS)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

image:  # of the last commit's name; IMAGE_TARGET: cpu, with the demo model, or cuda
	docker build --file k8s/image/Dockerfile --target $(IMAGE_TARGET) \
		--tag $(IMAGE):$(IMAGE_TARGET)-$(shell git rev-parse --short HEAD) .

PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) ".[heif]"
	touch $@

$(TOOLS): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) ".[demo,test,check,benchmarks,perceptual,heif]"
	touch $(INSTALLED) $@

clean:
	rm -rf $(VENV) output
