"""`Method`: what one method of compression is, in a line; the file that implements it says so itself."""

from __future__ import annotations

from dataclasses import dataclass

FAMILIES = ("importance", "pruning", "quantization", "lowrank", "distillation", "storage")


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
