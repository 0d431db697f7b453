"""Pretrain a GPT model: `deepspeed pretrain_gpt.py --help` lists the flags."""

from __future__ import annotations

import sys
import time

from megatron.config.errors import UserError, tell
from megatron.config.run import parse_run_config
from megatron.engine.launch import leave, read_environment, stop


def main() -> int:
    """Parse the flags, build the trainer, train; returns the exit code."""
    began, rank = time.monotonic(), 0
    try:
        environment = read_environment()
        rank = environment.rank
        config = parse_run_config(sys.argv[1:], environment.world_size, rank=rank)

        from megatron.training.build import build_trainer  # imports torch, which --help and errors do without

        code = build_trainer(config, environment, began).fit()
        stop()
        return code
    except UserError as error:
        tell(error, rank)
        return 2


if __name__ == "__main__":
    leave(main())
