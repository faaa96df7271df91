# make compare   the main job on the bundled models            make test   everything CI runs
# make check     lint and types                                make bench  the benchmarks
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: compare figure reproduction test quick check lint types unit fuzz bench bench-gpu wheel format clean

compare: $(VENV)/.installed
	$(BIN)/haltkit compare text --policies accel,kl,norm --json haltkit-compare.json --plot haltkit-compare.png
	$(BIN)/haltkit compare chase --policies accel,kl,norm --taus auto --json haltkit-chase.json --plot haltkit-chase.png

# README's first picture, of what make compare measured.
figure: $(VENV)/.installed
	$(BIN)/python examples/draw_overview.py --chase haltkit-chase.json --text haltkit-compare.json --out examples/overview.png

REASONERS := examples/reproduction/reasoners

# The claims of the papers, judged on the bundled checkpoint: examples/reproduction.
reproduction: $(VENV)/.installed
	$(BIN)/haltkit compare --policies accel,kl,norm --taus paper --tokens 1024 --json examples/reproduction/compare.json
	$(BIN)/haltkit diagnose --snapshots examples/reproduction/snapshots --grid --out examples/reproduction
	for model in chase sudoku; do \
	  $(BIN)/haltkit compare $$model --policies accel,kl,norm --taus both --json $(REASONERS)/$$model/compare.json && \
	  $(BIN)/haltkit diagnose $$model --out $(REASONERS)/$$model || exit 1; done
	$(BIN)/haltkit report examples/reproduction $(REASONERS)/chase $(REASONERS)/sudoku --out examples/reproduction/claims-by-model.md

test: check unit wheel

check: lint types

# Looped models that haltkit was not built for (examples/gallery.py), and what these import beyond the other packages.
GALLERY := bdh-cq coconut-pytorch hrm-pytorch iterative-bert perceiver-pytorch plato-mythos ponder-transformer \
  pytorch-adaptive-computation-time rlt-pytorch silva-networks slot-attention spiral-lm torch-geometric torchdiffeq \
  hyper-connections rotary-embedding-torch torch-einops-utils vector-quantize-pytorch x-mlps-pytorch

# torch first and pinned: left to itself pip takes the newest build, CUDA and all.
$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) --editable '.[dev,third-party,eval]'
	$(PIP) --no-deps open-mythos $(GALLERY)
	touch $@

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Type checkers do not know setuptools' package-dir: show them the tree as it is when installed.
types: $(VENV)/.installed-dev
	rm -rf build/tree && mkdir -p build/tree/haltkit
	ln -s $(CURDIR)/haltkit/* $(CURDIR)/models $(CURDIR)/cli build/tree/haltkit/
	$(BIN)/mypy build/tree/haltkit

# Two workers: the tests use one thread each. Say PYTEST_ARGS for anything else.
PYTEST_ARGS ?= -n 2
unit: $(VENV)/.installed-dev
	HYPOTHESIS_PROFILE=$(if $(CI),ci,default) $(BIN)/python -m pytest $(PYTEST_ARGS)

# A minute: no other process, no training, no browser, and few examples of each property.
quick: $(VENV)/.installed-dev
	HYPOTHESIS_PROFILE=quick $(BIN)/python -m pytest $(PYTEST_ARGS) -m "not slow"

# Damaged files and odd text, other ones each time, for MINUTES.
MINUTES ?= 60
fuzz: $(VENV)/.installed-dev
	end=$$(( $$(date +%s) + 60 * $(MINUTES) )); while [ $$(date +%s) -lt $$end ]; do \
	  HYPOTHESIS_PROFILE=fuzz $(BIN)/python -m pytest $(PYTEST_ARGS) -q tests/test_fuzz.py || exit 1; done

# The wheel must work on its own, in an empty folder, checkpoint and text included.
wheel: $(VENV)/.installed-dev
	rm -rf build/wheel && mkdir -p build/wheel/empty
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir build/wheel .
	$(PYTHON) -m venv build/wheel/venv
	echo "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" > \
	  "$$(build/wheel/venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/dependencies.pth"
	build/wheel/venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --force-reinstall build/wheel/*.whl
	cd build/wheel/empty && ../venv/bin/haltkit compare --policies norm --taus 0.1 --tokens 256 --repeats 1 --max-loops 4
	cd build/wheel/empty && ../venv/bin/python -c "import haltkit, sys; assert 'build/wheel/venv' in haltkit.__file__, haltkit.__file__"

bench: $(VENV)/.installed
	$(BIN)/python examples/bench_policy_cost.py
	$(BIN)/python examples/bench_rows.py
	$(BIN)/python examples/bench_queue.py
	$(BIN)/python examples/bench_sudoku.py
	$(BIN)/python examples/bench_kinds.py
	$(BIN)/python examples/bench_attach.py
	$(BIN)/python examples/bench_attach_rows.py
	$(BIN)/python examples/bench_generate.py
	$(BIN)/python examples/bench_wavefront.py
	$(BIN)/python examples/bench_refill.py
	$(BIN)/python examples/bench_training.py
	$(BIN)/python examples/bench_calibration.py
	$(BIN)/python examples/bench_recorded_calibration.py
	$(BIN)/python examples/bench_early_risk.py
	$(BIN)/python examples/bench_batches.py
	$(BIN)/haltkit bench --json haltkit-bench.json

# Everything that wants a CUDA device, in one command: the tests first, then the figures.
bench-gpu: $(VENV)/.installed-dev
	$(BIN)/python -c "import sys, torch; sys.exit(0 if torch.cuda.is_available() else 'bench-gpu needs a CUDA device')"
	$(BIN)/python -m pytest -q tests/test_accelerator.py
	$(BIN)/python examples/bench_batches.py --device cuda
	$(BIN)/haltkit bench --device cuda --policies norm,accel,kl --json haltkit-bench-gpu.json
	$(BIN)/haltkit compare text --device cuda --policies accel,kl,norm --taus both --tokens 8192 --batch 32 --json haltkit-compare-gpu.json
	$(BIN)/python examples/bench_training.py --config small

clean:
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info
