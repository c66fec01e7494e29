"""The names of a search space's parameters: what one decides, and of which layer, group or block."""

from __future__ import annotations

from typing import NamedTuple


class Parameter(NamedTuple):
    """One parameter; its text, ``kind/target``, is what Optuna and every file call it.

    Attributes:
        kind: ``"block"``, ``"prune"``, ``"rank"``, ``"dtype"`` or ``"sparsity"``.
        target: A block, group or layer; ``"*"`` is all of them.
    """

    kind: str
    target: str

    @classmethod
    def of(cls, name: str) -> Parameter:
        """Read a parameter's text."""
        kind, _, target = name.partition("/")
        return cls(kind, target)

    def __str__(self) -> str:
        return f"{self.kind}/{self.target}"
