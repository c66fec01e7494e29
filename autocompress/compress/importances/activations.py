"""What the importances of activations share: channels as the layers that read them see them, batch by batch.

Taken are the inputs of a group's consumers: the channel after batch-norm, activation function, residual addition and
pooling, all that stands between the layers that make it and the next that reads it. This is where the papers take it
(after the ReLU), except that they take it before a pooling layer; a functional ReLU has no module to hook.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from autocompress.compress.importances.base import Importance, Subject
from autocompress.errors import CompressionError


@dataclass(frozen=True)
class Reader:
    """One layer that reads the channels of one group.

    Attributes:
        group: Name of the group.
        layer: Name of the layer.
        features: Input features of the layer ``(C, m)`` that each channel is: one each, more behind a flatten.
    """

    group: str
    layer: str
    features: tuple[tuple[int, ...], ...]

    def values(self, inputs: Tensor) -> Tensor:
        """Return the channels ``(N, C, positions)`` in the inputs of the layer, ``(N, C, ...)`` or ``(N, ..., C)``."""
        order = [feature for channel in self.features for feature in channel]
        if order != list(range(inputs.shape[1])):
            inputs = inputs[:, order]
        return inputs.reshape(len(inputs), len(self.features), -1).float()


class ActivationImportance(Importance):
    """Importance by statistics of activations over the calibration data, streamed: nothing grows with their number.

    Attributes:
        passes: How many times the calibration data are run through the model.
    """

    passes = 1

    @abc.abstractmethod
    def observe(self, reader: Reader, values: Tensor, number: int) -> None:
        """Take in one batch ``(N, C, positions)`` of pass `number`."""

    @abc.abstractmethod
    def result(self, reader: Reader) -> Tensor:
        """Return scores ``(C,)`` of all batches taken in."""

    def scores(self, subject: Subject) -> dict[str, Tensor]:
        """See `Importance.scores`. Averaged over the layers that read a group, which mostly see the same."""
        readers = list(_readers(subject))
        for number in range(self.passes):
            self._pass(subject, readers, number)
        return {
            name: torch.stack([self.result(r) for r in readers if r.group == name]).mean(0) for name in subject.groups
        }

    def _pass(self, subject: Subject, readers: list[Reader], number: int) -> None:
        def hook(mine: list[Reader], module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
            inputs = (args or tuple(named.values()))[0].detach()
            if isinstance(module, nn.Linear):
                inputs = inputs.reshape(len(inputs), -1, inputs.shape[-1]).transpose(1, 2)
            for reader in mine:
                self.observe(reader, reader.values(inputs), number)

        handles = []
        for layer in dict.fromkeys(reader.layer for reader in readers):
            mine = [reader for reader in readers if reader.layer == layer]
            module = subject.model.get_submodule(layer)
            handles.append(module.register_forward_pre_hook(partial(hook, mine), with_kwargs=True))
        try:
            batches = sum(1 for _ in subject.evidence.outputs())
        finally:
            for handle in handles:
                handle.remove()
        if not batches:
            raise CompressionError(f"Importance {subject.method!r} needs calibration data, and there are none.")


def _readers(subject: Subject) -> Iterator[Reader]:
    names = {module: name for name, module in subject.copy.named_modules()}
    for name, group in subject.groups.items():
        about = subject.inventory.groups[name]
        features: dict[str, list[list[int]]] = {}
        for item in group.items:
            layer = names.get(item.dep.target.module)
            if layer not in about.consumers or subject.graph.is_out_channel_pruning_fn(item.dep.handler):
                continue
            read = features.setdefault(str(layer), [[] for _ in range(about.channels)])
            for feature, channel in zip(item.idxs, item.root_idxs, strict=True):
                if channel is not None:
                    read[channel].append(feature)
        # A layer that reads more of one channel than of another has no place to look at them side by side.
        even = {layer: read for layer, read in features.items() if read[0] and len(set(map(len, read))) == 1}
        for layer, read in even.items():
            yield Reader(name, layer, tuple(map(tuple, read)))
        if not even:
            raise CompressionError(
                f"Importance {subject.method!r}: no layer reads the channels of group {name!r} in a way that can be "
                "traced. Use 'magnitude'."
            )
