"""Candidates that could not be made, built or verified: what they have in common is no longer proposed.

One refusal may be the candidate's; several of one kind that share a choice which no finished network has are that
choice's. Knows choices and errors; proposes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from autocompress.space.search_space import Choice

# Refusals of one kind after which what they share is not proposed any more.
_ENOUGH = 5

Choices = Mapping[str, Choice]


class Refusals:
    """What was refused, and which choices follow to be at fault.

    Args:
        neutral: Every parameter's choice that does nothing.

    Attributes:
        banned: Parameter to the choices of it that are not proposed any more.
    """

    def __init__(self, neutral: Choices) -> None:
        self._neutral = dict(neutral)
        self._refused: dict[str, list[dict[str, Choice]]] = {}
        self._fine: dict[str, set[Choice]] = {name: {choice} for name, choice in neutral.items()}
        self.banned: dict[str, set[Choice]] = {}

    def finished(self, choices: Choices) -> None:
        """Take note of a network that was built and verified: its choices are not at fault on their own."""
        for name, choice in choices.items():
            self._fine.setdefault(name, set()).add(choice)

    def refused(self, choices: Choices, error: str) -> str | None:
        """Take note of a refusal; return what follows from it, in words, or None."""
        kind = _kind(error)
        seen = self._refused.setdefault(kind, [])
        seen.append({n: c for n, c in choices.items() if c != self._neutral.get(n)})
        if len(seen) % _ENOUGH:
            return None
        shared = {
            name: choice
            for name, choice in seen[-1].items()
            if choice not in self._fine.get(name, ()) and all(other.get(name) == choice for other in seen)
        }
        for name, choice in shared.items():
            self.banned.setdefault(name, set()).add(choice)
        # What is left shares nothing any more.
        self._refused[kind] = []
        if not shared:
            return None
        names = ", ".join(f"{name}={choice}" for name, choice in list(shared.items())[:3])
        more = "" if len(shared) <= 3 else f" and {len(shared) - 3} more"
        return f"{names}{more} is not proposed any more: all {len(seen)} networks with it failed alike ({error})"

    def allowed(self, choices: Choices) -> dict[str, Choice]:
        """Return choices with those that are at fault taken back."""
        return {
            name: self._neutral[name] if choice in self.banned.get(name, ()) else choice
            for name, choice in choices.items()
        }


def _kind(error: str) -> str:
    """Return what refusals of one kind have in common: the message without its numbers, names and paths."""
    return re.sub(r"'[^']*'|\S*/\S*|[\d.,e+-]*\d", "", error)[:80]
