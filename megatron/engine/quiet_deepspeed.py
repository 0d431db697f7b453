"""Imports DeepSpeed without what it prints: for processes that are forked to become ranks."""

from megatron.engine.launch import quiet_stdout

with quiet_stdout():
    import deepspeed  # noqa: F401 - it is the import that takes the time
