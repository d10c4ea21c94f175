#!/usr/bin/env bash
# The suite in every environment that changes how results are rounded, one after the other. A bound that fails in one of them hangs
# on rounding: derive it from the conditioning, or from ulps. Usage: tools/test_environments.sh [pytest arguments]; needs .venv.
# Left out is what `make test` has shown and no environment changes: kernels that are compiled and not run, or run in NumPy by
# Triton's interpreter; packages; and for a variant of ours the tests marked `isa`, which `make test` runs for every variant, but
# for the reference only in part.
# Where ATen's kernels are others Inductor writes other code, and must not find in its cache what it wrote for this machine.
set -uo pipefail
cd "$(dirname "$0")/.."
environments=(
  "OMP_NUM_THREADS=1"
  "OMP_NUM_THREADS=2"
  "MKL_CBWR=COMPATIBLE"
  "ATEN_CPU_CAPABILITY=default TORCHINDUCTOR_CACHE_DIR=$PWD/.cache/inductor-default"
  "FASTGEN_ISA=portable"
  "FASTGEN_ISA=reference"
)
without=(--ignore=tests/kernels --ignore=tests/packaging --ignore=tests/test_isa.py)
failed=()
for environment in "${environments[@]}"; do
  required=cpu,triton,peers
  [ "$environment" != FASTGEN_ISA=reference ] || required=triton,peers
  marks=()
  [ "$environment" != FASTGEN_ISA=portable ] || marks=(-m "not isa")
  workers=auto # one a core; half of them where each has two threads
  [ "$environment" != OMP_NUM_THREADS=2 ] || workers=$((($(nproc) + 1) / 2))
  echo "fastgen: $environment"
  env $environment FASTGEN_REQUIRE=$required .venv/bin/python -m pytest -q -n $workers --maxprocesses=8 --dist=loadgroup \
    "${without[@]}" "${marks[@]}" "$@" || failed+=("$environment")
done
[ ${#failed[@]} -eq 0 ] || { echo "fastgen: red in ${failed[*]}" >&2; exit 1; }
