# Two commands for a newcomer, on a fresh machine with Python >= 3.11, pip and make (CPU only):
#
#   make demo    install into a virtual environment and complete Python code with the shipped model
#   make test    the same for the default test suite
#
# Further: make lint | format | test-gpu | wheel | clean. Every variable below can be set on the command line.

PYTHON ?= python3
VENV ?= .venv
# Extras beside [test], comma-separated: make test TEST_EXTRAS=parity,tpu
TEST_EXTRAS ?=
# Further requirements of the same installation: make test TEST_REQUIREMENTS="jax==0.11.2"
TEST_REQUIREMENTS ?=
# Test processes, each of which runs neighbouring tests; 1 runs the suite in one process.
WORKERS ?= 2
PYTEST_ARGS ?=

DEMO_PROMPT ?= def fibonacci(n):
DEMO_PLAN ?= exit_capped
DEMO_GENERATE ?= generate --plan $(DEMO_PLAN) --show depth --max-new-tokens 64 --prompt "$(DEMO_PROMPT)"
DEMO_COMPARE ?= compare --plans dense,$(DEMO_PLAN) --quick

BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check
CPU := JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1

# One stamp per set of requirements: asking for another set, or changing pyproject.toml, installs again.
empty :=
space := $(empty) $(empty)
comma := ,
dash = $(subst $(space),-,$(strip $(subst <,-,$(subst >,-,$(subst =,-,$(subst $(comma),-,$(1)))))))
test_extras := test$(if $(TEST_EXTRAS),$(comma)$(TEST_EXTRAS))
DEMO_STAMP := $(VENV)/.installed
TEST_STAMP := $(VENV)/.installed-$(call dash,$(test_extras) $(TEST_REQUIREMENTS))

.DEFAULT_GOAL := help
.PHONY: help demo test test-gpu lint format wheel clean

help:
	@sed -n 's/^# \{0,1\}//p' Makefile | sed -n '1,6p'

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; \
	  sys.exit(sys.version_info < (3, 11) and "expected Python >= 3.11, got %s; set PYTHON=/path/to/python3.11" % v)'
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(DEMO_STAMP): pyproject.toml $(VENV)/.created
	@echo "installing dyninf into $(VENV) (a few minutes the first time)"
	$(PIP_INSTALL) --editable .
	@touch $@

$(TEST_STAMP): pyproject.toml $(VENV)/.created
	@echo "installing dyninf[$(test_extras)] $(TEST_REQUIREMENTS) into $(VENV) (a few minutes the first time)"
	$(PIP_INSTALL) --editable ".[$(test_extras)]" $(foreach requirement,$(TEST_REQUIREMENTS),"$(requirement)")
	@rm -f $(VENV)/.installed-*
	@touch $(DEMO_STAMP) $@

demo: $(DEMO_STAMP)
	$(CPU) $(BIN)/dyninf $(DEMO_GENERATE)
	$(CPU) $(BIN)/dyninf $(DEMO_COMPARE)

test: $(TEST_STAMP)
	$(CPU) $(BIN)/python -m pytest $(if $(filter-out 1,$(WORKERS)),-n $(WORKERS) --dist worksteal) $(PYTEST_ARGS)

# On a machine with NVIDIA GPUs: make test-gpu TEST_EXTRAS=gpu
test-gpu: $(TEST_STAMP)
	JAX_PLATFORMS=cuda,cpu $(BIN)/python -m pytest -m "gpu or multigpu" $(PYTEST_ARGS)

lint: $(TEST_STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(TEST_STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# build/ is removed first: setuptools would pack stale files that it finds there.
wheel: $(TEST_STAMP)
	rm -rf build dist
	$(BIN)/python -m build --quiet --wheel .

clean:
	if test -f $(VENV)/pyvenv.cfg; then rm -rf $(VENV); fi
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './.*' -prune -exec rm -rf {} +
