#!/usr/bin/env bash
# diffusers' own scheduler tests, as they are and with the stand-ins in diffusers' namespace: a test that passes untouched passes then
# too. The checkout's tests run against the diffusers that is installed. Usage: tools/test_diffusers.sh CHECKOUT [pytest arguments];
# PYTHON names another interpreter than .venv's.
set -uo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
[ -d "${1:-}/tests/schedulers" ] || { echo "fastgen: usage: $0 CHECKOUT, a checkout of diffusers with its tests/schedulers" >&2; exit 2; }
checkout=$(cd "$1" && pwd)
shift
python=${PYTHON:-$root/.venv/bin/python}
results=$root/build/diffusers
mkdir -p "$results"

run() { # NAME [pytest arguments]
  local name=$1
  shift
  rm -f "$results/$name.xml"
  (cd "$checkout" && PYTHONPATH="$root:$root/tools${PYTHONPATH:+:$PYTHONPATH}" "$python" -m pytest tests/schedulers \
    -q -p no:cacheprovider --junitxml="$results/$name.xml" "$@") >"$results/$name.log" 2>&1
  [ -s "$results/$name.xml" ] || { tail -20 "$results/$name.log" >&2; echo "fastgen: the tests did not run" >&2; exit 1; }
}

run untouched "$@"
run swapped -p diffusers_stand_ins "$@"
exec "$python" "$root/tools/compare_junit.py" "$results/untouched.xml" "$results/swapped.xml"
