"""tools/environment.sh: which interpreter it takes, and that an installation is made once and whole.

The interpreters here are small shell scripts that answer as a Python would; nothing is installed.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

STUB = """#!/bin/bash
# Answers what tools/environment.sh asks of a Python.
case "$*" in
    *find_spec*) exit {trains} ;;
    *version_info*) exit {supported} ;;
    *"import ensurepip"*) exit 0 ;;
    *sys.executable*) echo "$0" ;;
    --version) echo "Python stub" ;;
    "-m venv --clear "*) rm -rf "${{@: -1}}"; mkdir -p "${{@: -1}}/bin"; cp "$0" "${{@: -1}}/bin/python" ;;
    "-m pip "*) echo "$*" >>"{calls}"; exit "$(cat "{calls}.exit" 2>/dev/null || echo 0)" ;;
    *) echo "described" ;;
esac
"""
PYENV_SHIM = "#!/bin/bash\necho 'pyenv: command not found' >&2\nexit 127\n"


class Machine:
    """A checkout and a PATH with chosen interpreters."""

    def __init__(self, folder: Path) -> None:
        self.root, self.bin, self.calls = folder / "checkout", folder / "bin", folder / "pip-calls"
        (self.root / "tools").mkdir(parents=True)
        self.bin.mkdir()
        for name in ("tools/environment.sh", "pyproject.toml", "constraints.txt"):
            shutil.copy(ROOT / name, self.root / name)
        for name in ("bash", "dirname", "cat", "cksum", "rm", "mkdir", "cp", "touch", "tail", "env"):
            (self.bin / name).symlink_to(shutil.which(name))

    def add_python(self, path: Path, *, trains: bool = False, supported: bool = True) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(STUB.format(trains=int(not trains), supported=int(not supported), calls=self.calls))
        path.chmod(0o755)
        return path

    def run(self, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(self.root / "tools/environment.sh"), *words],
            env={"PATH": str(self.bin), "HOME": str(self.root)} | variables,
            capture_output=True,
            text=True,
            check=False,
            timeout=30,
        )

    def installations(self) -> int:
        return len(self.calls.read_text().splitlines()) if self.calls.exists() else 0


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


def test_environment_is_made_from_the_first_python_that_runs(machine):
    shim = machine.bin / "python3.12"
    shim.write_text(PYENV_SHIM)
    shim.chmod(0o755)
    machine.add_python(machine.bin / "python3.11")
    result = machine.run()
    assert result.returncode == 0, result.stderr
    assert "making .venv from python3.11" in result.stderr
    assert "-c constraints.txt -e .[data,plot,test]" in machine.calls.read_text()


def test_second_run_installs_nothing(machine):
    machine.add_python(machine.bin / "python3.12")
    machine.run()
    result = machine.run("bash", "-c", 'echo "$PYTHON"')
    assert machine.installations() == 1
    assert result.stdout.strip() == str(machine.root / ".venv/bin/python")


def test_changed_pins_are_installed_again(machine):
    machine.add_python(machine.bin / "python3.12")
    machine.run()
    with (machine.root / "constraints.txt").open("a") as file:
        file.write("one-more==1\n")
    machine.run()
    assert machine.installations() == 2


def test_half_finished_installation_is_done_over(machine):
    machine.add_python(machine.bin / "python3.12")
    Path(f"{machine.calls}.exit").write_text("1")
    failed = machine.run()
    assert failed.returncode == 2
    assert "pip could not install" in failed.stderr
    Path(f"{machine.calls}.exit").unlink()
    assert "starting over" in machine.run().stderr
    assert machine.installations() == 2
    machine.run()
    assert machine.installations() == 2


def test_checks_add_their_tools_once(machine):
    machine.add_python(machine.bin / "python3.12")
    machine.run("--checks", "cat", "/dev/null")
    machine.run("--checks", "cat", "/dev/null")
    assert machine.installations() == 2
    assert ".[checks]" in machine.calls.read_text()


def test_named_interpreter_with_torch_is_used_as_it_is(machine):
    python = machine.add_python(machine.bin / "mine", trains=True)
    result = machine.run("bash", "-c", 'echo "$PYTHON"', PYTHON="mine")
    assert "using PYTHON=mine and installing nothing" in result.stderr
    assert result.stdout.strip() == str(python)
    assert machine.installations() == 0


def test_active_virtual_environment_with_torch_is_used_as_it_is(machine, tmp_path):
    python = machine.add_python(tmp_path / "theirs/bin/python", trains=True)
    result = machine.run("bash", "-c", 'echo "$PYTHON"', VIRTUAL_ENV=str(tmp_path / "theirs"))
    assert "using the active virtual environment and installing nothing" in result.stderr
    assert result.stdout.strip() == str(python)
    assert machine.installations() == 0


def test_environment_of_the_users_own_is_never_removed(machine):
    machine.add_python(machine.bin / "python3.12")
    own = machine.add_python(machine.root / ".venv/bin/python")
    result = machine.run()
    assert result.returncode == 2
    assert "was not made by 'make setup'" in result.stderr
    assert own.exists()


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [({}, "no Python 3.11 or 3.12 found"), ({"PYTHON": "python3"}, "PYTHON=python3 is not a Python 3.11 or 3.12")],
)
def test_wrong_python_is_refused_with_the_way_out(machine, variables, sentence):
    machine.add_python(machine.bin / "python3", supported=False)
    result = machine.run(**variables)
    assert result.returncode == 2
    assert sentence in result.stderr
    assert not (machine.root / ".venv").exists()
