#!/usr/bin/env bash
# Runs the test suite on the CPU; arguments go to pytest. Called by `make test`, inside tools/environment.sh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}

"$python" -c 'import pytest' 2>/dev/null || {
    echo "error: $python has no pytest. Install it there (pip install -e '.[test]'), or unset PYTHON for the .venv." >&2
    exit 2
}
# Each test process computes on one thread, and tests of several ranks start processes of their own: more workers than
# cores would only make them wait for each other.
workers=()
if "$python" -c 'import xdist' 2>/dev/null; then
    cores=$(nproc)
    workers=(-n "$((cores > 8 ? 8 : cores))")
else
    echo "pytest-xdist is not there: the tests run one after the other" >&2
fi
exec "$python" -m pytest "${workers[@]}" "$@"
