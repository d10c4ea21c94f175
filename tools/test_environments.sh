#!/usr/bin/env bash
# The suite in every environment that changes how results are rounded, one after the other. A bound that fails in one of them hangs
# on rounding: derive it from the conditioning, or from ulps. Usage: tools/test_environments.sh [pytest arguments]; needs .venv.
set -uo pipefail
cd "$(dirname "$0")/.."
environments=(
  "OMP_NUM_THREADS=1"
  "OMP_NUM_THREADS=2"
  "MKL_CBWR=COMPATIBLE"
  "ATEN_CPU_CAPABILITY=default"
  "FASTGEN_ISA=portable"
  "FASTGEN_ISA=reference"
)
failed=()
for environment in "${environments[@]}"; do
  required=cpu,triton,peers
  [ "$environment" != FASTGEN_ISA=reference ] || required=triton,peers
  echo "fastgen: $environment"
  env "$environment" FASTGEN_REQUIRE=$required .venv/bin/python -m pytest -q -n auto --maxprocesses=8 --dist=loadgroup "$@" \
    || failed+=("$environment")
done
[ ${#failed[@]} -eq 0 ] || { echo "fastgen: red in ${failed[*]}" >&2; exit 1; }
