#!/usr/bin/env bash
# Runs a command in this project's Python environment, and makes that environment first where there is none.
#
#   tools/environment.sh [--checks] [COMMAND [ARGUMENT...]]
#
# Which interpreter, in this order:
#   1. $PYTHON, when torch and deepspeed can be imported there: used as it is, nothing is installed
#   2. the active virtual environment, likewise
#   3. .venv in the repository; made from $PYTHON, or else from the first Python 3.12 or 3.11 that runs
# The command finds that interpreter as $PYTHON and first on PATH. --checks adds the tools of `make checks` to .venv.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv="$root/.venv"
log="$root/.venv-install.log" # is there while an installation is under way, and after one that was cut short
extras=("data,plot,test")

say() { printf '%s\n' "$*" >&2; }
fail() { say "error: $*"; exit 2; }

trains() { # whether an interpreter has what training needs; looks without importing, so that it costs nothing
    "$1" -c 'import importlib.util as u, sys; sys.exit(not (u.find_spec("torch") and u.find_spec("deepspeed")))' \
        2>/dev/null
}

supported() { # whether a command really runs (a pyenv shim may not) and is Python 3.11 or 3.12
    "$1" -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' >/dev/null 2>&1
}

makes_environments() { "$1" -c 'import ensurepip, venv' >/dev/null 2>&1; }

describe() { # what an interpreter is, and what of the package's needs it lacks
    "$1" - "$root/pyproject.toml" <<'PY'
import importlib.metadata as metadata, re, sys, tomllib

def version(name):
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None

with open(sys.argv[1], "rb") as file:
    project = tomllib.load(file)["project"]
needs = [*project["dependencies"], *(need for extra in ("data", "plot", "test") for need in project["optional-dependencies"][extra])]
names = [re.split(r"[<>=!~]", need)[0] for need in needs]
missing = [name for name in names if version(name) is None]
versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "deepspeed"))
print(f"{sys.executable} (Python {sys.version.split()[0]}, {versions})", *(["without", ", ".join(missing)] if missing else []))
PY
}

base_interpreter() { # prints the Python that .venv is made from
    local candidate incomplete=""
    if [ -n "${PYTHON:-}" ]; then
        makes_environments "$PYTHON" || fail "PYTHON=$PYTHON lacks venv or ensurepip (Debian: apt install python3-venv)."
        echo "$PYTHON"
        return
    fi
    for candidate in python3.12 python3.11 python3 python \
        "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12*/bin/python3.12 \
        "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.11*/bin/python3.11; do
        supported "$candidate" || continue
        if makes_environments "$candidate"; then
            echo "$candidate"
            return
        fi
        incomplete="$candidate"
    done
    [ -z "$incomplete" ] || fail "$incomplete lacks venv or ensurepip; on Debian or Ubuntu: apt install python3-venv."
    fail "no Python 3.11 or 3.12 found on PATH or under pyenv. Install one (apt install python3.12 python3.12-venv," \
        "pyenv install 3.12, uv python install 3.12), or name it: PYTHON=/path/to/python3.12 make setup."
}

create_environment() {
    local base
    base=$(base_interpreter)
    say "making .venv from $base ($("$base" --version 2>&1))"
    touch "$log"
    "$base" -m venv --clear "$venv"
}

install_extras() { # $1: extras, separated by commas; costs nothing while their stamp holds what it was made from
    local stamp="$venv/.installed-$1" wanted
    wanted=$(cat "$root/pyproject.toml" "$root/constraints.txt" | cksum)
    if [ ! -f "$log" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
        return
    fi
    say "installing the package with its extras $1 (a minute or two, longer where torch must come from afar;" \
        "log: ${log#"$root"/})"
    if ! (cd "$root" && "$venv/bin/python" -m pip install --disable-pip-version-check -c constraints.txt -e ".[$1]") \
        >"$log" 2>&1; then
        tail -n 15 "$log" >&2
        fail "pip could not install; the whole log is $log. Run the same command again to start over."
    fi
    echo "$wanted" >"$stamp"
    rm -f "$log"
}

use_own_environment() {
    if [ -f "$log" ]; then
        say "the last installation was cut short: starting over"
        create_environment
    elif [ ! -d "$venv" ]; then
        create_environment
    elif ! compgen -G "$venv/.installed-*" >/dev/null; then
        trains "$venv/bin/python" || fail "$venv was not made by 'make setup' and holds no torch and deepspeed;" \
            "remove it and run the command again."
        say "using the .venv that is there and installing nothing: $(describe "$venv/bin/python")"
        return
    fi
    for extra in "${extras[@]}"; do
        install_extras "$extra"
    done
}

if [ "${1:-}" = --checks ]; then
    extras+=(checks)
    shift
fi

python="$venv/bin/python"
if [ -n "${PYTHON:-}" ]; then
    supported "$PYTHON" || fail "PYTHON=$PYTHON is not a Python 3.11 or 3.12 that runs; name another or unset it."
fi
if [ -n "${PYTHON:-}" ] && trains "$PYTHON"; then
    python=$("$PYTHON" -c 'import sys; print(sys.executable)')
    say "using PYTHON=$PYTHON and installing nothing: $(describe "$python")"
elif [ -n "${VIRTUAL_ENV:-}" ] && [ "$VIRTUAL_ENV" != "$venv" ] && trains "$VIRTUAL_ENV/bin/python"; then
    python="$VIRTUAL_ENV/bin/python"
    say "using the active virtual environment and installing nothing: $(describe "$python")"
else
    [ -z "${VIRTUAL_ENV:-}" ] || [ "$VIRTUAL_ENV" = "$venv" ] ||
        say "the active virtual environment $VIRTUAL_ENV has no torch and deepspeed: using .venv instead"
    use_own_environment
fi

if [ $# -eq 0 ]; then
    say "ready: $(describe "$python")"
    exit
fi
export PYTHON="$python"
PATH="$(dirname "$python"):$PATH"
export PATH
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" # where nothing is installed, the package is found here
exec "$@"
