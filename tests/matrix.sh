#!/usr/bin/env bash
# The everyday tests on other versions of Python and torch, each in an environment of its own: make test-matrix
# A version that is not here, or cannot be installed, is named and skipped. $1: only lines that hold this text.
set -uo pipefail
cd "$(dirname "$0")/.."
# Python, torch, torchvision, triton
MATRIX="3.12 2.13.0 0.28.0 3.7.1
3.13 2.13.0 0.28.0 3.7.1
3.11 2.11.0 0.26.0 3.6.0"
status=0
while read -r python torch torchvision triton; do
  name="Python $python, torch $torch"
  case "$name" in *"${1:-}"*) ;; *) continue ;; esac
  if ! "python$python" --version >/dev/null 2>&1; then
    echo "skipped: $name (no python$python here)"
    continue
  fi
  folder=".venv-matrix/$python-$torch"
  test -x "$folder/bin/python" || "python$python" -m venv "$folder"
  mkdir -p "$folder"
  sed -E "s/^(torch)==.*/\1==$torch/; s/^(torchvision)==.*/\1==$torchvision/; s/^(triton)==[^;]*/\1==$triton/" \
    requirements.txt requirements-dev.txt >"$folder/requirements.txt"
  if ! "$folder/bin/python" -m pip install --quiet --disable-pip-version-check -r "$folder/requirements.txt"; then
    echo "skipped: $name (pip cannot install it, see above)"
    continue
  fi
  if "$folder/bin/python" -m pytest -q --numprocesses auto --maxprocesses 4 --dist loadfile -m "not slow"; then
    echo "passed: $name"
  else
    echo "failed: $name"
    status=1
  fi
done <<<"$MATRIX"
exit $status
