import subprocess
import sys
from pathlib import Path

TOOL = Path(__file__).resolve().parents[2] / "tools" / "benchmark_data.py"


def test_the_benchmark_prints_its_table_and_leaves_nothing(tmp_path):
    small = ["--documents", "500", "--mean-length", "100", "--seq-length", "64", "--batches", "3", "--workers", "0"]
    done = subprocess.run(
        [sys.executable, TOOL, *small, "--folder", tmp_path], capture_output=True, text=True, check=True
    )
    for line in ("documents, tokens", "build and save the indices", "peak memory", "loader, 0 workers"):
        assert line in done.stdout
    assert list(tmp_path.iterdir()) == []
