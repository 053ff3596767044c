#!/bin/sh
# The whole gate in one script: `./check.sh` runs every step, `./check.sh lint types` the ones named.
# Steps: format, lint, types, spelling, tests (these run the snippets of the documentation too).
set -eu
cd "$(dirname "$0")"
PATH="$PWD/.venv/bin:$PATH"
export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

for step in ${*:-format lint types spelling tests}; do
  echo "== $step"
  case $step in
    format) ruff format --check . ;;
    lint) ruff check . ;;
    types) mypy ;;
    spelling) codespell ;;
    tests) python -m pytest -n 2 --dist worksteal ;;
    *) echo "check.sh: no step $step; steps are format, lint, types, spelling, tests" >&2; exit 2 ;;
  esac
done
