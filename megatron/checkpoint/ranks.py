"""What checkpoints ask of the ranks of a run: to agree, on the host, between two steps."""

from __future__ import annotations

from typing import Any, Protocol


class Ranks(Protocol):
    """The ranks that save and load together."""

    rank: int
    size: int

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0."""
        ...

    def largest(self, value: int) -> int:
        """Agree on the largest of the ranks' values."""
        ...

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in the order of ranks, on every rank."""
        ...

    def of_first(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        ...

    def barrier(self) -> None:
        """Wait until every rank is here."""
        ...
