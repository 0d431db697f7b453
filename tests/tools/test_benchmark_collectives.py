"""What ranks can tell each other, measured over gloo, and the line through it."""

import json
import math
import subprocess
import sys

import pytest

from tests.tools.conftest import TOOLS

KINDS = {"all-gather", "reduce-scatter", "all-reduce", "all-to-all", "send"}


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    import benchmark_collectives

    return benchmark_collectives


def test_two_ranks_measure_every_collective(tmp_path):
    table = tmp_path / "table.json"
    own = [str(TOOLS / "benchmark_collectives.py"), "--mib", "0.125,0.5", "--repeat", "2", "--json", str(table)]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run = subprocess.run([*launch, *own], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    found = json.loads(table.read_text())
    assert (found["device"], found["ranks"], set(found["collectives"])) == ("cpu", 2, KINDS)
    for one in found["collectives"].values():
        assert list(one["seconds"]) == ["131072", "524288"]
        assert min(one["seconds"].values()) > 0
        assert one["latency"] >= 0
    assert [line.split()[0] for line in run.stdout.splitlines() if "GB/s" in line] == list(found["collectives"])


def test_latency_and_bandwidth_are_those_of_the_line(tool):
    latency, rate = tool.fit({size: 25e-6 + size / 250e9 for size in (2**20, 2**24, 2**28)})
    assert (latency, rate) == (pytest.approx(25e-6), pytest.approx(250e9))


def test_a_latency_is_never_negative(tool):
    latency, rate = tool.fit({1000: 1.0, 2000: 4.0})
    assert latency == 0.0
    assert 500 <= rate <= 1000
    assert tool.fit({1000: 2.0}) == (0.0, 500.0)


def test_what_takes_no_longer_for_more_is_latency_alone(tool):
    assert tool.fit({1000: 2.0, 2000: 2.0}) == (pytest.approx(2.0), math.inf)
    assert tool.fit({1000: 2.0, 2000: 1.0}) == (pytest.approx(1.2), math.inf)


def test_a_rank_alone_is_told_to_bring_others(run_tool):
    alone = run_tool("benchmark_collectives.py")
    assert alone.returncode == 2
    assert alone.stderr.startswith("one rank has nobody to talk to: start several")


@pytest.mark.parametrize("words", [["--mib", "0,4"], ["--repeat", "0"]])
def test_sizes_and_numbers_are_above_zero(run_tool, words):
    refused = run_tool("benchmark_collectives.py", *words)
    assert refused.returncode == 2
    assert f"argument {words[0]}" in refused.stderr
