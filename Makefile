# make quickstart   train, evaluate and question a small Cosmo, offline after installation
# make canary-demo  train and measure a small Canary, offline after installation
# make prost-demo   train and compare two small Prosts, offline after installation
# make co3-demo     make a small corpus from triples and train on it, offline after installation
# make prosocial-demo  build a small ProsocialDialog and train on it, offline after installation
# make test         lint and tests
# make test-all     the same with the tests that take longer (tests/thorough.txt)
# make test-slow    the proofs that take minutes: kills, cold starts under load, full disks
# make test-avx2    the tests as a processor without AVX-512 and AMX runs them
# make test-newest  train, plan, infer and the engine's tests on the newest JAX (needs Python 3.13)
# make test-clients real clients and a real model (llama.cpp) against the servers
# make docs         the website of the documentation, into site/; a broken link is an error
# make figures      the drawings of the documentation, from docs/figures/*.json
# make notebooks    run docs/notebooks and keep their outputs
# make types        mypy over the names that users import
# make release      source archive and wheel into dist/, checked and tested; uploads nothing
# make lock         resolve requirements.lock and those of clients, notebooks and publish (needs uv)
# make lock-newest  resolve requirements.newest.lock: the newest version of everything (needs uv)
#
# All but the locks install first, with uv if it is there, else with pip: into .venv; test-newest
# into .venv-newest, test-clients into .venv-clients; docs, types and release into .venv-publish.
# PYTHON=python3.12 make ... chooses the interpreter.

PYTHON ?= python3
PYTHON_NEWEST ?= python3.13
VENV ?= .venv
BIN := $(VENV)/bin
NEWEST := .venv-newest
CLIENTS := .venv-clients
PUBLISH := .venv-publish
UV := $(shell command -v uv 2>/dev/null)
EXTRAS := --extra seqio --extra plot --extra stats --extra co3 --extra blenderbot --extra serve --extra hub --extra dev
# The engine's tests of the network, losses, optimizer, generation and data. Not those of recorded
# numbers: training amplifies the rounding of another compiler beyond their bounds. tests/newest.py
# reads by SeqIO.
NEWEST_TESTS := $(patsubst %,tests/engine/test_engine_%.py,t5 losses optimizer rows sizing decoding)
# The tests of one file share its fixtures in one worker process. Files start in the order of
# tests/conftest.py, the slowest first.
PYTEST := -m pytest -n auto --dist loadfile --no-loadscope-reorder

# Every process would compile our sources anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help quickstart canary-demo prost-demo co3-demo prosocial-demo test test-all test-slow test-avx2 \
  test-newest test-clients figures notebooks docs types release lock lock-newest clean

# The first target, so that `make` alone changes nothing: it prints the head of this file.
help:
	@sed -n '/^$$/q; s/^# \{0,1\}//p' Makefile

quickstart: $(VENV)/.installed
	$(BIN)/python -m cosmo quickstart

canary-demo: $(VENV)/.installed
	$(BIN)/python -m canary demo

prost-demo: $(VENV)/.installed
	$(BIN)/python -m canary.prost demo

co3-demo: $(VENV)/.installed
	$(BIN)/python -m tools.co3_demo

prosocial-demo: $(VENV)/.installed
	$(BIN)/python -m tools.prosocial_demo

test: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python $(PYTEST)

test-all: $(VENV)/.installed
	$(BIN)/python $(PYTEST) -m "not slow"

# One process: these tests measure, kill and fill disks.
test-slow: $(VENV)/.installed
	$(BIN)/python -m pytest -m slow

test-avx2: $(VENV)/.installed
	XLA_FLAGS="$(XLA_FLAGS) --xla_cpu_max_isa=AVX2" ONEDNN_MAX_CPU_ISA=AVX2 \
	  MKL_ENABLE_INSTRUCTIONS=AVX2 CT2_FORCE_CPU_ISA=AVX2 $(BIN)/python $(PYTEST) -m "not slow"

test-newest: $(NEWEST)/.installed
	$(NEWEST)/bin/python -m tests.newest
	$(NEWEST)/bin/python $(PYTEST) $(NEWEST_TESTS)
	$(NEWEST)/bin/python -m pytest -m "not slow" -k 2x4 tests/engine/test_engine_partitioning.py

