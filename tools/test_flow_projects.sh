#!/usr/bin/env bash
# The own tests of nflows, normflows, zuko and FrEIA, as they are and with every layer accelerated when it is first called. A test that
# passes untouched passes then too. The checkouts' own sources are tested. Usage: tools/test_flow_projects.sh FOLDER [pytest arguments],
# FOLDER with checkouts named nflows, normalizing-flows, zuko and FrEIA, of which any may be missing; PYTHON names another interpreter
# than .venv's, in which there is what their tests import (nflows': torchtestcase).
set -uo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
[ -d "${1:-}" ] || { echo "fastgen: usage: $0 FOLDER, with checkouts of nflows, normalizing-flows, zuko and FrEIA" >&2; exit 2; }
checkouts=$(cd "$1" && pwd)
shift
python=${PYTHON:-$root/.venv/bin/python}
results=$root/build/flow_projects
mkdir -p "$results"

run() { # NAME, checkout, library, pytest arguments
  local name=$1 checkout=$2 library=$3
  shift 3
  rm -f "$results/$name.xml"
  (cd "$checkout" && FASTGEN_FLOWS=$library PYTHONPATH="$checkout:$root:$root/tools${PYTHONPATH:+:$PYTHONPATH}" "$python" -m pytest \
    -q -W ignore -p no:cacheprovider --junitxml="$results/$name.xml" "$@") >"$results/$name.log" 2>&1
  [ -s "$results/$name.xml" ] || { tail -20 "$results/$name.log" >&2; echo "fastgen: the tests of $library did not run" >&2; exit 1; }
}

red=0 found=0
while read -r folder library tests; do
  [ -d "$checkouts/$folder" ] || { echo "fastgen: no $folder in $checkouts"; continue; }
  found=1
  run "$library" "$checkouts/$folder" "$library" "$tests" -o python_files='*_test.py test_*.py' "$@"
  run "$library-accelerated" "$checkouts/$folder" "$library" "$tests" -o python_files='*_test.py test_*.py' -p flows_accelerated "$@"
  "$python" "$root/tools/compare_junit.py" "$results/$library.xml" "$results/$library-accelerated.xml" || red=1
done <<'PROJECTS'
nflows nflows tests
normalizing-flows normflows normflows
zuko zuko tests
FrEIA FrEIA tests
PROJECTS
[ $found = 1 ] || red=1
exit $red
