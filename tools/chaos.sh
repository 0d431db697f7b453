#!/usr/bin/env bash
# Kills runs and resumes them; arguments go to tests/faults/chaos.py. Called by `make chaos`, inside tools/environment.sh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec "${PYTHON:-python3}" tests/faults/chaos.py --kills 200 "$@"
