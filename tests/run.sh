#!/usr/bin/env bash
# Sets up everything that is needed, then checks style, types and tests. Arguments go to pytest:
#
#   bash tests/run.sh                          everything
#   bash tests/run.sh -m "not slow" tests/unit    less of the tests
#
# Every stage runs, whatever became of the one before. VENV and PYTHON: see scripts/setup_environment.sh.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/../scripts/setup_environment.sh"
setup_environment dev

# Threads cost more than they bring to models this small.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

failed=""

run_stage() {
    local name=$1
    shift
    printf '\n== %s: %s\n' "$name" "$*"
    "$@" || failed="$failed $name"
}

# The tests that need them say so themselves, and are skipped where this stage fails.
lowest=$VENV/lowest-versions
run_stage lowest-versions bash scripts/install_lowest_versions.sh "$lowest"
if [ -e "$lowest/installed-wheels" ]; then
    export MPFORMER_LOWEST_VERSIONS=$lowest
fi
run_stage style ruff check .
run_stage format ruff format --check .
run_stage types mypy
# Two at a time: each uses one thread.
run_stage tests python -m pytest --numprocesses 2 --durations=15 -m "not proof" "$@"

echo
if [ -n "$failed" ]; then
    echo "Failed:$failed" >&2
    exit 1
fi
echo "Style, format, types and tests are in order."
