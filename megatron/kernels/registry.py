"""Implementations of one operation, found by name: each file of a package registers one, as data."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from typing import Protocol, TypeVar


class Named(Protocol):
    """What every implementation has."""

    @property
    def name(self) -> str:
        """What a flag calls it."""


Implementation = TypeVar("Implementation", bound=Named)


@functools.cache
def find_implementations(package_name: str, kind: type[Implementation]) -> dict[str, Implementation]:
    """Collect every `BACKEND` of class `kind` in the modules of a package, by its `name`.

    A module without a `BACKEND` is no implementation and is passed over, so that deleting a backend's file removes the
    backend and nothing else.

    Raises:
        TypeError: a module's `BACKEND` is of another class.
        ValueError: two modules register the same name.
    """
    package = importlib.import_module(package_name)
    found: dict[str, Implementation] = {}
    for module_info in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{package_name}.{module_info.name}")
        backend = getattr(module, "BACKEND", None)
        if backend is None:
            continue
        if not isinstance(backend, kind):
            raise TypeError(f"{module.__name__}.BACKEND is a {type(backend).__name__}; it must be a {kind.__name__}")
        if backend.name in found:
            raise ValueError(f"{module.__name__} registers {backend.name!r}, which another file of {package_name} has")
        found[backend.name] = backend
    return found
