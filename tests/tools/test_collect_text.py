"""The quickstart's text: real, the same each time, and without what would make it too easy."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tools.collect_text import SHORTEST_DOCUMENT, collect_documents, main, source_documents


@pytest.fixture(scope="module")
def documents():
    return collect_documents()


def test_sources_come_without_tests_tables_and_installed_packages(tmp_path):
    kept = ["json/decoder.py", "ast.py"]
    for name in [*kept, "test/test_ast.py", "idlelib/idle_test/x.py", "encodings/cp037.py", "site-packages/numpy.py"]:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("text = 1\n")
    assert sorted(name for name, _ in source_documents(tmp_path)) == sorted(kept)


def test_sources_that_do_not_decode_are_passed_over(tmp_path):
    (tmp_path / "bad.py").write_bytes(b"x = '\xff'\n")
    (tmp_path / "latin.py").write_bytes(b"# coding: latin-1\nx = '\xe9'\n")
    assert list(source_documents(tmp_path)) == [("latin.py", "# coding: latin-1\nx = 'é'\n")]


def test_documents_are_megabytes_of_sources_and_docstrings(documents):
    names = {name for name, _ in documents}
    assert {"ast.py", "docstrings of builtins", "docstrings of itertools"} <= names
    assert 5e6 < sum(len(text) for _, text in documents) < 3e7
    assert min(len(text) for _, text in documents) >= SHORTEST_DOCUMENT


def test_order_is_the_same_in_every_process_and_not_alphabetical(documents):
    names = [name for name, _ in documents]
    assert names != sorted(names)
    program = (
        "import json; from tools.collect_text import collect_documents; "
        "print(json.dumps([name for name, _ in collect_documents()]))"
    )
    other = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONHASHSEED": "7"},
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(other.stdout) == names


def test_file_holds_one_object_a_line(tmp_path, documents, capsys):
    output = tmp_path / "new" / "text.jsonl"
    assert main(["--output", str(output)]) == 0
    records = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert [(record["name"], record["text"]) for record in records] == documents
    assert list(output.parent.iterdir()) == [output]
    assert f"{len(documents)} documents" in capsys.readouterr().out
