"""The ranks meet at a store before they form a process group: who is there, who is missing, who does not belong."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import socket
import struct
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from megatron.engine.hosts import LaunchError
from megatron.engine.launchers import RankEnvironment

if TYPE_CHECKING:
    from torch.distributed import Store

log = logging.getLogger(__name__)

TELL_AFTER_SECONDS = 30.0
POLL_SECONDS = (0.02, 1.0)
SECONDS_TO_READ = 1.0
WAY_OUT = (
    "start all of them, with one MASTER_ADDR and MASTER_PORT that each host reaches (a firewall may stand between), or "
    "allow more time with --distributed-timeout-minutes"
)
SIOCGIFADDR = 0x8915
"""Linux's request for the IPv4 address of a network interface."""


@dataclass(frozen=True, kw_only=True)
class Member:
    """What a rank tells the others of itself.

    Attributes:
        address: its host's address on the way to rank 0.
    """

    world_size: int
    host: str
    address: str
    process: int

    def encode(self) -> str:
        """Write it as JSON."""
        return json.dumps(vars(self), sort_keys=True)

    @classmethod
    def decode(cls, text: bytes | str) -> Member:
        """Read what `encode` wrote."""
        return cls(**json.loads(text))


def open_store(environment: RankEnvironment, timeout: timedelta) -> Store:
    """Connect to the store at the master address: rank 0 serves it, unless the launcher does.

    Raises:
        RuntimeError: as torch raises it: the port is taken, or nobody answers there within the timeout.
    """
    from torch.distributed import PrefixStore, TCPStore

    _warn_of_unknown_host(environment)
    store = TCPStore(
        environment.master_address,
        environment.master_port,
        is_master=environment.rank == 0 and not environment.agent_store,
        timeout=timeout,
        wait_for_workers=False,  # the meeting does, and tells of whom it waits
        multi_tenant=True,
    )
    return PrefixStore(f"ranks/{environment.attempt}", store)


def meet(store: Store, environment: RankEnvironment, timeout: timedelta) -> str | None:
    """Wait until every rank is there; all ranks call it together.

    Returns:
        the network interface that leads to the other hosts, for gloo; None where all ranks are on one host, or where
        the interface cannot be told.

    Raises:
        LaunchError: a rank is missing after the timeout, two processes have one rank, or the ranks disagree on their
            number.
    """
    if environment.world_size == 1:
        return None
    address = address_towards(environment.master_address)
    own = Member(
        world_size=environment.world_size, host=socket.gethostname(), address=address or "", process=os.getpid()
    )
    key = f"member/{environment.rank}"
    stored = Member.decode(store.compare_set(key, "", own.encode()))
    if stored != own:
        _refuse(
            store,
            f"rank {environment.rank} is there twice: process {stored.process} on {stored.host} and process "
            f"{own.process} on {own.host}; give each machine a NODE_RANK of its own, and each run a MASTER_PORT",
        )
    if environment.rank == 0:
        store.add("arrived", 1)
        return _gather_the_others(store, environment, own, timeout)
    _compare_with_first(store, environment, own)
    store.add("arrived", 1)
    answer = json.loads(store.get("start"))  # waits for it
    if "refusal" in answer:
        raise LaunchError(answer["refusal"])
    return interface_of(own.address) if answer["several_hosts"] else None


def _gather_the_others(store: Store, environment: RankEnvironment, own: Member, timeout: timedelta) -> str | None:
    """As rank 0: wait for all, then tell them to start, or why not."""
    _wait_for_all(store, environment, timeout)
    if store.check(["refusal"]):
        sentence = store.get("refusal").decode()
        store.set("start", json.dumps({"refusal": sentence}))
        time.sleep(SECONDS_TO_READ)  # the store ends with this process
        raise LaunchError(sentence)
    members = [Member.decode(text) for text in store.multi_get(_keys(environment.world_size))]
    others = [member.address for member in members if (member.host, member.address) != (own.host, own.address)]
    store.set("start", json.dumps({"several_hosts": bool(others)}))
    # Rank 0's own name may mean its loopback (Debian's 127.0.1.1), which leads nowhere.
    return interface_of(address_towards(others[0]) or own.address) if others else None


def _wait_for_all(store: Store, environment: RankEnvironment, timeout: timedelta) -> None:
    """Return when every rank has come, or there is a refusal; the timeout is one."""
    started, told, pause = time.monotonic(), False, POLL_SECONDS[0]
    where = f"{environment.master_address}:{environment.master_port}"
    while store.add("arrived", 0) < environment.world_size and not store.check(["refusal"]):
        waited = time.monotonic() - started
        if waited > timeout.total_seconds():
            store.set("refusal", f"{_missing(store, environment)} did not come to {where} within {timeout}; {WAY_OUT}")
        if waited > TELL_AFTER_SECONDS and not told:
            told = True
            log.warning("waiting at %s for %s", where, _missing(store, environment))
        time.sleep(pause)
        pause = min(2 * pause, POLL_SECONDS[1])


def _compare_with_first(store: Store, environment: RankEnvironment, own: Member) -> None:
    first = Member.decode(store.get("member/0"))  # waits for it
    if first.world_size != own.world_size:
        _refuse(
            store,
            f"rank 0 on {first.host} was told of {first.world_size} ranks, rank {environment.rank} on {own.host} of "
            f"{own.world_size}: start every machine with the same NUM_NODES and NUM_GPUS",
        )


def _refuse(store: Store, sentence: str) -> None:
    store.set("refusal", sentence)
    raise LaunchError(sentence)


def _missing(store: Store, environment: RankEnvironment) -> str:
    absent = [rank for rank, key in enumerate(_keys(environment.world_size)) if not store.check([key])]
    listed = ", ".join(map(str, absent[:8])) + (", ..." if len(absent) > 8 else "")
    return f"{len(absent)} of {environment.world_size} ranks ({listed})"


def _keys(world_size: int) -> list[str]:
    return [f"member/{rank}" for rank in range(world_size)]


def _warn_of_unknown_host(environment: RankEnvironment) -> None:
    """Say at once what torch would try in silence until the timeout."""
    try:
        socket.getaddrinfo(environment.master_address, environment.master_port, type=socket.SOCK_STREAM)
    except OSError as error:
        log.warning(
            "rank %d: MASTER_ADDR=%s has no address on %s yet (%s): waiting for it",
            environment.rank,
            environment.master_address,
            socket.gethostname(),
            error.strerror,
        )


def address_towards(host: str) -> str | None:
    """Return this machine's address on the way to a host; None where there is no way. Sends nothing."""
    with contextlib.suppress(OSError):
        family, kind, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)
            return str(probe.getsockname()[0])
    return None


def interface_of(address: str) -> str | None:
    """Return the name of the network interface with an IPv4 address; None when there is none, or none alone."""
    return next((name for name, own in _interfaces() if own == address), None)


def check_interfaces(names: str) -> None:
    """Refuse a GLOO_SOCKET_IFNAME that names no interface of this machine.

    Raises:
        LaunchError: naming those that there are.
    """
    present = [name for _, name in socket.if_nameindex()]
    unknown: Sequence[str] = [name for name in names.split(",") if name not in present]
    if unknown:
        raise LaunchError(
            f"GLOO_SOCKET_IFNAME={names}: {socket.gethostname()} has no network interface {unknown[0]}, only "
            f"{', '.join(present)}; name one that reaches the other hosts, or unset the variable"
        )


def _interfaces() -> Iterator[tuple[str, str]]:
    """Name and IPv4 address of each network interface."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # an interface without an address
                answer = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                yield name, socket.inet_ntoa(answer[20:24])
