#!/usr/bin/env python3
"""Tell where the milliseconds of a training step go: `python tools/profile_step.py FLAGS OF pretrain_gpt.py`.

Flags of its own come before or between the others:
  --warm-up N     steps before anything is measured (default: 3)
  --steps N       steps on the clock, and as many under the profiler (default: 2)
  --kernels N     also list the N dearest kernels, and a quarter as many gaps (default: 0)
  --json FILE     write everything that was measured

Work is grouped by kind: matrix products, attention, norms, activation, heads with rotary, dropout and residual sum,
cross entropy, embedding, optimizer, gradient norm, gradient sums with casts and copies, collectives, kernels compiled
by torch, other ones; what no kernel covers is idle.
On several ranks the first one's table is shown. On a CPU the groups are those of torch's operations.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone that is not installed

from megatron.config.errors import UserError, tell
from megatron.config.run import parse_run_config
from megatron.engine.launch import leave, read_environment, stop

if TYPE_CHECKING:
    from megatron.training.step_profile import StepProfile


def main(argv: Sequence[str] | None = None) -> int:
    """Profile; returns the exit code."""
    arguments, words = parse(argv)
    rank = 0
    try:
        environment = read_environment()
        rank = environment.rank
        config = parse_run_config([*words, "--train-iters", "1"], environment.world_size, rank=rank)

        from megatron.training.step_profile import profile_steps  # imports torch, which errors do without

        found = profile_steps(config, environment, warm_up=arguments.warm_up, steps=arguments.steps)
        stop()
    except UserError as error:
        tell(error, rank)
        return 2
    if rank == 0:
        print("\n".join(lines(found, arguments.kernels)), flush=True)
        if arguments.json is not None:
            arguments.json.write_text(json.dumps(found.to_json(), indent=1) + "\n", encoding="utf-8")
    return 0


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Tell this tool's flags from those of the run."""
    parser = argparse.ArgumentParser(
        usage="profile_step.py [--warm-up N] [--steps N] [--kernels N] [--json FILE] FLAGS OF pretrain_gpt.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--warm-up", type=int, default=3, metavar="N", help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, default=2, metavar="N", help=argparse.SUPPRESS)
    parser.add_argument("--kernels", type=int, default=0, metavar="N", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, metavar="FILE", help=argparse.SUPPRESS)
    return parser.parse_known_args(argv)


def lines(found: StepProfile, kernels: int) -> Iterator[str]:
    """Write the table."""
    speed = ", ".join(f"{name} {value:.4g}" for name, value in found.speed.items() if value is not None)
    yield f"{found.device}: a step takes {found.step_ms:.1f} ms ({found.profiled_ms:.1f} under the profiler); {speed}"
    yield f"{'kind':40} {'ms a step':>10} {'share':>7}"
    for kind, ms in found.kinds_ms.items():
        yield f"{kind:40} {ms:10.2f} {100 * ms / found.profiled_ms:6.1f}%"
    for entry in found.kernels[:kernels]:
        what = f"[{entry['kind']}] {entry['name'][:80]} | {entry['started_by'][:110]}"
        yield f"{entry['ms']:9.2f} ms {entry['calls']:7.1f} x {what}"
    for gap in found.gaps[: kernels // 4]:
        what = f"[idle before] {gap['before'][:80]} | {gap['started_by'][:110]}"
        yield f"{gap['ms']:9.2f} ms {gap['times']:7.1f} x {what}"


if __name__ == "__main__":
    leave(main())
