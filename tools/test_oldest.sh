#!/usr/bin/env bash
# The whole suite with the oldest supported torch, Triton and NumPy, against the wheel that the main environment builds.
# Usage: tools/test_oldest.sh PYTHON [pytest arguments]; needs .venv. The first time it fetches several GB of torch into .venv-oldest.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$1
shift
venv=$PWD/.venv-oldest
stage=$PWD/build/oldest
pip=("$venv/bin/python" -m pip -q --disable-pip-version-check)

if [ ! -f "$venv/.complete" ] || [ constraints-oldest.txt -nt "$venv/.complete" ]; then
  [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
  # the pins of constraints.txt, but where constraints-oldest.txt has its own
  pinned=$(sed -n 's/==.*/==/p' constraints-oldest.txt)
  { grep -vF "$pinned" constraints.txt; cat constraints-oldest.txt; } >"$venv/constraints.txt"
  echo "fastgen: installing the oldest supported set into $venv (several GB the first time)"
  "${pip[@]}" install -c "$venv/constraints.txt" torch triton numpy setuptools safetensors tqdm scipy \
    pytest pytest-benchmark pytest-xdist hypothesis diffusers scikit-learn matplotlib rich
  "${pip[@]}" install --no-deps -c "$venv/constraints.txt" k-diffusion
  touch "$venv/.complete"
fi

# The tests and what they read, without the package: so what they import is what the wheel installed.
rm -rf "$stage"
mkdir -p "$stage"
mkdir -p .cache
git ls-files --cached --others --exclude-standard | grep -v -e '^fastgen/' -e '^kernels/' | while read -r file; do
  [ ! -e "$file" ] || printf '%s\n' "$file"
done | tar -cf - -T - | tar -xf - -C "$stage"

.venv/bin/python -m pip wheel -q --no-build-isolation --no-deps -w "$stage/dist" .
"${pip[@]}" install --no-deps --force-reinstall "$stage"/dist/fastgen-*.whl
cd "$stage"
unset PYTHONPATH
FASTGEN_WHEEL=$(echo "$stage"/dist/fastgen-*.whl)
export FASTGEN_WHEEL FASTGEN_REQUIRE=cpu,triton,peers
ln -s ../../.cache .cache # the records of compiled kernels
exec "$venv/bin/python" -m pytest -n auto --maxprocesses=8 --dist=loadgroup "$@"