test-clients: $(VENV)/.installed $(CLIENTS)/.installed
	$(BIN)/python -m pytest -m slow tests/clients

figures: $(VENV)/.installed
	$(BIN)/python -m tools.docs_figures

notebooks: $(VENV)/.installed
	$(call pip_install,$(VENV),requirements.notebooks.lock)
	$(BIN)/python -m tools.notebooks

docs: $(VENV)/.installed $(PUBLISH)/.installed
	PROJECT_PYTHON=$(BIN)/python NO_MKDOCS_2_WARNING=1 $(PUBLISH)/bin/mkdocs build --strict --quiet
	@echo "site/index.html: $$(find site -name '*.html' | wc -l) pages"

types: $(VENV)/.installed $(PUBLISH)/.installed
	$(PUBLISH)/bin/mypy --python-executable $(BIN)/python

# The wheel is built from the source archive, so that both are known to be whole.
release: $(VENV)/.installed $(PUBLISH)/.installed
	rm -rf dist
	$(PUBLISH)/bin/python -m build --quiet
	$(PUBLISH)/bin/twine check --strict dist/*
	WHEEL=$$(ls $(CURDIR)/dist/*.whl) $(BIN)/python -m pytest -n 0 -m "" tests/test_wheel.py

# $(call pip_install,FOLDER,LOCK)
pip_install = $(if $(UV),$(UV) pip install --quiet --python $(1)/bin/python,$(1)/bin/python -m pip install --quiet --disable-pip-version-check) -r $(2)

# $(call install,FOLDER,PYTHON,LOCK). The project itself is run from its root, so only its
# requirements are installed. Pip says nothing for minutes, so a line counts the seconds.
define install
@$(2) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, $(2) is " + sys.version.split()[0] + ": PYTHON=python3.11 make ...")'
@echo "installing into $(1): about 90 packages, some minutes the first time"
$(if $(UV),$(UV) venv --quiet --allow-existing --python $(2) $(1),$(2) -m venv $(1))
@seconds=0; while sleep 10 >/dev/null 2>&1 && kill -0 $$$$ 2>/dev/null; do seconds=$$((seconds + 10)); echo "installing: $$seconds s"; done & beat=$$!; \
  $(call pip_install,$(1),$(3)); \
  status=$$?; kill $$beat; exit $$status
@touch $(1)/.installed
endef

$(VENV)/.installed: requirements.lock
	$(call install,$(VENV),$(PYTHON),$<)

$(NEWEST)/.installed: requirements.newest.lock
	$(call install,$(NEWEST),$(PYTHON_NEWEST),$<)

$(CLIENTS)/.installed: requirements.clients.lock
	$(call install,$(CLIENTS),$(PYTHON),$<)

$(PUBLISH)/.installed: requirements.publish.lock
	$(call install,$(PUBLISH),$(PYTHON),$<)

lock:
	@test -n "$(UV)" || { echo "make lock needs uv: pip install uv"; exit 1; }
	$(UV) pip compile pyproject.toml --universal --python-version 3.11 --quiet --no-header \
	  --no-annotate $(EXTRAS) --constraint requirements.constraints -o requirements.lock
	$(UV) pip compile requirements.clients.in --universal --python-version 3.11 --quiet \
	  --no-header --no-annotate -o requirements.clients.lock
	$(UV) pip compile requirements.notebooks.in --universal --python-version 3.11 --quiet \
	  --no-header --no-annotate --constraint requirements.lock -o requirements.notebooks.lock
	$(UV) pip compile requirements.publish.in --universal --python-version 3.11 --quiet \
	  --no-header --no-annotate -o requirements.publish.lock

lock-newest:
	@test -n "$(UV)" || { echo "make lock-newest needs uv: pip install uv"; exit 1; }
	$(UV) pip compile pyproject.toml --universal --python-version 3.13 --quiet --no-header \
	  --no-annotate --upgrade $(EXTRAS) -o requirements.newest.lock

clean:
	rm -rf $(VENV) $(NEWEST) $(CLIENTS) $(PUBLISH) runs site dist .pytest_cache .ruff_cache .mypy_cache
