"""`Method`: what one method of compression is, in a line; the file that implements it says so itself.

Such a file has a `METHOD`, or `METHODS`, and lies in one of `HOMES`, where `list_methods` finds it.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module

from autocompress.errors import ConfigError, nearest

FAMILIES = ("importance", "pruning", "quantization", "lowrank", "distillation", "recovery", "storage")

HOMES = ("autocompress.compress", "autocompress.recovery", "autocompress.storage")


@dataclass(frozen=True)
class Method:
    """One method of the field, as `autocompress methods` lists it.

    Attributes:
        name: As it is written in a search space, a run file or an option.
        family: One of `FAMILIES`.
        summary: What it does, one line without a full stop.
        source: Authors, year and where it was published.
        speeds_up: Engines on which it makes a network faster; empty: it changes accuracy or storage alone.
    """

    name: str
    family: str
    summary: str
    source: str
    speeds_up: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise ValueError(f"Unknown family {self.family!r} of method {self.name!r}; known: {', '.join(FAMILIES)}.")


def list_methods(family: str | None = None) -> tuple[Method, ...]:
    """Return every method, by family and name; those of one family where one is given.

    Raises:
        ConfigError: Unknown family.
    """
    if family is not None and family not in FAMILIES:
        raise ConfigError(f"Unknown family of methods {family!r}.{nearest(family, FAMILIES)}")
    found = {method for home in HOMES for method in _said_in(home)}
    kept = (method for method in found if family in (None, method.family))
    return tuple(sorted(kept, key=lambda method: (FAMILIES.index(method.family), method.name)))


def _said_in(package: str) -> Iterator[Method]:
    path = import_module(package).__path__
    for info in pkgutil.walk_packages(path, f"{package}."):
        module = import_module(info.name)
        yield from getattr(module, "METHODS", ())
        if hasattr(module, "METHOD"):
            yield module.METHOD
