"""Errors whose text is a sentence for the user, printed without a traceback."""

from __future__ import annotations

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
