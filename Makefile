# Every target sets up its own environment first; the second call skips set-up.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
EXTRA ?= $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)
LOCK := requirements/$(EXTRA).lock
STAMP := .venv/.installed-$(EXTRA)
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: demo test test-serve check lint format lock clean env

demo: $(STAMP)  ## data -> SFT -> reward model -> PPO -> tests -> canary -> promoted policy, on this machine
	$(BIN)/seatrial run support_desk

test: $(STAMP)  ## everything that needs no GPU: unit, Ray and engine tests
	$(BIN)/python -m pytest -q -m "not idle and not engine" --ignore tests/integration --ignore tests/rl_actors/training
	$(BIN)/python -m pytest -q -m "not idle and not engine" tests/rl_actors/training  # apart: one process group each
	$(BIN)/python -m pytest -q -m engine --ignore tests/integration  # apart: vLLM takes the process group

test-serve: $(STAMP)  ## gateway and two engines on real Ray Serve, fail-back under load; wants an otherwise idle machine
	$(BIN)/python -m pytest -q -m idle
	$(BIN)/python -m pytest -q tests/integration

check: lint  ## lint, types, import contracts, fast tests, the numbers of the house
	$(BIN)/python -m pytest -q -m "not ray and not engine and not slow and not idle"
	$(BIN)/python -m tests.house

lint: $(STAMP)  ## ruff, pyright, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

env: $(STAMP)

# uv does not read pip's find-links; a CPU build of torch comes from there when it is set, else from uv's CPU backend.
$(STAMP): $(LOCK) pyproject.toml
	@command -v c++ >/dev/null || { echo "no C++ compiler: DeepSpeed builds a small operator at first use; install g++ (Debian: apt-get install g++)" >&2; exit 3; }
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if v in ((3, 11), (3, 12)) else f"Python {v[0]}.{v[1]} found; seatrial needs 3.11 or 3.12: set PYTHON=/path/to/python3.11")'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	@if [ -n "$${PIP_FIND_LINKS:-}" ]; then export UV_FIND_LINKS="$$PIP_FIND_LINKS"; backend=(); \
	elif [ $(EXTRA) = cpu ]; then backend=(--torch-backend=cpu); else backend=(); fi; \
	export VIRTUAL_ENV="$(CURDIR)/.venv"; \
	$(BIN)/uv pip install --quiet "$${backend[@]}" --no-deps -r $(LOCK); \
	$(BIN)/uv pip install --quiet --no-deps --no-build-isolation -e .
	@touch $@

lock: ## refresh both locks (needs uv on the path)
	uv pip compile -q --no-header --no-emit-find-links --no-emit-index-url --no-annotate --python-version 3.11 --python-platform linux --extra cpu --extra dev pyproject.toml -o requirements/cpu.lock
	sed -i 's/^\(torch==[0-9.]*\)+cpu/\1/' requirements/cpu.lock
	env -u UV_FIND_LINKS uv pip compile -q --no-header --no-emit-index-url --no-annotate --python-version 3.11 --python-platform x86_64-manylinux_2_35 --extra gpu --extra dev pyproject.toml -o requirements/gpu.lock

clean:
	rm -rf .venv .pytest_cache .ruff_cache build *.egg-info
