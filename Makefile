# Two commands do all: `make demo` and `make test`. Each makes .venv first where it is not there.
# PYTHON=python3.12 chooses an interpreter; EXTRAS=beam,cuda adds extras to the environment.

PYTHON ?= python3
EXTRAS ?=
VENV := .venv
BIN := $(VENV)/bin
comma := ,
extras := test,dev$(if $(EXTRAS),$(comma)$(EXTRAS))
# One stamp for each set of extras: asking for the same again costs nothing.
stamp := $(VENV)/.installed-$(subst $(comma),-,$(extras))

.PHONY: setup demo test lint bench clean

setup: $(stamp)

$(stamp): pyproject.toml requirements.txt
	@test -x $(BIN)/python || $(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if (3, 11) <= v[:2] < (3, 14) else f"albert_jax needs Python 3.11 to 3.13; $(PYTHON) is {v[0]}.{v[1]}. Try: make PYTHON=python3.12")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing albert_jax[$(extras)] into $(VENV) (a few minutes the first time)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	@# Of twenty thousand modules most are never imported; the others are compiled when they are.
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -e '.[$(extras)]'
	@touch $@

demo: setup
	@$(BIN)/python -m albert_jax.demo

test: setup
	@$(BIN)/python -m pytest -n 2 --dist=loadfile --no-loadscope-reorder

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/pyright

bench: setup
	@$(BIN)/python benchmarks/prepare_speed.py --copies=10
	@$(BIN)/python benchmarks/batch_builder.py
	@$(BIN)/python benchmarks/step_vs_pytorch.py

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache
