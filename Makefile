# One virtual environment, made once and reused; everything below is safe to repeat.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO_RUN ?= runs/demo
INSTALLED := $(VENV)/.installed

.PHONY: demo test test-all lint aot clean

demo: $(INSTALLED)
	$(BIN)/structcot fetch smollm2-135m
	$(BIN)/structcot fetch countdown --to data/countdown --num-records 1200
	$(BIN)/structcot train configs/smollm2_demo.toml output_dir=$(DEMO_RUN)
	$(BIN)/structcot generate $(DEMO_RUN) --num-prompts 1 --max-new-tokens 400
	@echo
	@echo "report   $(DEMO_RUN)/report.html"
	@echo "adapter  $(DEMO_RUN)/adapter"
	@echo "metrics  $(DEMO_RUN)/metrics.jsonl"

test: $(INSTALLED)
	$(BIN)/python -m pytest -q

test-all: $(INSTALLED)
	$(BIN)/python -m pytest -q -m ""

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

aot: $(INSTALLED)
	$(BIN)/python -m structcot_kernels.aot --arch 90
	$(BIN)/python -m structcot_kernels.aot --arch 80,100

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks

$(INSTALLED): pyproject.toml setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade-strategy only-if-needed "torch>=2.11,<2.14"
	$(BIN)/python -m pip install --quiet -e .[dev]
	@touch $@
