#!/usr/bin/env bash
# The tests on Python 3.11 with JAX 0.10 and on Python 3.13 with JAX 0.12, in float32 and float64.
# PYTHON311 and PYTHON313 name the interpreters; each pair gets an environment of its own.
set -euo pipefail
cd "$(dirname "$0")/.."

find_python() {  # VERSION: an interpreter of that version, from PATH or pyenv
  for candidate in "python$1" "$HOME"/.pyenv/versions/"$1".*/bin/python; do
    if "$candidate" -c "import sys; sys.exit('%d.%d' % sys.version_info[:2] != '$1')" 2>/dev/null; then
      echo "$candidate"; return
    fi
  done
  echo "no Python $1 found: set PYTHON${1/./}" >&2; return 1
}

failed=0
for version in 3.11 3.13; do
  name="PYTHON${version/./}"
  python="${!name:-$(find_python "$version")}"
  venv=".venv-py$version"
  make PYTHON="$python" VENV="$venv" "$venv/.installed-test" >/dev/null
  "$venv/bin/python" -c "import sys, jax; print('== Python', sys.version.split()[0], 'JAX', jax.__version__)"
  for x64 in 1 0; do
    echo "-- TANGENTS_TEST_X64=$x64"
    TANGENTS_TEST_X64=$x64 "$venv/bin/python" -m pytest -m "not slow" -n "${PYTEST_WORKERS:-2}" tests \
      || failed=1
  done
done
exit $failed
