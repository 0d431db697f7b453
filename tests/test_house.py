"""The measures of the house: what no linter here checks, held over every tracked source file."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LONGEST_FILE = 400
LONGEST_FUNCTION = 50
READS_ENVIRONMENT = {
    "megatron/engine/launch.py",
    "megatron/kernels/cache.py",  # where compiled kernels are, which tools know without a launcher
    "tools/tune_attention.py",  # tells Triton which instructions to leave out, for which there is no other way
}
PICKLES = {
    "megatron/engine/local_ranks.py",  # hands calls and answers to its own processes, through pipes; no file
}
RUNS_WHAT_IT_READS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
NAMELESS_FILES = {"utils.py", "helpers.py", "common.py", "misc.py", "base.py"}


def files_in_the_repository(pattern: str) -> list[str]:
    """Paths, relative to the root, of files that match and that git tracks or would add."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", pattern],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode != 0:
        pytest.skip("not a git checkout: the files of the project cannot be told from others")
    return sorted(name for name in set(listed.stdout.split()) if (ROOT / name).is_file())


def nodes_of(name: str) -> Iterator[ast.AST]:
    return ast.walk(ast.parse((ROOT / name).read_text(encoding="utf-8"), filename=name))


def package_files() -> list[str]:
    return [name for name in files_in_the_repository("*.py") if not name.startswith("tests/")]


def lines_of_code(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function from `def` to its end, without its docstring."""
    docstring = function.body[0] if ast.get_docstring(function, clean=False) is not None else None
    documented = 0 if docstring is None else docstring.end_lineno - docstring.lineno + 1
    return function.end_lineno - function.lineno + 1 - documented


def test_no_file_is_longer_than_400_lines():
    lengths = {name: (ROOT / name).read_text(encoding="utf-8").count("\n") for name in files_in_the_repository("*.py")}
    assert {name: length for name, length in lengths.items() if length > LONGEST_FILE} == {}


def test_no_function_is_longer_than_50_lines():
    too_long = {
        f"{name}:{node.lineno} {node.name}": lines_of_code(node)
        for name in files_in_the_repository("*.py")
        for node in nodes_of(name)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and lines_of_code(node) > LONGEST_FUNCTION
    }
    assert too_long == {}


def test_no_module_rebinds_a_global():
    places = [f"{name}:{n.lineno}" for name in package_files() for n in nodes_of(name) if isinstance(n, ast.Global)]
    assert places == []


def test_the_environment_is_read_in_few_places():
    places = [
        f"{name}:{node.lineno}"
        for name in package_files()
        if name not in READS_ENVIRONMENT
        for node in nodes_of(name)
        if isinstance(node, ast.Attribute) and node.attr in {"environ", "environb", "getenv", "putenv"}
    ]
    assert places == []


def test_checks_outside_the_tests_are_exceptions_with_a_sentence():
    places = [f"{name}:{n.lineno}" for name in package_files() for n in nodes_of(name) if isinstance(n, ast.Assert)]
    assert places == []


def test_nothing_reads_a_file_in_a_way_that_may_run_what_is_in_it():
    """No pickles, by whatever name; only a conversion reads files of torch, with its restricted reader."""
    places = []
    for name in package_files():
        for node in nodes_of(name):
            if name not in PICKLES and isinstance(node, ast.ImportFrom) and node.module in RUNS_WHAT_IT_READS:
                places.append(f"{name}:{node.lineno} imports from {node.module}")
            module = node.value.id if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) else None
            if name not in PICKLES and module in RUNS_WHAT_IT_READS and not node.attr.endswith("Error"):
                places.append(f"{name}:{node.lineno} uses {ast.unparse(node)}")
            if isinstance(node, ast.Call) and (problem := loads_objects(node, name)):
                places.append(f"{name}:{node.lineno} {problem}")
    assert places == []


def loads_objects(call: ast.Call, name: str) -> str | None:
    """Say what is wrong with a call of `torch.load` or `numpy.load`."""
    said = {keyword.arg: getattr(keyword.value, "value", None) for keyword in call.keywords}
    function = ast.unparse(call.func)
    if function == "torch.load":
        converts = name.startswith(("megatron/convert/", "tools/"))
        return None if converts and said.get("weights_only") is True else "calls torch.load"
    if function in ("np.load", "numpy.load", "np.save", "numpy.save") and said.get("allow_pickle") is not False:
        return f"calls {function} without allow_pickle=False"
    return "unsafe loader" if function in ("yaml.load", "yaml.unsafe_load", "eval", "exec") else None


def test_every_file_is_named_for_what_is_in_it():
    assert [name for name in files_in_the_repository("*.py") if Path(name).name in NAMELESS_FILES] == []


def test_package_inits_import_nothing():
    importing = [
        name
        for name in files_in_the_repository("megatron/*__init__.py")
        if any(isinstance(node, ast.Import | ast.ImportFrom) for node in nodes_of(name))
    ]
    assert importing == []


def test_shell_scripts_parse_and_those_to_be_called_can_be():
    for name in files_in_the_repository("*.sh"):
        script = ROOT / name
        parsed = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True, check=False)
        assert parsed.returncode == 0, parsed.stderr
        assert script.stat().st_mode & 0o111, f"{name} is not executable"


def test_links_in_documents_lead_to_files():
    broken = []
    for name in files_in_the_repository("*.md"):
        text = re.sub(r"```.*?```", "", (ROOT / name).read_text(encoding="utf-8"), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)#\s]+)", text):
            if "://" not in target and not (ROOT / name).parent.joinpath(target).exists():
                broken.append(f"{name}: {target}")
    assert broken == []


def test_paths_that_documents_name_exist():
    named = re.compile(r"`((?:tools|examples_deepspeed|docs|tests|megatron)/[\w./-]*\w\.(?:py|sh|md))`")
    missing = [
        f"{name}: {path}"
        for name in files_in_the_repository("*.md")
        for path in named.findall((ROOT / name).read_text(encoding="utf-8"))
        if not (ROOT / path).exists()
    ]
    assert missing == []
