# Two commands on a fresh machine: `make train` and `make test`. Everything lands in .venv.
PYTHON ?= python3
BIN := .venv/bin
EXTRAS := dev,plot,lessons
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

.PHONY: train test lint format unit quick bench figures lessons docs-check faults clean help

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

train: .venv/runtime  ## set up, then fine-tune the embedded model on the embedded dialogues
	$(BIN)/python train.py --rank 8

test: lint unit  ## set up, then ruff, mypy and pytest

lint: .venv/development  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

unit: .venv/development  ## pytest, two processes; a file's tests share its runs
	$(PYTEST)

quick: .venv/development  ## pytest without the slow tests: 90 seconds on two cores
	$(PYTEST) -m "not slow"

format: .venv/development  ## let ruff put the code into its form
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs-check: .venv/development  ## run the commands and the Python of README and docs
	$(BIN)/python docs/check.py
	$(BIN)/python docs/record.py --check
	$(BIN)/python benchmarks/tables.py --check

bench: .venv/development  ## every benchmark, small, to see that it runs: benchmarks/results/small/
	for name in merge_latency exactness layer training evaluation quality qlora; do \
		$(BIN)/python benchmarks/$$name.py --small || exit 1; done

figures: .venv/development  ## the published figures: two hours and more of a quiet machine
	for name in default_run merge_latency exactness layer training evaluation quality nf4_parity \
		qlora qlora_quality full_update pocket; do $(BIN)/python benchmarks/$$name.py || exit 1; done
	test ! -d ../shared/data/samsum || $(BIN)/python benchmarks/pocket.py --name samsum \
		--data ../shared/data/samsum --seeds 0 --contestants "LoRA r 8, all-linear" \
		--epochs 2 --batch-size 16 --learning-rate 2e-3 --min-length 30 --length-penalty 1.0 --validation-limit 200
	$(BIN)/python benchmarks/pocket_page.py
	$(BIN)/python benchmarks/tables.py

lessons: .venv/development  ## execute the lessons and write them as notebooks with their outputs
	$(BIN)/python lessons/render.py

faults: .venv/development  ## kill fifty runs and resume them; memory and files over 2,000 steps
	$(BIN)/python -m tests.faults --kills 50
	$(BIN)/python -m tests.soak

clean:  ## remove the environment and what tools leave behind
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

.venv/runtime: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

.venv/development: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$(EXTRAS)]"
	touch $@
