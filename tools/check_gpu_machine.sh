#!/usr/bin/env bash
# What a machine with a GPU may lack for `make gpu`, each in one line that says what to install. It installs nothing: such a
# machine has a python of its own, with a torch that fits its driver, and perhaps no network. Usage: check_gpu_machine.sh PYTHON
set -u
python=$1
missing=0
need() { echo "fastgen: $1" >&2; missing=1; }

if ! command -v "$python" >/dev/null; then
  need "'$python' is not on PATH (PYTHON names another)"
  exit 1
fi
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || need "Python >= 3.11 is needed, '$python' is $("$python" -V 2>&1)"
# Triton compiles the start of each kernel with a C compiler and Python's header, at the first launch.
command -v "${CC:-gcc}" >/dev/null || need "no C compiler: '${CC:-gcc}' is not on PATH, and Triton needs one (Debian/Ubuntu: apt-get install gcc)"
header=$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["include"] + "/Python.h")' 2>/dev/null)
[ -f "$header" ] || need "Python.h is missing, and Triton needs it (Debian/Ubuntu: apt-get install python3-dev)"
for module in torch triton numpy safetensors tqdm pytest; do
  "$python" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$module') is None)" 2>/dev/null ||
    need "the Python package $module is missing ('$python' -m pip install $module)"
done
exit $missing
