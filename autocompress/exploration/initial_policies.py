"""The first policies tried: uniform ones, so that even ten trials give something, then fewer and fewer blocks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from autocompress.space.search_space import Choice, SearchSpace

Choices = dict[str, Choice]


def seed_choices(space: SearchSpace, block_order: Sequence[str]) -> Iterator[Choices]:
    """Yield the choices of the first trials, without repetition.

    Args:
        space: What may be chosen.
        block_order: Removable blocks, the one whose removal costs least first.
    """
    seen = set()
    for choices in _all(space, block_order):
        policy = space.policy(choices)
        if policy not in seen:
            seen.add(policy)
            yield choices


def _all(space: SearchSpace, block_order: Sequence[str]) -> Iterator[Choices]:
    yield space.everywhere()
    yield space.everywhere(dtype="int8")
    for ratio in (0.25, 0.5, 0.75, 0.375, 0.625):
        yield space.everywhere(prune=ratio)
        yield space.everywhere(prune=ratio, dtype="int8")
    for ratio in (0.5, 0.25):
        yield space.everywhere(rank=ratio)
        yield space.everywhere(rank=ratio, dtype="int8")
    for count in range(1, len(block_order) + 1):
        removed: Choices = {f"block/{name}": "remove" for name in block_order[:count]}
        yield {**space.everywhere(), **removed}
        yield {**space.everywhere(prune=0.25), **removed}
        yield {**space.everywhere(dtype="int8"), **removed}
