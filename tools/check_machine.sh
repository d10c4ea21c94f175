#!/usr/bin/env bash
# What a fresh machine may lack, each in one line that says what to install. Usage: check_machine.sh PYTHON
set -u
python=$1
need() { echo "fastgen: $1" >&2; exit 1; }

command -v "$python" >/dev/null || need "'$python' is not on PATH (Debian/Ubuntu: apt-get install python3)"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || need "Python >= 3.11 is needed, '$python' is $("$python" -V)"
"$python" -c 'import venv, ensurepip' 2>/dev/null || need "the venv module is missing (Debian/Ubuntu: apt-get install python3-venv)"
command -v "${CXX:-g++}" >/dev/null || need "no C++ compiler: '${CXX:-g++}' is not on PATH (Debian/Ubuntu: apt-get install g++)"
header=$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["include"] + "/Python.h")')
[ -f "$header" ] || need "Python.h is missing (Debian/Ubuntu: apt-get install python3-dev)"
free=$(df -Pk . | awk 'NR == 2 { print int($4 / 1024) }')
[ "$free" -ge 4096 ] || need "4 GiB of free disk are needed for .venv and the build, $free MiB are free"
