"""Runs a tool as a user does."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.tokenizer_files import write_sentencepiece

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture(scope="session")
def tokenizer_model(tmp_path_factory):
    return str(write_sentencepiece(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture
def run_tool(tmp_path):
    """Run a tool in a fresh folder; returns the completed process."""

    def run(name, *arguments, env=None):
        command = [sys.executable, str(TOOLS / name), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env, timeout=60)

    return run
