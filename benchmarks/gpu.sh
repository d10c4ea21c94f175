#!/usr/bin/env bash
# `make gpu`: build, test and time on a machine with an NVIDIA GPU whose own python has torch >= 2.11 and Triton >= 3.6, and
# perhaps no network. Every stage has its own time limit and fails alone; all end within 9 minutes. Results: $OUT or out/gpu.
set -u
cd "$(dirname "$0")/.."
out=${OUT:-out/gpu}
python=${PYTHON:-python3}
mkdir -p "$out"
rm -f "$out"/{*.log,*.xml,summary.txt,*.json,report.md,*.png}
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
summary=$out/summary.txt
last=520 # seconds after which nothing runs any more

# stage NAME SECONDS COMMAND...: runs it with its output in NAME.log, adds a line to the summary, returns its exit status
stage() {
  local name=$1 limit=$2 begin=$SECONDS rc verdict
  shift 2
  [ $((begin + limit)) -gt $last ] && limit=$((last - begin))
  if [ "$limit" -lt 5 ]; then
    printf '%-13s %-9s no time was left\n' "$name" skipped >>"$summary"
    return 1
  fi
  echo "== $name (at most $limit s)"
  timeout --kill-after=5 "$limit" "$@" >"$out/$name.log" 2>&1
  rc=$?
  case $rc in
    0) verdict=ok ;;
    124 | 137) verdict=timeout ;;
    *) verdict="failed $rc" ;;
  esac
  printf '%-13s %-9s %4d s  %s\n' "$name" "$verdict" $((SECONDS - begin)) \
    "$(grep -aE '[0-9]+ (passed|failed|skipped|error)|Error|error:|^fastgen:|^benchmarks:|^machine:' "$out/$name.log" | tail -1 | cut -c1-110)" \
    >>"$summary"
  return $rc
}

describe='
import torch, triton
name = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU that torch sees"
print(f"machine: {name}, torch {torch.__version__}, triton {triton.__version__}")
'
stage machine 40 "$python" -c "$describe"
(nvidia-smi; git rev-parse HEAD; git status --short) >"$out/machine-details.log" 2>&1

# Only this GPU's architecture: an older nvcc may not know the newest of the default list. Triton itself needs no build, and
# where there is no nvcc, or it fails, the CPU libraries are built alone.
arch=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())' 2>/dev/null)
[ -n "$arch" ] && export FASTGEN_CUDA_ARCHS=${FASTGEN_CUDA_ARCHS:-$arch}
stage build 100 "$python" setup.py -q build_ext --inplace ||
  stage build-no-cuda 60 env FASTGEN_CUDA=0 "$python" setup.py -q build_ext --inplace
stage doctor 25 "$python" -m fastgen doctor

# Most of the time of these is Triton compiling on one core, so the two files run side by side.
pytest=("$python" -m pytest -q -m gpu -p no:cacheprovider --durations=5)
stage test-ops 200 "${pytest[@]}" --junitxml="$out/test-ops.xml" tests/gpu/test_ops.py &
stage test-kernels 200 "${pytest[@]}" --junitxml="$out/test-kernels.xml" tests/gpu/test_kernels.py &
wait

left=$((last - SECONDS))
[ $left -gt 190 ] && left=190
stage bench $left "$python" -m benchmarks.run --device cuda --deadline $((left - 25)) --out "$out"

echo
[ -f "$out/report.md" ] && sed -n '/^## Geometric means/,/^## Targets/p' "$out/report.md" | grep '^|'
echo
cat "$summary"
echo "everything is in $out/ ($SECONDS s)"
exit 0
