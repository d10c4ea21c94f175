#!/usr/bin/env bash
# `make gpu`: build, test and time on a machine with an NVIDIA GPU whose own python has torch >= 2.11 and Triton >= 3.6, and
# perhaps no network. First what is missing, a line each; then every stage has its own time limit and fails alone, and all end
# within 9 minutes. Results: $OUT or out/gpu. PYTHON names the interpreter.
set -u
cd "$(dirname "$0")/.." || exit 1
out=${OUT:-out/gpu}
python=${PYTHON:-python3}
bash tools/check_gpu_machine.sh "$python" || exit 1

mkdir -p "$out"
rm -rf "$out"/*.log "$out"/*.xml "$out"/summary.txt "$out"/bench
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
summary=$out/summary.txt
last=520 # seconds after which nothing runs any more

# stage NAME SECONDS COMMAND...: runs it with its output in NAME.log, adds a line to the summary, returns its exit status
stage() {
  local name=$1 limit=$2 begin=$SECONDS rc verdict
  shift 2
  [ $((begin + limit)) -gt $last ] && limit=$((last - begin))
  if [ "$limit" -lt 5 ]; then
    printf '%-17s %-9s no time was left\n' "$name" skipped >>"$summary"
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
  printf '%-17s %-9s %4d s  %s\n' "$name" "$verdict" $((SECONDS - begin)) \
    "$(grep -aE '[0-9]+ (passed|failed|skipped|error)|Error|error:|^fastgen:|^benchmarks:|^machine:' "$out/$name.log" | tail -1 | cut -c1-110)" \
    >>"$summary"
  return $rc
}

has() { "$python" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)"; }

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

# Most of the time of the tests is Triton compiling on one core each: shared out over the cores, by pytest-xdist or file by file.
# A test that is skipped for want of a GPU or Triton would be a green run that tested nothing: it fails.
export FASTGEN_REQUIRE=cuda,triton
pytest=("$python" -m pytest -q -m gpu -p no:cacheprovider --durations=5)
cores=$(nproc)
if has xdist; then
  stage test 230 "${pytest[@]}" -n $((cores < 12 ? cores : 12)) --dist worksteal --junitxml="$out/test.xml" tests/gpu
else
  for file in tests/gpu/test_*.py; do
    name=$(basename "$file" .py | tr _ -)
    stage "$name" 230 "${pytest[@]}" --junitxml="$out/$name.xml" "$file" &
  done
  wait
fi

# group_norm comes first; each case is saved when it is done, with its time on the device (replayed graphs) and on the host.
# The report is made of what is there.
left=$((last - SECONDS))
stage bench $left "$python" -m benchmarks.run --device cuda --deadline $((left - 25)) --out "$out/bench" --allow-dirty

echo
[ -f "$out/doctor.log" ] && cat "$out/doctor.log"
echo
[ -f "$out/bench.log" ] && tail -n 40 "$out/bench.log"
echo
cat "$summary"
echo "everything is in $out/ ($SECONDS s)"
exit 0
