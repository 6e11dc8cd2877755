# Each target builds the environment it needs, from nothing when that is missing and again when pyproject.toml or
# the constraints change. Variables go on the command line:
#
#   make test PYTEST_ARGS="-k quadratic -x"      make test WORKERS=0      make demo ARGS=--help      make PYTHON=python3.12 test
#
# torch==2.13.0 from PyPI is the CUDA build on Linux. For the much smaller CPU build:
#
#   export PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
# What the development environment holds. `EXTRAS=dev` leaves DeepSpeed out; its tests are then skipped.
EXTRAS ?= dev,deepspeed
# Processes that share the tests; 0 runs them in one, where a debugger can be attached.
WORKERS ?= 2
PYTEST_ARGS ?=
ARGS ?=

# Where DeepSpeed compiles: shared between environments, one version's build would be taken for another's. It is compiled
# with the environment: in a test, a slow machine would run into a timeout, and a compiler that is killed leaves a lock.
export TORCH_EXTENSIONS_DIR = $(abspath $(VENV))/torch_extensions
COMPILE := from deepspeed.ops.op_builder import cpu; \
    [builder().load(verbose=False) for builder in (cpu.CPUAdamBuilder, cpu.ShareMemCommBuilder)]

PY := $(VENV)/bin/python
DEV := $(VENV)/.stamp-$(EXTRAS)
DEMO := $(VENV)/.stamp-demo
PIP_INSTALL := $(PY) -m pip install -qq --disable-pip-version-check -c $(CONSTRAINTS)
CHECK := build/wheel-check
UV := build/uv/bin/uv

.PHONY: help
help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: demo
demo: $(DEMO)  ## Train a small language model by GRPO with gradient regularization (ARGS="...")
	$(PY) -m examples.grpo $(ARGS)

.PHONY: demo-zero
demo-zero: $(DEV)  ## Train the demo's model under DeepSpeed ZeRO-2, a few steps on two CPU processes (ARGS="...")
	DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 $(VENV)/bin/accelerate launch \
	    --config_file examples/grpo/zero2.yaml --mixed_precision no -m examples.grpo --ddp_backend gloo \
	    --per_device_train_batch_size 8 --max_steps 8 --output_dir runs/demo-zero $(ARGS)

.PHONY: reward-hacking
reward-hacking: $(DEMO)  ## Show a policy that hacks a learned reward, without and with regularization, in minutes (ARGS="...")
	$(PY) -m benchmarks.hacking $(ARGS)

.PHONY: test
test: $(DEV)  ## Run the tests (PYTEST_ARGS="...", WORKERS=2)
	HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) --dist loadfile $(PYTEST_ARGS)

.PHONY: test-pinned
test-pinned:  ## Run the tests with the library versions that the published implementation recommends
	$(MAKE) test VENV=.venv-pinned CONSTRAINTS=constraints-published.txt

.PHONY: lint
lint: $(DEV)  ## Check style (ruff)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

.PHONY: types
types: $(DEV)  ## Check types (mypy)
	$(PY) -m mypy

# The last two pin another torch and cannot be resolved with this one; benchmarks/cost/peers.py uses one file of each.
.PHONY: bench
bench: $(DEV)  ## Measure the cost figures of the README again, in an hour (ARGS="--quick --readme ...")
	$(PIP_INSTALL) --editable ".[bench]"
	$(PIP_INSTALL) --no-deps mosaicml==0.32.1 zij==0.1.1
	DS_ACCELERATOR=cpu $(PY) -m benchmarks.cost $(ARGS)

.PHONY: gpu
gpu: $(DEV)  ## Check a step on this machine's GPU and measure its cost, in 6 minutes (ARGS="--quick --device cpu")
	$(PIP_INSTALL) --no-deps zij==0.1.1
	$(PY) -m benchmarks.cost.gpu $(ARGS)

.PHONY: precision
precision: $(DEMO)  ## Measure the accuracy of the penalty in fp32, fp16 and bf16 (ARGS="...")
	$(PY) -m benchmarks.precision $(ARGS)

