#!/usr/bin/env bash
# Lint, types, architecture and tests: what must hold before a commit. Takes the tools from PATH.
set -euo pipefail
cd "$(dirname "$0")/.."
ruff check .
ruff format --check .
mypy
# Two test processes with one torch thread each: two threads each would spin and starve on two cores.
OMP_NUM_THREADS=1 python -m pytest -n 2 "$@"
