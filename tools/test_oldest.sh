#!/usr/bin/env bash
# The whole suite with the oldest supported torch, Triton and NumPy, against the wheel that the main environment builds.
# Usage: tools/test_oldest.sh PYTHON [pytest arguments]; needs .venv. The first time it fetches several GB of torch into .venv-oldest.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$1
shift
venv=$PWD/.venv-oldest
stage=$PWD/build/oldest

# The tests and what they read, without the package: so what they import is what the wheel installed.
rm -rf "$stage"
mkdir -p "$stage" .cache
git ls-files --cached --others --exclude-standard | grep -v -e '^fastgen/' -e '^kernels/' | while read -r file; do
  [ ! -f "$file" ] || printf '%s\n' "$file"
done | tar -cf - -T - | tar -xf - -C "$stage"
ln -s ../../.cache "$stage/.cache" # the records of compiled kernels
.venv/bin/python -m pip wheel -q --no-build-isolation --no-deps -w "$stage/dist" .
wheel=$(echo "$stage"/dist/fastgen-*.whl)

pip=("$venv/bin/python" -m pip -q --disable-pip-version-check)
if [ ! -f "$venv/.complete" ] || [ constraints-oldest.txt -nt "$venv/.complete" ]; then
  if [ ! -x "$venv/bin/python" ]; then
    bash tools/check_machine.sh "$python" 16
    "$python" -m venv "$venv"
  fi
  # the pins of constraints.txt, but where constraints-oldest.txt has its own
  pinned=$(sed -n 's/==.*/==/p' constraints-oldest.txt)
  { grep -vF "$pinned" constraints.txt; cat constraints-oldest.txt; } >"$venv/constraints.txt"
  echo "fastgen: installing the oldest supported set into $venv (several GB the first time)"
  "${pip[@]}" install -c "$venv/constraints.txt" "$wheel[test,demo]"
  "${pip[@]}" install -c "$venv/constraints.txt" --no-deps k-diffusion torch-fidelity
  touch "$venv/.complete"
fi
"${pip[@]}" install --no-deps --force-reinstall "$wheel"

cd "$stage"
unset PYTHONPATH
export FASTGEN_WHEEL=$wheel FASTGEN_REQUIRE=cpu,triton,peers
exec "$venv/bin/python" -m pytest -n auto --maxprocesses=8 --dist=loadgroup "$@"
