"""Lists of hosts: SLURM's compressed ones, and the hostfiles of `deepspeed`. The standard library alone."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from megatron.config.errors import UserError

HOSTFILE_LINE = re.compile(r"(\S+)\s+slots=(\d+)\s*(?:#.*)?")


class LaunchError(UserError, RuntimeError):
    """The processes of this run cannot find each other or their device."""


def expand_nodelist(nodelist: str) -> list[str]:
    """Return the hosts of a SLURM node list, in its order: `n[08-10,12]-ib,x` gives n08-ib, n09-ib, n10-ib, n12-ib, x.

    Raises:
        LaunchError: it is no such list.
    """
    items = re.findall(r"(?:[^\[\],]|\[[^\[\]]*\])+", nodelist)
    if not items or ",".join(items) != nodelist:
        raise LaunchError(f"SLURM's node list '{nodelist}' cannot be read: set MASTER_ADDR to the host of rank 0")
    return [host for item in items for host in _expand_item(item, nodelist)]


def _expand_item(item: str, nodelist: str) -> list[str]:
    """Multiply out the brackets of one item, the last of them fastest."""
    hosts = [""]
    for text, ranges in re.findall(r"([^\[]+)|\[([^\]]*)\]", item):
        parts = [text] if text else _expand_ranges(ranges, nodelist)
        hosts = [host + part for host in hosts for part in parts]
    return hosts


def _expand_ranges(ranges: str, nodelist: str) -> list[str]:
    numbers: list[str] = []
    for part in ranges.split(","):
        bounds = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if bounds is None:
            raise LaunchError(
                f"SLURM's node list '{nodelist}' has '[{ranges}]', which is no list of numbers: set MASTER_ADDR"
            )
        first, last = bounds[1], bounds[2] or bounds[1]
        numbers += [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return numbers


def read_hostfile(path: Path) -> dict[str, int]:
    """Read a file with a line `host slots=N` for each machine; empty lines and those that begin with # are passed over.

    Returns:
        host -> number of its ranks, in the order of the file.

    Raises:
        LaunchError: it cannot be read, a line says something else, a host occurs twice, or none does.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise LaunchError(f"HOSTFILE={path} does not exist: give a file of lines 'host slots=N'") from None
    except (OSError, ValueError) as error:
        raise LaunchError(f"HOSTFILE={path} cannot be read ({error}): give a file of lines 'host slots=N'") from error
    hosts: dict[str, int] = {}
    for number, line in enumerate(map(str.strip, lines), start=1):
        if not line or line.startswith("#"):
            continue
        match = HOSTFILE_LINE.fullmatch(line)
        if match is None or int(match[2]) < 1:
            raise LaunchError(f"{path}, line {number}: '{line}' is not of the form 'host slots=N' with N at least 1")
        if match[1] in hosts:
            raise LaunchError(
                f"{path}, line {number}: the host {match[1]} is there twice; keep one line, with the sum of the slots"
            )
        hosts[match[1]] = int(match[2])
    if not hosts:
        raise LaunchError(f"{path} names no host: write a line 'host slots=N' for each machine")
    return hosts


def choose_hosts(hosts: Mapping[str, int], path: Path, num_nodes: int | None, num_gpus: int | None) -> tuple[int, int]:
    """Say how many of the hosts a run takes, and how many ranks on each; by default all of them and all their slots.

    Raises:
        LaunchError: there are not as many, or the hosts differ in their slots and nothing was chosen.
    """
    nodes = len(hosts) if num_nodes is None else num_nodes
    if not 1 <= nodes <= len(hosts):
        raise LaunchError(f"NUM_NODES={nodes}, and {path} names {len(hosts)}: add hosts there or change NUM_NODES")
    slots = dict(list(hosts.items())[:nodes])
    if num_gpus is None:
        if len(set(slots.values())) > 1:
            said = ", ".join(f"{host} {count}" for host, count in slots.items())
            raise LaunchError(
                f"{path} gives the hosts different slots ({said}): choose with NUM_GPUS, for all the same"
            )
        return nodes, min(slots.values())
    small = next((host for host, count in slots.items() if count < num_gpus), None)
    if small is not None:
        raise LaunchError(f"NUM_GPUS={num_gpus}, and {small} has slots={slots[small]} in {path}: lower NUM_GPUS")
    return nodes, num_gpus


def number_of_this_host(hosts: Sequence[str]) -> int | None:
    """Return which of the hosts this machine is, by its name or by an address that is its own; None when it is none."""
    names = {socket.gethostname(), socket.gethostname().partition(".")[0], socket.getfqdn()}
    named = next((number for number, host in enumerate(hosts) if host in names), None)
    return named if named is not None else next((n for n, host in enumerate(hosts) if _is_here(host)), None)


def _is_here(host: str) -> bool:
    """Whether one of the host's addresses can be bound, which works for a machine's own ones alone."""
    return any(_can_bind(family, address) for family, address in _addresses(host))


def _addresses(host: str) -> Iterable[tuple[int, tuple[str, int]]]:
    try:
        found = socket.getaddrinfo(host, 0, type=socket.SOCK_DGRAM)
    except OSError:
        return []
    return [(family, (str(address[0]), 0)) for family, _, _, _, address in found]


def _can_bind(family: int, address: tuple[str, int]) -> bool:
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind(address)
    except OSError:
        return False
    return True
