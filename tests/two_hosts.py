"""Two hosts on one machine: Linux namespaces with a name, a network stack and processes of their own, and a cable.

    with two_hosts(tmp_path) as hosts:
        jobs = [host.start(["hostname"]) for host in hosts]

Each host is `node1` or `node2`, has a loopback and one interface, `cable`, whose addresses lead nowhere else, and calls
itself by a loopback address, as Debian's installer writes it into /etc/hosts. Nothing has a name outside, so nothing is
left behind: when the process that made them ends, be it by SIGKILL, the kernel ends theirs, and the hosts are gone.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

NEEDED = ("setpriv", "unshare", "nsenter", "ip", "mount", "hostname")
ADDRESSES = ("10.213.77.1", "10.213.77.2")
WITH_PARENT = ["setpriv", "--pdeathsig", "KILL"]
SETUP_SECONDS = 10.0


class NoNamespacesError(Exception):
    """The machine does not let this process make namespaces; the text says why."""


@dataclass(frozen=True)
class Host:
    """One of the two, by the number of the process that keeps it in being."""

    name: str
    address: str
    keeper: int

    def start(self, command: Sequence[str], **options: object) -> subprocess.Popen[str]:
        """Start a command there."""
        enter = ["nsenter", "--target", str(self.keeper), "--net", "--uts", "--pid", "--mount", "--wd=."]
        return subprocess.Popen([*WITH_PARENT, *enter, *command], text=True, **options)

    def call(self, *command: str) -> None:
        """Run a command there to its end."""
        job = self.start(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        output, _ = job.communicate(timeout=SETUP_SECONDS)
        if job.returncode:
            raise NoNamespacesError(f"{' '.join(command)}: {output.strip()}")


@contextlib.contextmanager
def two_hosts(folder: Path) -> Iterator[tuple[Host, Host]]:
    """Make the two hosts, and remove them with all that runs there.

    Raises:
        NoNamespacesError: it needs root, and the commands of util-linux and iproute2.
    """
    missing = [name for name in NEEDED if shutil.which(name) is None]
    if missing:
        raise NoNamespacesError(f"{', '.join(missing)} not on PATH")
    if os.geteuid() != 0:
        raise NoNamespacesError("only root may make network namespaces")
    with contextlib.ExitStack() as stack:
        first, second = (stack.enter_context(_host(number, folder)) for number in (0, 1))
        _connect(first, second)
        yield first, second


@contextlib.contextmanager
def _host(number: int, folder: Path) -> Iterator[Host]:
    name, other = f"node{number + 1}", f"node{2 - number}"
    names = folder / f"hosts-{name}"
    names.write_text(f"127.0.0.1 localhost\n127.0.1.1 {name}\n{ADDRESSES[1 - number]} {other}\n")
    script = f"hostname {name} && mount --bind {names} /etc/hosts && echo ready && exec sleep infinity"
    unshare = ["unshare", "--net", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
    outer = subprocess.Popen(
        [*WITH_PARENT, *unshare, "sh", "-c", script], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        line = outer.stdout.readline().strip()
        if line != "ready":
            raise NoNamespacesError(line)
        keeper = int(Path(f"/proc/{outer.pid}/task/{outer.pid}/children").read_text().split()[0])
        yield Host(name, ADDRESSES[number], keeper)
    finally:
        outer.kill()  # and so, by the kernel, every process of the host
        outer.wait()
        outer.stdout.close()


def _connect(first: Host, second: Host) -> None:
    ends = ["cable", "netns", str(first.keeper), "type", "veth", "peer", "name", "cable", "netns", str(second.keeper)]
    made = subprocess.run(["ip", "link", "add", *ends], capture_output=True, text=True, check=False)
    if made.returncode:
        raise NoNamespacesError(f"ip link add: {made.stderr.strip()}")
    for host in (first, second):
        host.call("ip", "address", "add", f"{host.address}/24", "dev", "cable")
        for interface in ("lo", "cable"):
            host.call("ip", "link", "set", interface, "up")
    deadline = time.monotonic() + SETUP_SECONDS
    while "NO-CARRIER" in _state(first) and time.monotonic() < deadline:
        time.sleep(0.05)


def _state(host: Host) -> str:
    job = host.start(["ip", "link", "show", "cable"], stdout=subprocess.PIPE)
    return job.communicate(timeout=SETUP_SECONDS)[0]
