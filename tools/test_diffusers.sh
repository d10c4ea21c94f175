#!/usr/bin/env bash
# diffusers' own tests of schedulers and of models, as they are and with fastgen inside: the stand-ins in its namespace, and every
# model accelerated when it is first called. A test that passes untouched passes then too. The checkout's tests run against the
# diffusers that they import: an installed one, or their own in src. Usage: tools/test_diffusers.sh CHECKOUT [pytest arguments];
# PYTHON names another interpreter than .venv's; what a test downloads is left out.
set -uo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
[ -d "${1:-}/tests/schedulers" ] || { echo "fastgen: usage: $0 CHECKOUT, a checkout of diffusers with its tests/schedulers" >&2; exit 2; }
checkout=$(cd "$1" && pwd)
shift
python=${PYTHON:-$root/.venv/bin/python}
results=$root/build/diffusers
vae=tests/models/autoencoders/test_models
schedulers=(tests/schedulers)
models=(tests/models/unets "$vae"_autoencoder_kl.py "$vae"_asymmetric_autoencoder_kl.py "$vae"_autoencoder_kl_temporal_decoder.py "$vae"_vq.py)
mkdir -p "$results"

run() { # NAME, pytest arguments
  local name=$1
  shift
  rm -f "$results/$name.xml"
  (cd "$checkout" && HF_HUB_OFFLINE=1 PYTHONPATH="$root:$root/tools${PYTHONPATH:+:$PYTHONPATH}" "$python" -m pytest \
    -q -p no:cacheprovider --junitxml="$results/$name.xml" "$@") >"$results/$name.log" 2>&1
  [ -s "$results/$name.xml" ] || { tail -20 "$results/$name.log" >&2; echo "fastgen: the tests did not run" >&2; exit 1; }
}

red=0
run schedulers "${schedulers[@]}" "$@"
run schedulers-swapped "${schedulers[@]}" -p diffusers_stand_ins "$@"
"$python" "$root/tools/compare_junit.py" "$results/schedulers.xml" "$results/schedulers-swapped.xml" || red=1
run models "${models[@]}" "$@"
run models-accelerated "${models[@]}" -p diffusers_accelerated "$@"
"$python" "$root/tools/compare_junit.py" "$results/models.xml" "$results/models-accelerated.xml" || red=1
exit $red
