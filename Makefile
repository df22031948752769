# `make demo` and `make test` work on a fresh clone that has only Python (3.10 or newer), a C compiler and make.
# Without a C compiler they work too, with a slower CPU backend.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
PYTEST := $(BIN)/python -m pytest
# One torch thread per worker: two workers on two cores would otherwise fight for them. Each begins with a part of the
# tests in their order, and who is done takes of another's rest: no core waits for the last long file.
WORKERS ?= 2
PARALLEL := OMP_NUM_THREADS=1 $(PYTEST) -n $(WORKERS) --dist worksteal

# `make test-versions`: the oldest and the newest supported release, laid over the environment without what they ask for.
TRANSFORMERS ?= 5.18.0 5.24.0
OVERLAYS := $(abspath $(VENV))/overlays
# `make gpu-audit-versions`: releases of triton, laid over it in the same way; the environment's own comes last.
TRITON ?= 3.6.0 3.7.0 3.7.1 3.8.0
AUDIT_OPTIONS ?= --json docs/gpu_versions.json
# What is tested with them: the cache, and the engine's seam.
VERSIONED := tests/cache $(patsubst %,tests/batching/test_%.py,equality entry engine capacity server start ids refusals) \
	$(patsubst %,tests/batching/upstream/test_%.py,allocators places requests pause)
# Those of the cache's tests that are about the cache alone; releases of transformers differ in what the others touch.
UNVERSIONED := block_policy block_table beam_reorder interrupted native_backend memory_given_back refused_giving_back numbers offloading_counts offloading_limits overhead read_only_views \
	shared_pool_threads states_checked two_readers wide_batches
# `make test-matrix`: rows of tests/matrix.py (none: all), where their environments are, arguments for pytest and for it.
ROWS ?=
MATRIX_ENVS ?= .matrix
PYTEST_ARGS ?=
MATRIX_OPTIONS ?=

# `make soak`: how long.
SECONDS ?= 1800

# `make bench-peers`: where the peers' environments are, and further arguments.
PEERS ?= .peers
PEERS_OPTIONS ?=

