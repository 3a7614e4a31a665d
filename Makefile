# make quickstart   train, evaluate and question a small Cosmo, offline after installation
# make canary-demo  train and measure a small Canary, offline after installation
# make co3-demo     make a small corpus from triples and train on it, offline after installation
# make test         lint and tests
# make lock         resolve requirements.lock anew from pyproject.toml (needs uv)
#
# All but lock install into .venv first, with uv if it is there, else with pip. PYTHON=python3.12 make ...
# chooses the interpreter.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
UV := $(shell command -v uv 2>/dev/null)

.PHONY: quickstart canary-demo co3-demo test lock clean

quickstart: $(VENV)/.installed
	$(BIN)/python -m tools.quickstart

canary-demo: $(VENV)/.installed
	$(BIN)/python -m canary demo

co3-demo: $(VENV)/.installed
	$(BIN)/python -m tools.co3_demo

test: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest

# The project itself is run from its root, so only its requirements are installed.
$(VENV)/.installed: requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, $(PYTHON) is " + sys.version.split()[0] + ": PYTHON=python3.11 make ...")'
	@echo "installing into $(VENV): about 90 packages, some minutes the first time"
ifdef UV
	$(UV) venv --quiet --allow-existing --python $(PYTHON) $(VENV)
	$(UV) pip install --quiet --python $(BIN)/python -r requirements.lock
else
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
endif
	@touch $@

lock:
	@test -n "$(UV)" || { echo "make lock needs uv: pip install uv"; exit 1; }
	$(UV) pip compile pyproject.toml --universal --python-version 3.11 --quiet --no-header \
	  --no-annotate --extra seqio --extra plot --extra stats --extra co3 --extra dev \
	  --constraint requirements.constraints -o requirements.lock

clean:
	rm -rf $(VENV) runs .pytest_cache .ruff_cache
