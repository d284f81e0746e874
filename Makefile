# Two commands on a fresh machine: `make train` and `make test`. All packages go into .venv.
PYTHON ?= python3
BIN := .venv/bin
EXTRAS := dev,plot,lessons
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: train test lint format unit quick bench figures lessons docs docs-check api faults clean help

help:  ## list the targets
	@awk -F ':.*## *' '/^[a-z-]+:.*##/ { printf "%-12s%s\n", $$1, $$2 }' $(MAKEFILE_LIST)

train: .venv/runtime  ## set up, then fine-tune the embedded model on the embedded dialogues
	$(BIN)/python train.py --rank 8

test: lint unit  ## set up, then ruff, mypy and pytest

lint: .venv/development  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

unit: .venv/development  ## pytest, two processes; a file's tests share its runs
	$(PYTEST) -m "not nightly"

quick: .venv/development  ## pytest without the slow tests: 90 seconds on two cores
	$(PYTEST) -m "not slow and not nightly"

format: .venv/development  ## format with ruff
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: .venv/development  ## write figures, line counts and recording into README and docs
	$(BIN)/python docs/reading.py
	$(BIN)/python docs/record.py --paste
	$(BIN)/python benchmarks/tables.py

docs-check: .venv/development  ## run the commands and the Python of README and docs, check their figures
	$(BIN)/python docs/check.py
	$(BIN)/python docs/reading.py --check
	$(BIN)/python docs/record.py --check
	$(BIN)/python benchmarks/tables.py --check
	$(BIN)/python benchmarks/methods_page.py --check

api: .venv/development  ## the API reference from the docstrings: build/api/index.html
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[api]"
	$(BIN)/python -m pdoc --docformat google --math -o build/api minilora '!minilora[.](inject|merge|quantize)'

bench: .venv/development  ## ten benchmarks at a small size: benchmarks/results/small/
	for name in merge_latency exactness layer training evaluation quality qlora conformance startup \
		predict; do \
		$(BIN)/python benchmarks/$$name.py --small || exit 1; done

figures: .venv/development  ## the published figures: many hours on a machine with nothing else to do
	test ! -d ../shared/data/samsum || rm -f benchmarks/results/training_base.json
	$(BIN)/python benchmarks/training.py --precision fp32 --examples 384 --pieces 3 --validation 32
	$(BIN)/python benchmarks/quality.py --precision fp32 --epochs 1
	$(BIN)/python benchmarks/evaluation.py --model pocket --precisions fp32 --limit 400
	for name in default_run merge_latency exactness layer nf4_parity \
		qlora qlora_quality full_update conformance startup predict; do $(BIN)/python benchmarks/$$name.py || exit 1; done
	$(BIN)/python benchmarks/grid.py --data bookings --methods preset all-linear full
	$(BIN)/python benchmarks/pocket.py --data bookings --contestants "LoRA r 1" "LoRA r 4" "LoRA r 8" "LoRA r 16" \
		"LoRA r 8, all-linear" "full fine-tuning"
	for data in minichat minichat-hard; do for script in grid pocket; do \
		$(BIN)/python benchmarks/$$script.py --data $$data || exit 1; done; done
	test ! -d ../shared/data/samsum || $(BIN)/python benchmarks/grid.py --data ../shared/data/samsum \
		--methods preset all-linear full --batch-size 16 --validation-limit 200 --max-steps 614
	test ! -d ../shared/data/samsum || $(BIN)/python benchmarks/pocket.py --data ../shared/data/samsum \
		--contestants "LoRA r 8" "LoRA r 8, all-linear" "full fine-tuning" --seeds 0 --batch-size 16 --validation-limit 200
	$(BIN)/python pretraining/plot.py
	$(BIN)/python benchmarks/tables.py

lessons: .venv/development  ## execute the lessons, write them as notebooks with their outputs
	$(BIN)/python lessons/render.py

faults: .venv/development  ## kill and resume fifty runs; memory and files over 2,000 steps (Linux)
	$(BIN)/python -m tests.faults --kills 50
	$(BIN)/python -m tests.soak

clean:  ## remove the environment and the files that tools write
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# An environment without pip, or without the Python it was made with, is made anew.
VENV = $(BIN)/python -m pip --version >/dev/null 2>&1 || { \
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and \
	"Python 3.10 or newer is needed: make PYTHON=python3.12")' && $(PYTHON) -m venv --clear .venv; }

.venv/runtime: pyproject.toml constraints.txt
	$(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

.venv/development: pyproject.toml constraints.txt
	$(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$(EXTRAS)]"
	touch $@