# Reinstalled when one of these changes; Python sources are used in place.
SOURCES := pyproject.toml constraints.txt $(wildcard setup.py) $(wildcard kernels/torch-ext/*/cpu/src/*)
DEV := $(VENV)/.installed-dev
# The development environment contains everything that the demo needs.
DEMO := $(if $(wildcard $(DEV)),$(DEV),$(VENV)/.installed-demo)

# Without the times of day that `jupyter execute` stores in every cell.
define RUN_NOTEBOOKS
import nbclient, nbformat, sys
for path in sys.argv[1:]:
    notebook = nbformat.read(path, 4)
    nbclient.NotebookClient(notebook, timeout=3600, record_timing=False).execute()
    [cell.metadata.pop("execution", None) for cell in notebook.cells]
    nbformat.write(notebook, path)
endef
export RUN_NOTEBOOKS

.DEFAULT_GOAL := help
.PHONY: help demo info test test-all test-interpreted test-versions test-matrix test-sanitize test-tsan test-neon test-upstream test-gpu drill soak \
	bench bench-gpu bench-peers gpu-audit gpu-audit-versions cpu-audit lint types format notebooks coverage cache-api clean

help:  ## Show this list
	@sed -n 's/^\([a-z-]*\):.*## /\1|/p' $(MAKEFILE_LIST) | while IFS='|' read -r name text; do printf '  make %-18s %s\n' "$$name" "$$text"; done

demo: $(DEMO)  ## Compare DynamicCache with PagedInt8Cache on a real model
	@$(BIN)/hf-int8-paged demo

info: $(DEMO)  ## Show versions and the backends of this machine
	@$(BIN)/hf-int8-paged info

test: $(DEV)  ## Run the tests that need neither minutes nor a real model
	$(PARALLEL) -m "not slow"

test-all: $(DEV)  ## Run all tests but those of the next line
	$(PARALLEL) -m "not interpreted"

test-interpreted: $(DEV)  ## Run the cache's tests under Triton's interpreter, which takes many minutes
	$(PARALLEL) --dist load -m interpreted $(PYTEST_ARGS)

test-versions: $(addprefix $(OVERLAYS)/transformers-,$(TRANSFORMERS))  ## Run the cache's and the engine's tests with the oldest and newest transformers
	for overlay in $^; do PYTHONPATH=$$overlay $(PARALLEL) -m "not slow" $(VERSIONED) \
		$(UNVERSIONED:%=--ignore=tests/cache/test_%.py) || exit 1; done

test-matrix: $(DEV)  ## Run all tests under other versions, instruction sets and loads; writes docs/compatibility.md
	$(BIN)/python tests/matrix.py --rows $(ROWS) --environments $(MATRIX_ENVS) --pytest "$(PYTEST_ARGS)" $(MATRIX_OPTIONS)

test-sanitize: $(DEV)  ## Run the CPU kernels' tests under AddressSanitizer and UBSan
	tests/native/sanitize.sh $(BIN)/python

test-tsan:  ## Run the CPU kernels, called by several threads at once, under ThreadSanitizer
	tests/native/tsan.sh

test-neon: $(DEV)  ## Run the CPU kernels' tests on their build for Arm, emulated (Debian: gcc-aarch64-linux-gnu, qemu-user)
	tests/native/neon.sh $(BIN)/python

test-upstream: $(DEV)  ## Compare every way to generate, over 16 architectures, with transformers' own cache
	HF_HUB_OFFLINE=1 $(PARALLEL) --dist loadgroup tests/upstream/generation_modes.py

test-gpu: $(DEV)  ## On a GPU: numerics with fresh inputs, races, CUDA graphs, a second device, models; five minutes at most
	$(BIN)/python eval/gpu_day.py tests --json eval/results/gpu_tests.json

drill: $(DEV)  ## Throw an exception at every line that an operation passes, refuse memory everywhere, damage files (over an hour)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m tests.drill.files --json eval/results/file_drill.json
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m tests.drill.threads --json eval/results/thread_drill.json
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m tests.drill.refusals --workers $(WORKERS) \
		--json eval/results/refusal_drill.json
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m tests.drill.drill --workers $(WORKERS)

soak: $(DEV)  ## Serve requests of several threads from one pool for half an hour (SECONDS=60: a minute); writes eval/results/soak.json
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m tests.drill.soak --seconds $(SECONDS) --json eval/results/soak.json

bench: $(DEV)  ## Time kernels, a model, chunks, growth and bookkeeping on this CPU (half an hour); writes eval/results/*.json
	HF_HUB_OFFLINE=1 $(BIN)/python eval/bench.py

bench-peers: $(DEV)  ## Time a token beside OpenVINO and llama.cpp, in their own environments; writes eval/results/peers.json
	$(BIN)/python eval/bench_peers.py --environments $(PEERS) --json eval/results/peers.json $(PEERS_OPTIONS)

bench-gpu: $(DEV)  ## On a GPU: kernels beside rivals and predictions, and a model; writes eval/results/gpu_bench.json in four minutes
	$(BIN)/python eval/gpu_day.py bench --json eval/results/gpu_bench.json

gpu-audit: $(DEV)  ## Count what GPUs' machine code allows, without a GPU; writes docs/gpu_audit.json, docs/gpu_predictions.*
	OMP_NUM_THREADS=1 $(BIN)/python eval/gpu_audit.py --json docs/gpu_audit.json
	OMP_NUM_THREADS=1 $(BIN)/python eval/gpu_predictions.py --json docs/gpu_predictions.json --picture docs/gpu_predictions.png

gpu-audit-versions: $(addprefix $(OVERLAYS)/triton-,$(TRITON))  ## The same of decode attention under other releases of triton
	$(BIN)/python eval/gpu_audit_versions.py --overlays $^ $(AUDIT_OPTIONS)

cpu-audit: $(DEV)  ## Count the instructions of the CPU kernels' inner loops; writes docs/cpu_audit.json
	$(BIN)/python eval/cpu_audit.py --json docs/cpu_audit.json

lint: $(DEV)  ## Check style
	$(BIN)/ruff check
	$(BIN)/ruff format --check

# The second time with the kernels where they are installed: mypy knows nothing of package directories.
types: $(DEV)  ## Check types
	$(BIN)/mypy
	rm -rf build/types && mkdir -p build/types && cp -r hf_int8_paged build/types
	cp -r kernels/torch-ext/int8_paged_attention build/types/hf_int8_paged/kernels
	cd build/types && $(abspath $(BIN))/mypy --config-file $(CURDIR)/pyproject.toml hf_int8_paged

format: $(DEV)  ## Rewrite the sources in the project's style
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

notebooks: $(DEV)  ## Run the notebooks on the demo model and store their output
	PYTHONWARNINGS="ignore:IProgress" $(BIN)/python -c "$$RUN_NOTEBOOKS" examples/*.ipynb

coverage: $(DEV)  ## Compare every architecture of transformers with its oracle; writes docs/coverage.md
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m eval.coverage --workers $(WORKERS) --markdown docs/coverage.md

cache-api: $(DEV)  ## Check every name of transformers' caches; writes docs/cache_api.md
	HF_HUB_OFFLINE=1 $(BIN)/python -m eval.cache_api --markdown docs/cache_api.md

clean:  ## Remove the environment, builds and caches of tools
	rm -rf $(VENV) .matrix .peers build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find hf_int8_paged kernels tests eval examples -name __pycache__ -prune -exec rm -rf {} +
	find hf_int8_paged kernels -name '*.so' -delete

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed, and $(PYTHON) is " + sys.version.split()[0] + "; name another one: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)

define OVERLAY
$(OVERLAYS)/$(1)-%: $$(DEV)
	rm -rf $$@
	$$(PIP) install -q --no-deps --target $$@ $(1)==$$*
	@touch $$@
endef
$(foreach package,transformers triton,$(eval $(call OVERLAY,$(package))))

# torch first and under the constraints: resolved with the rest, its newest release and all it brings might be fetched.
$(VENV)/.installed-%: $(SOURCES) | $(BIN)/python
	$(PIP) install -q -c constraints.txt torch
	$(PIP) install -q -c constraints.txt -e ".[$*]"
	@touch $@
