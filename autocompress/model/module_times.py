"""Which share of a network's time in PyTorch its modules take: enough to see what matters, no figure of an engine's."""

from __future__ import annotations

import time
from collections.abc import Collection
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

# Untimed passes, timed ones at least, and the seconds after which there are no more.
_WARM_UP, _PASSES, _SECONDS = 2, 5, 1.0


def time_shares(model: nn.Module, inputs: Tensor, names: Collection[str]) -> dict[str, float]:
    """Return for each named module the share, in [0, 1], of the time that a forward pass takes.

    Args:
        model: In eval mode; it is run, and left as it was.
        inputs: One batch ``(N, ...)``.
        names: Qualified names; those of modules that do not run are left out.
    """
    spent: dict[str, float] = {}
    begun: dict[str, float] = {}

    def begin(name: str) -> Any:
        return lambda module, given: begun.__setitem__(name, time.perf_counter())

    def end(name: str) -> Any:
        return lambda module, given, found: spent.__setitem__(
            name, spent.get(name, 0.0) + time.perf_counter() - begun.pop(name, time.perf_counter())
        )

    total = 0.0
    with ExitStack() as stack, torch.no_grad():
        for name, module in model.named_modules():
            if name in names:
                stack.callback(module.register_forward_pre_hook(begin(name)).remove)
                stack.callback(module.register_forward_hook(end(name)).remove)
        for number in range(_WARM_UP + _PASSES):
            if number == _WARM_UP:
                spent.clear()
                total = 0.0
            started = time.perf_counter()
            model(inputs)
            total += time.perf_counter() - started
            if total > _SECONDS and number >= _WARM_UP:
                break
    return {name: seconds / total for name, seconds in spent.items()} if total > 0 else {}
