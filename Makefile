# `make demo` runs the main job, `make test` the checks; each sets up .venv by itself when it has to.
#   make docs                 the documentation as a site, in site/
#   make audit                known vulnerabilities and a list of what is installed, in build/audit/
#   make install              set up .venv alone
#   make test PYTEST_ARGS=…   pytest arguments in place of -n 2 …, for example PYTEST_ARGS='-k prune -x'
#   make demo PYTHON=…        the Python 3.11 or newer that .venv is made from

PYTHON ?= python3
PYTEST_ARGS ?= -n 2 --dist worksteal
VENV_PYTHON := .venv/bin/python
PIP_INSTALL := $(VENV_PYTHON) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

# Compiling all of torch and transformers to bytecode takes longer than the rest of the installation,
# so only what is imported is compiled, on first import, and kept even where the environment says not to.
export PIP_COMPILE := 0
export PYTHONDONTWRITEBYTECODE :=

.PHONY: audit install demo docs test tests types

install: .venv/installed

demo: .venv/installed
	.venv/bin/prunelens demo

docs: .venv/installed-dev
	NO_MKDOCS_2_WARNING=1 $(VENV_PYTHON) -m mkdocs build --strict

test: .venv/installed-dev
	$(VENV_PYTHON) -m ruff check .
	$(VENV_PYTHON) -m ruff format --check .
	@$(MAKE) --no-print-directory --jobs 2 types tests

# Beside each other: tests wait for processes and signals now and then.
types:
	$(VENV_PYTHON) -m mypy
	.venv/bin/lint-imports

tests:
	$(VENV_PYTHON) -m pytest $(PYTEST_ARGS)

audit: .venv/installed-dev
	$(VENV_PYTHON) tools/audit.py

# The stamp is written last, so that an interrupted installation is repeated.
# torch goes first: which build (CPU or CUDA) is the index's choice, and the rest is resolved against it.
.venv/installed: constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "prunelens needs Python 3.11 or newer; name one: make PYTHON=python3.12 install" >&2; exit 1; }
	@$(VENV_PYTHON) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	@echo "Installing into .venv (a minute or two)"
	$(PIP_INSTALL) torch==2.13.0
	$(PIP_INSTALL) --editable .
	$(VENV_PYTHON) -c 'import pandas, matplotlib.pyplot; from transformers import LlamaForCausalLM'
	@touch $@

.venv/installed-dev: .venv/installed
	$(PIP_INSTALL) --editable '.[dev]'
	@touch $@
