"""The launch script on two hosts, without ssh: they find each other by a hostfile and train as one host does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.ranks import run_on_ranks
from tests.training.runs import FLAGS, losses, run
from tests.two_hosts import Host, NoNamespacesError, two_hosts

ROOT = Path(__file__).parents[2]
RUN = [*FLAGS, "--mock-data", "--vocab-size", "64", "--train-iters", "3", "--eval-interval", "100"]
RUN += ["--progress", "plain", "--distributed-timeout-minutes", "1"]
TENSOR = ["--tensor-model-parallel-size", "2"]


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    try:
        with two_hosts(tmp_path_factory.mktemp("hosts")) as pair:
            yield pair
    except NoNamespacesError as error:
        pytest.skip(f"no two hosts can be made here: {error}")


def start(host: Host, folder: Path, flags: list[str], **variables: str) -> subprocess.Popen[str]:
    (folder / "hostfile").write_text("node1 slots=1\nnode2 slots=1\n")
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(folder),
        "PYTHONPATH": str(ROOT),
        "PYTHON": sys.executable,
        "DS_ACCELERATOR": "cpu",
        "HOSTFILE": str(folder / "hostfile"),
        "TORCH_EXTENSIONS_DIR": str(folder / "extensions"),
    }
    return host.start(
        [str(ROOT / "examples_deepspeed/launch.sh"), "pretrain_gpt.py", *flags],
        env=environment | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def outputs(jobs: list[subprocess.Popen[str]]) -> list[str]:
    return [job.communicate(timeout=120)[0] for job in jobs]


@pytest.mark.parametrize(("launcher", "layout"), [("torchrun", TENSOR), ("deepspeed", [])])
def test_two_hosts_train_as_one_does(hosts, tmp_path, launcher, layout):
    flags = [*RUN, *layout]
    jobs = []
    for number, host in enumerate(hosts):
        # torchrun finds its own number in the hostfile; with one given, deepspeed needs no ssh
        variables = {"LAUNCHER": launcher} | ({"NODE_RANK": str(number)} if launcher == "deepspeed" else {})
        jobs.append(start(host, tmp_path, [*flags, "--save", str(tmp_path / "two")], **variables))
    first, second = outputs(jobs)
    assert [job.returncode for job in jobs] == [0, 0], first + second
    table = [line.split()[:3] for line in first.splitlines() if " node" in line and " cpu " in line]
    assert table == [["0", "node1", "cpu"], ["1", "node2", "cpu"]]
    assert ("1 of 1 tensor groups span hosts" in first) == (layout == TENSOR)
    run_on_ranks(2, run, [*flags, "--save", str(tmp_path / "one")], initialize=False, deepspeed=True)
    assert len(losses(tmp_path / "two")) == 3
    assert losses(tmp_path / "two") == losses(tmp_path / "one")


def test_a_host_that_does_not_come_is_told_with_the_address(hosts, tmp_path):
    flags = [*RUN, "--distributed-timeout-minutes", "0.05"]
    job = start(hosts[0], tmp_path, flags, LAUNCHER="deepspeed", NODE_RANK="0")
    (output,) = outputs([job])
    assert job.returncode == 2
    assert "1 of 2 ranks (1) did not come to node1:29500 within 0:00:03" in output
    assert "Traceback" not in output


def test_killed_tests_leave_no_host_behind(hosts, tmp_path):
    code = (
        "import sys, time, pathlib; from tests.two_hosts import two_hosts\n"
        "with two_hosts(pathlib.Path(sys.argv[1])) as hosts:\n"
        "    jobs = [host.start(['sleep', '61']) for host in hosts]\n"
        "    print(*[host.keeper for host in hosts], flush=True); time.sleep(60)"
    )
    child = subprocess.Popen([sys.executable, "-c", code, tmp_path], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    keepers = [Path("/proc") / number for number in child.stdout.readline().split()]
    assert len(keepers) == 2
    assert all(keeper.exists() for keeper in keepers)
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    deadline = time.monotonic() + 10
    while any(keeper.exists() for keeper in keepers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(keeper.exists() for keeper in keepers)
