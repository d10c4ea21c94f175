# Two commands do everything on a fresh machine with Python >= 3.11 (with venv), g++ and make: `make demo` and `make test`.
# The others assume nothing more. PYTHON names the interpreter that creates .venv; FASTGEN_ISA_BUILD restricts the variants.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.complete
# One worker a core; loadgroup hands each one test at a time, so that those that start first because they take long are spread.
# What one process has compiled of the tests the others find, whatever the shell says of bytecode.
PYTEST := PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n auto --maxprocesses=8 --dist=loadgroup

.PHONY: docs demo test test-oldest test-environments test-diffusers test-flow-projects lint bench bench-full gpu build setup peers wheel clean
.DEFAULT_GOAL := build

demo: build
	$(BIN)/fastgen demo --out demo
	$(BIN)/fastgen demo accelerate --out demo
	$(BIN)/fastgen demo pixelcnn --out demo
	$(BIN)/fastgen demo flows --out demo

test: build peers lint
	FASTGEN_REQUIRE=cpu,triton,peers $(PYTEST) -m "not slow" --durations=15

# The same suite with the oldest torch, Triton and NumPy that fastgen promises, against the wheel installed beside them.
test-oldest: build
	bash tools/test_oldest.sh "$(PYTHON)"

# The suite again where arithmetic rounds otherwise: other BLAS and ATen kernels, other thread counts, other variants of ours.
test-environments: build peers
	bash tools/test_environments.sh

# diffusers' own tests of schedulers and models, without fastgen and with it: `make test-diffusers DIFFUSERS=path/to/checkout`.
test-diffusers: build
	bash tools/test_diffusers.sh "$(DIFFUSERS)"

# The own tests of nflows, normflows, zuko and FrEIA, without fastgen and with it: `make test-flow-projects FLOWS=folder/of/checkouts`.
test-flow-projects: build
	bash tools/test_flow_projects.sh "$(FLOWS)"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: build
	-@$(MAKE) -s peers
	$(BIN)/python -m benchmarks.run

bench-full: build
	-@$(MAKE) -s peers
	$(BIN)/python -m benchmarks.run --full

# The pictures and tables of the documents; rooflines and profile are measured, so on a machine that does nothing else.
docs: build
	$(BIN)/python docs/make_accelerate_report.py
	$(BIN)/python docs/make_parity_table.py
	$(BIN)/python docs/make_convergence_plot.py
	$(BIN)/python docs/make_solver_grid.py
	$(BIN)/python docs/make_score_pictures.py
	$(BIN)/python docs/make_rooflines.py
	$(BIN)/python docs/make_unet_profile.py
	$(BIN)/python docs/make_pixelcnn_time.py
	$(BIN)/python docs/make_flow_pictures.py

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
	@touch $(STAMP)

# The peers that have no place among the extras: their own dependencies pull another torch, and only some of their files are read.
# Without it there is nothing to compare with: tests fail here, benchmarks leave its cases out.
peers: setup
	@$(BIN)/python -c "import sys; from tests import peers; sys.exit(bool(peers.missing()))" \
	|| $(BIN)/pip install -q --disable-pip-version-check --no-deps -c constraints.txt k-diffusion torch-fidelity \
	|| { echo "fastgen: k-diffusion and torch-fidelity cannot be installed; the tests compare with them" >&2; exit 1; }

clean:
	rm -rf build dist fastgen/lib fastgen/_cpu*.so *.egg-info .cache
