"""`AttentionForm`: how one form of attention lays out its heads."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class HeadAxis:
    """The heads of one attention module.

    Attributes:
        form: Name of its `AttentionForm`.
        module: Name of the attention module.
        heads: How many it has.
        made: Projection that makes heads (query, key, value, or all in one) to the head that each of its output
            channels belongs to.
        read: Projection that reads heads to the head that each of its input channels belongs to.
    """

    form: str
    module: str
    heads: int
    made: Mapping[str, tuple[int, ...]]
    read: Mapping[str, tuple[int, ...]]

    @property
    def leader(self) -> str:
        """The first projection, which names the heads as the first layer names a group of channels."""
        return next(iter(self.made))

    def inside(self, name: str) -> HeadAxis:
        """Return the same with names relative to the module as names of the model that has it as `name`."""
        prefix = f"{name}." if name else ""
        made, read = ({prefix + layer: heads for layer, heads in side.items()} for side in (self.made, self.read))
        return replace(self, module=name, made=made, read=read)


class AttentionForm(abc.ABC):
    """One form of attention.

    Attributes:
        name: Unique.
    """

    name: ClassVar[str]

    @abc.abstractmethod
    def heads(self, module: nn.Module) -> HeadAxis | None:
        """Return the heads of `module`, names relative to it (`HeadAxis.module` empty); None where it has another form.

        Every projection is to have as many channels for each head as for any other, and those that make heads a
        whole multiple of what one that reads them has.
        """

    @abc.abstractmethod
    def set_heads(self, module: nn.Module, kept: Sequence[int]) -> None:
        """Tell `module`, whose projections have lost all other heads, that only those `kept` are left (ascending).

        It sets the counts that the forward pass reads, and cuts what else it has for each head.
        """


def in_order(heads: int, size: int, times: int = 1) -> tuple[int, ...]:
    """Return the head of every channel where heads of `size` channels follow each other, all of them `times` over."""
    return tuple(head for _ in range(times) for head in range(heads) for _ in range(size))


def take_outputs(layer: nn.Module, kept: Sequence[int]) -> None:
    """Leave a linear layer or ungrouped convolution only these output channels, in place."""
    assert isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d))
    layer.weight = taken(layer.weight, 0, kept)
    if layer.bias is not None:
        layer.bias = taken(layer.bias, 0, kept)
    setattr(layer, "out_features" if isinstance(layer, nn.Linear) else "out_channels", len(kept))


def take_inputs(layer: nn.Module, kept: Sequence[int]) -> None:
    """Leave a linear layer or ungrouped convolution only these input channels, in place."""
    assert isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d))
    layer.weight = taken(layer.weight, 1, kept)
    setattr(layer, "in_features" if isinstance(layer, nn.Linear) else "in_channels", len(kept))


def taken(parameter: Tensor, dimension: int, kept: Sequence[int]) -> nn.Parameter:
    """Return only these places of a dimension of a parameter, as one."""
    chosen = parameter.detach().index_select(dimension, torch.tensor(kept))
    return nn.Parameter(chosen, requires_grad=parameter.requires_grad)
