"""What modules keep of a forward pass among their plain attributes: features of the last input, what weights gave.

A cache that a module makes where it is evaluated holds old weights once they are trained, and the history of a step
that is over.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

_OF_TORCH = ("_parameters", "_buffers", "_modules")


def remembered(attributes: dict[str, Any]) -> Iterator[Tensor]:
    """Yield tensors with a history among a module's plain attributes, also in lists and dicts."""
    stack = [value for key, value in attributes.items() if key not in _OF_TORCH]
    while stack:
        value = stack.pop()
        if isinstance(value, Tensor):
            if not value.is_leaf:
                yield value
        elif type(value) in (list, tuple):
            stack.extend(value)
        elif type(value) is dict:
            stack.extend(value.values())


def clear_caches(model: nn.Module) -> None:
    """Have modules drop the caches that they drop where they are trained; all stay in the mode that they are in."""
    modes = [(module, module.training) for module in model.modules()]
    model.train()
    for module, mode in modes:
        module.training = mode


class Memory:
    """Takes modules back to what they were before they remembered anything with a history.

    Args:
        model: Its caches are cleared.
    """

    def __init__(self, model: nn.Module) -> None:
        clear_caches(model)
        self._before = [(module, _shallow(vars(module))) for module in model.modules()]

    def forget(self) -> None:
        """Take away what modules now remember."""
        for module, before in self._before:
            own = vars(module)
            for name in [name for name, value in own.items() if _has_history({name: value})]:
                if name in before:
                    own[name] = _copied(before[name])
                else:
                    del own[name]


def _has_history(attributes: dict[str, Any]) -> bool:
    return next(remembered(attributes), None) is not None


def _shallow(attributes: dict[str, Any]) -> dict[str, Any]:
    return {name: _copied(value) for name, value in attributes.items() if name not in _OF_TORCH}


def _copied(value: Any) -> Any:
    return value.copy() if isinstance(value, (dict, list)) else value