.PHONY: trainers
trainers: $(DEV)  ## Test all trainers with both sets of versions, and write the table
	$(MAKE) env VENV=.venv-pinned CONSTRAINTS=constraints-published.txt
	$(PY) -m benchmarks.trainers .venv-pinned/bin/python $(PY)

# Requirements that a line `# --no-deps …` names are installed as they are: the file says why.
STACKS := ms_swift llama_factory axolotl verl
.PHONY: stacks
stacks: $(DEV) $(STACKS:%=.venv-stacks/%/.stamp)  ## Run the examples of Axolotl, LLaMA-Factory, ms-swift and verl (ARGS=verl)
	$(PY) -m benchmarks.stacks $(ARGS)

.venv-stacks/%/.stamp: benchmarks/stacks/%.txt
	$(PYTHON) -m venv .venv-stacks/$*
	.venv-stacks/$*/bin/python -m pip install -qq --disable-pip-version-check torch==2.13.0
	.venv-stacks/$*/bin/python -m pip install -qq --disable-pip-version-check -r $<
	sed -n 's/^# --no-deps //p' $< | xargs -r .venv-stacks/$*/bin/python -m pip install -qq --no-deps
	.venv-stacks/$*/bin/python -m pip install -qq --no-deps --editable .
	@touch $@

.PHONY: wheel-check
wheel-check: $(DEV)  ## Build the wheel and try it in an environment that holds torch alone
	rm -rf $(CHECK)
	$(PY) -m build --quiet --outdir $(CHECK)
	$(PYTHON) -m venv $(CHECK)/venv
	$(CHECK)/venv/bin/python -m pip install -qq --disable-pip-version-check -c $(CONSTRAINTS) $(CHECK)/*.whl
	$(CHECK)/venv/bin/python -I -W "ignore:Failed to initialize NumPy" .ci/wheel_smoke.py

.PHONY: ci
ci:  ## Everything that has to pass: lint, types, test, wheel-check
	+@.ci/run

.PHONY: env
env: $(DEV)  ## Build the development environment and nothing else

# uv finds in seconds what pip searches for in vain. pip itself stays as it came with Python, and what belongs to a CUDA build
# of torch is left open: torch requires exact versions of most, and the CPU build has none.
.PHONY: lock
lock: $(UV)  ## Resolve constraints*.in to the versions of all packages, constraints*.txt (ARGS=--upgrade for the newest)
	for name in constraints constraints-published; do \
	    cp $$name.txt build/uv/$$name.txt; \
	    $(UV) pip compile -q $(ARGS) --universal --python-version 3.10 --all-extras -c $$name.in pyproject.toml \
	        --no-emit-package pip --annotation-style line --custom-compile-command "make lock" -o build/uv/$$name.txt; \
	    grep -Ev '^(nvidia|cuda)-' build/uv/$$name.txt >$$name.txt; \
	done

$(UV):
	$(PYTHON) -m venv build/uv
	build/uv/bin/python -m pip install -qq --disable-pip-version-check uv==0.13.9

.PHONY: clean
clean:  ## Remove build products and caches; the environments stay
	rm -rf build dist *.egg-info .coverage .coverage.* coverage.xml htmlcov
	rm -rf .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name '.venv*' -prune -o -name __pycache__ -type d -exec rm -rf {} +

# torch comes first and alone: it decides how large the environment is, and a wrong build shows at once.
$(VENV)/.stamp-torch: $(CONSTRAINTS)
	@echo "Building $(VENV), which takes some minutes"
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) torch
	@touch $@

# The stem is the list of extras. The dev extra contains the demo extra, so it serves both.
$(VENV)/.stamp-%: $(VENV)/.stamp-torch pyproject.toml $(CONSTRAINTS)
	$(PIP_INSTALL) --editable ".[$*]"
	$(if $(findstring deepspeed,$*),DS_ACCELERATOR=cpu PATH="$(abspath $(VENV))/bin:$$PATH" $(PY) -c "$(COMPILE)")
	@touch $@ $(if $(filter dev%,$*),$(DEMO))
