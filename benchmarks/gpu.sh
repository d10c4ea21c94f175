#!/usr/bin/env bash
# `make gpu`: build, test and time on a machine with an NVIDIA GPU whose own python has torch >= 2.11 and Triton >= 3.6, and
# perhaps no network. Every stage has its own time limit and fails alone; all end within 9 minutes. Results: $OUT or out/gpu.
set -u
cd "$(dirname "$0")/.."
out=${OUT:-out/gpu}
python=${PYTHON:-python3}
mkdir -p "$out"
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
summary=$out/summary.txt
: >"$summary"

stage() { # stage NAME SECONDS COMMAND...
  local name=$1 limit=$2 begin=$SECONDS rc
  shift 2
  echo "== $name"
  timeout --kill-after=5 "$limit" "$@" >"$out/$name.log" 2>&1
  rc=$?
  printf '%-12s %-10s %4d s  %s\n' "$name" "$([ $rc = 0 ] && echo ok || echo "failed $rc")" $((SECONDS - begin)) \
    "$(grep -aE '[0-9]+ (passed|failed|skipped)|Error|error:' "$out/$name.log" | tail -1 | cut -c1-100)" >>"$summary"
}

stage machine 30 sh -c "nvidia-smi; $python -c 'import torch, triton; print(torch.__version__, triton.__version__)'; git rev-parse HEAD"
# Triton needs no build; without ninja or pybind11 the CPU side runs on the reference, and that is a line in the doctor.
stage build 120 env FASTGEN_CUDA=1 "$python" setup.py build_ext --inplace
stage doctor 30 "$python" -m fastgen.cli doctor
stage tests 180 "$python" -m pytest -q -m gpu tests/gpu -p no:cacheprovider
stage bench 170 "$python" -m benchmarks.run --device cuda --budget 150 --out "$out"

echo
cat "$summary"
[ -f "$out/report.md" ] && sed -n '1,40p' "$out/report.md"
exit 0
