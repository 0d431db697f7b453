"""GPUs, their links and their hosts, as a few rates, and how long collectives over some of them take.

A ring over the ranks of a group moves what a collective needs through each link in parallel. Inside of a host a rank
receives at its own link's rate. Between hosts every GPU has a network port of its own, and rings take all ports of the
group's GPUs, so that a host that holds m of them receives m times as fast; that happens while the ranks of a host pass
on what they have, and the slower of the two counts. Each host on the ring's way adds a latency; an all-reduce takes a
tree instead, whose latency grows with the logarithm (NCCL has both).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Link:
    """What one rank receives from another: `latency` in s, and then `rate` bytes a second."""

    latency: float
    rate: float

    def seconds(self, num_bytes: float) -> float:
        """Time of one message."""
        return self.latency + num_bytes / self.rate


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Hosts of GPUs that are all alike.

    Attributes:
        flops: FLOP/s of one GPU in forward and backward, attention counted causal.
        host_seconds: what the host alone needs for a micro-batch; nothing where it is far ahead of the GPU.
        ranks_per_host: GPUs of a host.
        local: between GPUs of one host.
        network: between GPUs of different hosts, one port for each.
    """

    flops: float
    host_seconds: float = 0.0
    ranks_per_host: int
    local: Link
    network: Link

    def place(self, ranks: Iterable[int]) -> Placed:
        """Find out where the ranks of a group are; ranks are numbered host by host."""
        hosts = Counter(rank // self.ranks_per_host for rank in ranks)
        return Placed(self, hosts.total(), len(hosts), max(hosts.values()))


@dataclass(frozen=True)
class Placed:
    """A group of `size` ranks on `hosts` hosts, at most `neighbours` of them on one."""

    cluster: Cluster
    size: int
    hosts: int
    neighbours: int

    @property
    def link(self) -> Link:
        """The slower one on the way around."""
        return self.cluster.network if self.hosts > 1 else self.cluster.local

    def gather(self, whole_bytes: float) -> float:
        """Seconds until each rank has the whole of which each had a share; those of a reduce-scatter, too."""
        return self._travel(whole_bytes, hops=self.hosts - 1)

    def all_reduce(self, num_bytes: float) -> float:
        """Seconds until each rank has the sum of all ranks' tensors of so many bytes."""
        return 2 * self._travel(num_bytes, hops=math.ceil(math.log2(self.hosts))) - self._start()

    def exchange(self, own_bytes: float) -> float:
        """Seconds of an all-to-all in which each rank gives the others their parts of so many bytes."""
        if self.size == 1:
            return 0.0
        cluster, far = self.cluster, (self.size - self.neighbours) / self.size
        near = (self.neighbours - 1) / self.size
        return self._start() + max(own_bytes * near / cluster.local.rate, own_bytes * far / cluster.network.rate)

    def _travel(self, num_bytes: float, hops: int) -> float:
        if self.size == 1:
            return 0.0
        cluster, seconds = self.cluster, 0.0
        if self.neighbours > 1:
            seconds = num_bytes * (self.size - 1) / self.size / cluster.local.rate
        if self.hosts > 1:
            arriving = num_bytes * (self.hosts - 1) / self.hosts
            seconds = max(seconds, arriving / (self.neighbours * cluster.network.rate))
        return self._start() + hops * cluster.network.latency + seconds

    def _start(self) -> float:
        return self.cluster.local.latency if self.size > 1 else 0.0
