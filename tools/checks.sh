#!/usr/bin/env bash
# Everything that a change must satisfy beside the tests. Runs all checks and tells at the end which ones failed.
# Called by `make checks`, inside tools/environment.sh; --write-docs writes the generated documents instead.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
python=${PYTHON:-python3}
bin=$(dirname "$python")
failed=()

check() { # NAME COMMAND...
    local name=$1 output
    shift
    if output=$("$@" 2>&1); then
        printf '  ok      %s\n' "$name"
    else
        printf '  FAILED  %s: %s\n%s\n' "$name" "$*" "$output"
        failed+=("$name")
    fi
}

if [ "${1:-}" = --write-docs ]; then
    "$python" tools/generate_flag_reference.py && exec "$python" tools/generate_layout_table.py
    exit
fi
mapfile -t scripts < <(git ls-files --cached --others --exclude-standard '*.sh' '*.sbatch' .ci/run)
check "style" "$bin/ruff" check .
check "format" "$bin/ruff" format --check .
check "types" "$bin/mypy"
check "floors" "$bin/lint-imports"
check "shell scripts" "$bin/shellcheck" "${scripts[@]}"
check "flag reference" "$python" tools/generate_flag_reference.py --check
check "table of layouts" "$python" tools/generate_layout_table.py --check
if [ "${#failed[@]}" -gt 0 ]; then
    echo "${#failed[@]} of the checks failed; ruff's are mended by: ruff check --fix . && ruff format ."
    exit 1
fi
