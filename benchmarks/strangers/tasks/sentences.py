"""English sentences from frames and words: statements, questions, requests and reports about things of many kinds."""

from __future__ import annotations

import random

# fmt: off
_WHO = (
    "The gardener", "Our accountant", "A retired pilot", "The night nurse", "Her cousin", "The goalkeeper",
    "A geologist", "The council", "My landlord", "The orchestra", "A beekeeper", "The start-up",
    "An exchange student", "The ferry crew", "His lawyer",
)
_DID = (
    "sold", "repaired", "complained about", "measured", "inherited", "hid", "ordered", "praised", "rented out",
    "redesigned", "misunderstood", "insured", "filmed", "abandoned", "tested",
)
_DO = (
    "sell", "repair", "measure", "hide", "order", "praise", "rent", "redesign", "insure", "film", "abandon", "test",
    "paint", "borrow", "translate",
)
_THINGS = (
    "a leaking roof", "the quarterly budget", "an old violin", "three solar panels", "the vaccination records",
    "a chess computer", "the village bakery", "a pair of skis", "the encryption key", "a box of mangoes",
    "the harbour bridge", "a second-hand truck", "the tax return", "a family of hedgehogs", "the wedding cake",
)
_WHEN = (
    "last winter", "before lunch", "during the strike", "at midnight", "after the merger", "in a hurry", "for charity",
    "without a permit", "on the radio", "since the earthquake", "by mistake", "with great care",
)
# fmt: on
_FRAMES = (
    "{who} {did} {thing} {when}.",
    "Did {inner} really {do} {thing}?",
    "Please explain how to {do} {thing} {when}.",
    "{who} says that {thing} cannot be trusted, although {other} disagrees.",
    "I would never {do} {thing}; {other} might.",
    "News: {inner} {did} {thing} {when}, and {other} {did2} {thing2}.",
)


def sentences(n: int, seed: int = 0) -> list[str]:
    """Return `n` different sentences, in random order."""
    draw = random.Random(seed)
    found: dict[str, None] = {}
    while len(found) < n:
        who, other = draw.sample(_WHO, 2)
        words = {
            "who": who,
            "inner": who[0].lower() + who[1:],
            "other": other[0].lower() + other[1:],
            "did": draw.choice(_DID),
            "did2": draw.choice(_DID),
            "do": draw.choice(_DO),
            "thing": draw.choice(_THINGS),
            "thing2": draw.choice(_THINGS),
            "when": draw.choice(_WHEN),
        }
        found[draw.choice(_FRAMES).format(**words)] = None
    return list(found)
