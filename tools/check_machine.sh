#!/usr/bin/env bash
# What a fresh machine may lack, each in one line that says what to install. Usage: check_machine.sh PYTHON [GIB of free disk]
set -u
python=$1
space=${2:-4}
missing=0
need() { echo "fastgen: $1" >&2; missing=1; }

if ! command -v "$python" >/dev/null; then
  need "'$python' is not on PATH (Debian/Ubuntu: apt-get install python3)"
elif ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  need "Python >= 3.11 is needed, '$python' is $("$python" -V 2>&1)"
else
  "$python" -c 'import venv, ensurepip' 2>/dev/null || need "the venv module is missing (Debian/Ubuntu: apt-get install python3-venv)"
  header=$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["include"] + "/Python.h")')
  [ -f "$header" ] || need "Python.h is missing (Debian/Ubuntu: apt-get install python3-dev)"
fi
compiler=${CXX:-g++}
command -v ${compiler%% *} >/dev/null || need "no C++ compiler: '$compiler' is not on PATH (Debian/Ubuntu: apt-get install g++)"
free=$(df -Pk . | awk 'NR == 2 { print int($4 / 1024 / 1024) }')
[ "$free" -ge "$space" ] || need "$space GiB of free disk are needed here, $free GiB are free"
exit $missing
