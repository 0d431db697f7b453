"""Errors of the data floor, each one sentence for the user."""

from __future__ import annotations

from megatron.config.errors import UserError


class DataError(UserError, ValueError):
    """A data file, or what was asked of it, is not legal. The text names the file, the rule and the way out."""


class MissingDataError(DataError, FileNotFoundError):
    """A data file is not there."""


class DataTimeoutError(UserError, TimeoutError):
    """Another process did not finish in time the file that this one waits for."""


class DuplicateDataError(DataError, FileExistsError):
    """A data file is there and must not be overwritten."""
