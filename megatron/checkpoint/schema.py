"""What a JSON file has to look like, and one sentence about the first entry that does not: file, entry, value, rule.

A digest tells that a file is as it was written, not that a friend wrote it. Whoever reads JSON of a checkpoint says
what it must be as a shape, and reads it with `read_json(path, shape)`; what comes back can be used without a question.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from megatron.checkpoint.errors import CheckpointError

LARGEST_COUNT = 2**63 - 1
LONGEST_SHOWN = 60


class MisfitError(ValueError):
    """An entry is not what it must be.

    Args:
        problem: a predicate, such as "is -1 instead of a whole number from 0".
        place: the names that lead to the entry, from the outside in.
    """

    def __init__(self, problem: str, *place: str) -> None:
        super().__init__(problem)
        self.problem = problem
        self.place = place

    @classmethod
    def of(cls, value: Any, words: str, *place: str) -> MisfitError:
        """Say what a value is instead of what it must be."""
        return cls(f"is {_shown(value)} instead of {words}", *place)

    def within(self, name: str) -> MisfitError:
        """Say where the part lies that the place begins in."""
        return MisfitError(self.problem, name, *self.place)

    def __str__(self) -> str:
        return f"{'.'.join(self.place) or 'it'} {self.problem}"


class Shape:
    """Values of one kind; the other shapes are made of such.

    Args:
        words: the kind with its article, for the sentence.
        fits: whether a value is of it.
    """

    def __init__(self, words: str, fits: Callable[[Any], bool]) -> None:
        self.words = words
        self._fits = fits

    def check(self, value: Any) -> None:
        """Look at a value and all that is in it.

        Raises:
            MisfitError: names the first entry that is not what it must be.
        """
        if not self._fits(value):
            raise MisfitError.of(value, self.words)


class Nullable(Shape):
    """What another shape takes, or null."""

    def __init__(self, shape: Shape) -> None:
        super().__init__(f"{shape.words}, or null", lambda value: value is None)
        self._shape = shape

    def check(self, value: Any) -> None:
        """See `Shape.check`."""
        if value is not None:
            self._shape.check(value)


class OneOf(Shape):
    """A text that is one of a few."""

    def __init__(self, *texts: str) -> None:
        super().__init__(f"one of {', '.join(texts)}", lambda value: isinstance(value, str) and value in texts)


class Items(Shape):
    """A list of any length, whose items are of one shape."""

    def __init__(self, item: Shape) -> None:
        super().__init__("a list", lambda value: isinstance(value, list))
        self._item = item

    def check(self, value: Any) -> None:
        """See `Shape.check`."""
        super().check(value)
        for index, item in enumerate(value):
            _check_part(self._item, item, str(index))


class Row(Shape):
    """A list of a given length, with a shape for each place."""

    def __init__(self, *items: Shape) -> None:
        super().__init__(f"a list of {len(items)}", lambda value: isinstance(value, list) and len(value) == len(items))
        self._items = items

    def check(self, value: Any) -> None:
        """See `Shape.check`."""
        super().check(value)
        for index, (shape, item) in enumerate(zip(self._items, value, strict=True)):
            _check_part(shape, item, str(index))


class Named(Shape):
    """An object whose names are free, each with a value of one shape."""

    def __init__(self, value: Shape) -> None:
        super().__init__("an object", lambda value: isinstance(value, Mapping))
        self._value = value

    def check(self, value: Any) -> None:
        """See `Shape.check`."""
        super().check(value)
        for name, part in value.items():
            _check_part(self._value, part, name)


class Entries(Shape):
    """An object with given entries.

    Args:
        required: the shapes of those that must be there.
        others: of those that may be.
        closed: whether no other entry may be; else they are passed over.
    """

    def __init__(
        self, required: Mapping[str, Shape], others: Mapping[str, Shape] | None = None, *, closed: bool = False
    ) -> None:
        super().__init__("an object", lambda value: isinstance(value, Mapping))
        self._required = required
        self._known = {**required, **(others or {})}
        self._closed = closed

    def check(self, value: Any) -> None:
        """See `Shape.check`."""
        super().check(value)
        for name, shape in self._required.items():
            if name not in value:
                raise MisfitError(f"is missing, and must be {shape.words}", name)
        for name, part in value.items():
            if name in self._known:
                _check_part(self._known[name], part, name)
            elif self._closed:
                raise MisfitError("is an entry that this program does not know", name)


class Both(Shape):
    """What each of several shapes takes."""

    def __init__(self, *shapes: Shape) -> None:
        super().__init__(shapes[0].words, lambda value: True)
        self._shapes = shapes

    def check(self, value: Any) -> None:
        """See `Shape.check`."""
        for shape in self._shapes:
            shape.check(value)


def counts(least: int = 0, most: int = LARGEST_COUNT) -> Shape:
    """Whole numbers between two, which belong to them."""
    words = f"a whole number from {least}" + (f" to {most}" if most < LARGEST_COUNT else "")
    return Shape(words, lambda value: type(value) is int and least <= value <= most)


ANYTHING = Shape("any value", lambda value: True)
OBJECT = Shape("an object", lambda value: isinstance(value, Mapping))
TEXT = Shape("a text", lambda value: isinstance(value, str))
COUNT = counts()
NUMBER = Shape("a finite number", lambda value: type(value) in (int, float) and _is_finite(value))
POSITIVE = Shape("a number above 0", lambda value: type(value) in (int, float) and _is_finite(value) and value > 0)


def _is_finite(value: float) -> bool:
    return -1e308 <= value <= 1e308  # also of whole numbers that no float can hold


def _is_hexadecimal(value: object) -> bool:
    try:
        return isinstance(value, str) and float.fromhex(value) is not None
    except (ValueError, OverflowError):
        return False


BITS = Shape("a floating point number in hexadecimal", _is_hexadecimal)


def fits(value: Any, shape: Shape) -> bool:
    """Whether a value is what it must be."""
    try:
        shape.check(value)
    except (MisfitError, RecursionError):
        return False
    return True


def require(value: Any, shape: Shape, source: object) -> None:
    """Check a value that was read.

    Args:
        value: of a file.
        shape: what it must be.
        source: the file, for the sentence.

    Raises:
        CheckpointError: names the file and the first entry in it that is not what it must be.
    """
    try:
        shape.check(value)
    except MisfitError as misfit:
        raise CheckpointError(f"{source}: {misfit}: the checkpoint is damaged, load another one") from misfit
    except RecursionError as error:
        raise CheckpointError(f"{source} is nested too deeply: the checkpoint is damaged, load another one") from error


def _check_part(shape: Shape, part: Any, name: str) -> None:
    try:
        shape.check(part)
    except MisfitError as misfit:
        raise misfit.within(name if len(name) <= LONGEST_SHOWN else f"{name[:LONGEST_SHOWN]}...") from None


def _shown(value: Any) -> str:
    text = json.dumps(value, default=lambda other: type(other).__name__)
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}..."
