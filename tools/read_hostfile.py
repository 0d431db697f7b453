#!/usr/bin/env python3
"""Checks a hostfile for launch.sh, and says what a run takes of it.

    python tools/read_hostfile.py hosts 2 8

prints the number of hosts, the ranks on each, the first host, which of them this machine is, or `none`, and all of them
with commas between.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone that is not installed

from megatron.config.errors import UserError, tell
from megatron.engine.hosts import choose_hosts, number_of_this_host, read_hostfile


def main(argv: Sequence[str] | None = None) -> int:
    """Print the five words; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("hostfile", type=Path, help="file of `host slots=N` lines")
    parser.add_argument("nodes", nargs="?", default="", help="hosts to use (empty: all)")
    parser.add_argument("gpus", nargs="?", default="", help="ranks on each (empty: their slots)")
    arguments = parser.parse_args(argv)
    try:
        hosts = read_hostfile(arguments.hostfile)
        wanted = [int(word) if word else None for word in (arguments.nodes, arguments.gpus)]
        nodes, gpus = choose_hosts(hosts, arguments.hostfile, *wanted)
    except UserError as error:
        tell(error, rank=0)
        return 2
    used = list(hosts)[:nodes]
    here = number_of_this_host(used)
    print(nodes, gpus, used[0], "none" if here is None else here, ",".join(used))
    return 0


if __name__ == "__main__":
    sys.exit(main())
