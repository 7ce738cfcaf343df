# Every target makes .venv when it is missing; PYTHON is any Python >= 3.11.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Two processes share the tests out: tests of one group (a file, unless they say otherwise) stay in one process, whose
# fixtures then are made once. The app comes first, which waits more than it computes.
TESTS := -n 2 --dist loadgroup --no-loadscope-reorder \
         tests/app tests/newcomer tests/unit tests/property tests/contract tests/integration
export HF_HUB_OFFLINE ?= 1

.PHONY: demo test test-all test-real check benchmark docs wheels clean

$(VENV)/.installed: pyproject.toml packages/perdure-pocket/pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || (echo "perdure needs Python >= 3.11; try: make PYTHON=python3.12"; exit 1)
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/pip install --quiet --editable packages/perdure-pocket --editable ".[demo,peft]" --group dev
	touch $@

demo: $(VENV)/.installed
	$(BIN)/perdure demo

test: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "not slow" $(TESTS)

test-all: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/pytest $(TESTS)

test-real: $(VENV)/.installed
	$(BIN)/pytest tests/real

check: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# What a user installs: built, put into a venv that has the dependencies and nothing of this checkout, and used.
wheels: $(VENV)/.installed
	rm -rf dist build/fresh
	$(BIN)/pip install --quiet build
	$(BIN)/python -m build --outdir dist .
	$(BIN)/python -m build --outdir dist packages/perdure-pocket
	$(PYTHON) -m venv build/fresh
	build/fresh/bin/pip install --quiet --no-deps dist/*.whl
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > `echo build/fresh/lib/python3.*/site-packages`/dependencies.pth
	cd build/fresh && bin/perdure run --stream 'synthetic(tasks=2)' --backbone 'pocket()' --method ncm --out run && bin/perdure show run
	@cd build/fresh && bin/python -c 'import perdure, sys; sys.exit("fresh" not in perdure.__file__ and perdure.__file__)'

docs: $(VENV)/.installed
	$(BIN)/pip install --quiet mkdocs-material mkdocs-static-i18n
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) build dist site
