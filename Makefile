# Two commands do everything on a fresh machine with Python >= 3.11 (with venv), g++ and make: `make demo` and `make test`.
# The others assume nothing more. PYTHON names the interpreter that creates .venv; FASTGEN_ISA_BUILD restricts the variants.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.complete

.PHONY: docs demo test test-slow lint bench bench-full gpu build setup wheel clean
.DEFAULT_GOAL := build

demo: build
	$(BIN)/fastgen demo --out demo

test: build lint
	FASTGEN_REQUIRE=cpu,triton $(BIN)/python -m pytest -m "not slow" --durations=10

test-slow: build
	FASTGEN_REQUIRE=cpu,triton $(BIN)/python -m pytest -m slow --durations=10

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: build
	$(BIN)/python -m benchmarks.run

bench-full: build
	$(BIN)/python -m benchmarks.run --full

# The pictures and tables of docs/samplers.md.
docs: build
	$(BIN)/python docs/make_parity_table.py
	$(BIN)/python docs/make_convergence_plot.py
	$(BIN)/python docs/make_solver_grid.py
	$(BIN)/python docs/make_score_pictures.py

# On a machine whose own python has torch and Triton, and perhaps no network: no .venv.
gpu:
	bash benchmarks/gpu.sh

build: setup
	@$(BIN)/python setup.py -q build_ext --inplace

wheel: setup
	$(BIN)/pip wheel -q --no-build-isolation --no-deps -w dist .

setup: $(STAMP)

$(STAMP): constraints.txt pyproject.toml
	@bash tools/check_machine.sh "$(PYTHON)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "fastgen: installing pinned dependencies into $(VENV) (a few minutes the first time)"
	@$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt torch setuptools wheel ninja pybind11
	@$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt --no-build-isolation -e ".[test,demo,bench]"
	@# a peer of the tests and benchmarks; its own dependencies pull another torch, and only its sampling.py is read
	@$(BIN)/pip install -q --disable-pip-version-check --no-deps k-diffusion==0.1.1.post1 || echo "fastgen: no k-diffusion: its tests are skipped"
	@touch $(STAMP)

clean:
	rm -rf build dist fastgen/lib fastgen/_cpu*.so *.egg-info
