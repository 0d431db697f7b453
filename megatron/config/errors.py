"""Errors whose text is a sentence for the user, printed without a traceback."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence


class UserError(Exception):
    """Something the user can put right; its text names the flag or file, the value, the rule and the way out.

    The entry scripts print it once, without a traceback, and leave with exit code 2. An error that is also of a
    built-in kind inherits both: `class CorruptIndexError(UserError, ValueError)`.
    """


class ConfigError(UserError, ValueError):
    """The configuration is not legal. Carries every sentence, not the first alone."""

    def __init__(self, messages: Sequence[str]) -> None:
        self.messages: tuple[str, ...] = tuple(messages)
        super().__init__("\n".join(self.messages))


PATIENCE_SECONDS = 5.0
"""How long the other ranks wait before they tell an error: when rank 0 has it too, the launcher ends them meanwhile."""


def tell(error: UserError, rank: int) -> None:
    """Print an error's sentences to stderr, once for all ranks that share it.

    Rank 0 speaks at once. Another rank waits, since the launcher ends it as soon as rank 0 has left; a rank that is
    still there was alone with the error, and tells it under its number.
    """
    if rank:
        time.sleep(PATIENCE_SECONDS)
    prefix = f"rank {rank}: " if rank else ""
    for sentence in str(error).splitlines():
        print(f"{prefix}{sentence}", file=sys.stderr, flush=True)
