# Everything runs in .venv; nothing else on the machine is touched.
PYTHON ?= python3
PIP_ARGS ?=
BIN := .venv/bin
STAMPS := .venv/.stamps
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help demo test test-fleet test-crash test-arm64 lint format docs clean wheel wheelhouse deb test-deb release

help:  ## This list.
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(STAMPS)/train  ## Train, pack, apply, verify, infer on real digits; a fleet of three.
	$(BIN)/python -m tools.demo $(if $(KEEP),--keep)

test: $(STAMPS)/dev lint  ## Linter, type checker, tests.
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

test-fleet: $(STAMPS)/test-fleet  ## Fleets with real servers: SeaweedFS, nginx; fetches them.
	$(BIN)/python -m tools.parts
	$(BIN)/python -m pytest -m fleet

test-arm64: $(STAMPS)/train  ## The runtime on emulated aarch64; minutes, never in CI.
	$(BIN)/python -m tools.arm64.__main__

test-crash: $(STAMPS)/dev  ## Every crash state, SIGKILLs, full disks: minutes, with counts.
	$(BIN)/python -m tests.crash

lint: $(STAMPS)/dev  ## Linter and type checker alone.
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python -m tools.layers --check > /dev/null
	$(BIN)/python -m tools.code_lines --check

format: $(STAMPS)/dev  ## Sources in the project's form.
	$(BIN)/python -m tools.licence_line
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

docs: $(STAMPS)/docs  ## The site, in dist/docs; a warning is an error.
	$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going docs dist/docs

wheel: $(STAMPS)/pack  ## The wheel that devices install, in dist/.
	$(BIN)/python -m tools.wheels --ours

wheelhouse: $(STAMPS)/pack  ## All wheels of a 64-bit Pi without a network, in dist/.
	$(BIN)/python -m tools.wheels

deb: $(STAMPS)/pack  ## Debian packages of the runtime, arm64 and amd64, in dist/.
	$(BIN)/python -m tools.deb.__main__

test-deb: $(STAMPS)/train  ## The packages, really installed, on emulated arm64 too; minutes.
	$(BIN)/python -m tools.deb.try_out

release: $(STAMPS)/release  ## Source distribution and wheel in dist/, checked and installed.
	$(BIN)/python -m tools.release

clean:  ## Remove .venv and everything else that make has made.
	rm -rf .venv build demo dist *.egg-info .hypothesis .mypy_cache .ruff_cache .pytest_cache

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else 0'
	$(PYTHON) -m venv .venv

$(STAMPS)/%: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m tools.install $(PIP_ARGS) --constraint constraints.txt --editable '.[$*]'
	mkdir -p $(STAMPS) && touch $@
