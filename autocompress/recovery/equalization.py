"""Cross-layer equalization: channels of very different ranges made alike, in a network that computes the same.

Where only batch-norm and functions with ``f(s x) = s f(x)`` for ``s > 0`` lie between a layer and those that read it
(ReLU, pooling, nothing), each channel may be divided by a factor on one side and multiplied with it on the other (Nagel
et al., ICCV 2019). There the two sides are weights with one step per tensor. Here weights have a step per output
channel, which such factors leave as they are; what does share one step is the tensor between the layers, and the
weights with which an output reads all its channels. So it is these two whose ranges are made equal, as SmoothQuant does
(Xiao et al., ICML 2023).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from autocompress.catalogue import Method
from autocompress.compress.quantization import Int8Layer, quantization_mode
from autocompress.model.batch_norm_folding import foldable
from autocompress.model.channel_tracing import CONVOLUTIONS
from autocompress.model.inventory import ChannelGroup, take_inventory

METHOD = Method(
    "equalization",
    "quantization",
    "channels of different ranges scaled alike between a layer and its readers",
    "Nagel et al., Data-free quantization, ICCV 2019",
)
# Weights of a pair's readers change those of others' makers: so often everything is gone through.
_SWEEPS = 3
# Factors at most: a channel that was all but silent on calibration data may not be so on others.
_MOST = 32.0
# Samples that decide whether the network still computes the same, as they are and ten times as large, with either sign:
# functions that saturate are found so.
_CHECKED, _SIZES = 8, (1.0, 10.0, -10.0)
_RELATIVE, _ABSOLUTE = 1e-3, 1e-4


@dataclass(frozen=True)
class _Pair:
    """A layer and those that read it.

    Attributes:
        scaled: Tensors ``(C, ...)`` divided on the making side.
        readers: Their weights, ``(O, C * m, ...)``.
        channels: ``C``.
    """

    name: str
    scaled: tuple[Tensor, ...]
    readers: tuple[Tensor, ...]
    channels: int

    def tensors(self) -> tuple[Tensor, ...]:
        return (*self.scaled, *self.readers)

    def scale(self, factors: Tensor) -> None:
        """Divide the channels by `factors` ``(C,)`` where they are made, and multiply where they are read."""
        for tensor in self.scaled:
            tensor.div_(factors.view(-1, *[1] * (tensor.ndim - 1)))
        for weight in self.readers:
            each = factors.repeat_interleave(weight.shape[1] // self.channels)
            weight.mul_(each.view(1, -1, *[1] * (weight.ndim - 2)))

    def weight_range(self) -> Tensor:
        """Return the largest magnitude of the weights that read each channel ``(C,)``."""
        ranges = [w.abs().transpose(0, 1).reshape(self.channels, -1).amax(1) for w in self.readers]
        return torch.stack(ranges).amax(0)


def equalize(model: nn.Module, inputs: Tensor) -> tuple[list[str], dict[str, str]]:
    """Equalize every pair that can be, in place; activation ranges are to be calibrated again.

    Args:
        model: With int8 layers, in eval mode.
        inputs: Calibration inputs ``(N, ...)``.

    Returns:
        Layers whose outputs were equalized, and those that were left alone with the reason.

    Raises:
        CompressionError: The model does not run on its inputs.
    """
    with quantization_mode(model, "off"), torch.no_grad():
        pairs, left = _pairs(model, inputs)
        ranges = _ranges(model, inputs, {pair.name: pair for pair in pairs})
        check = [size * inputs[:_CHECKED] for size in _SIZES]
        wanted = [model(x) for x in check]

        def same() -> bool:
            return all(_close(model(x), y) for x, y in zip(check, wanted, strict=True))

        before = {pair.name: [t.clone() for t in pair.tensors()] for pair in pairs}
        _scale(pairs, ranges)
        if same():
            return [pair.name for pair in pairs], left
        # Which one was it? Singly, those that fail are undone.
        _restore(pairs, before)
        held = []
        for pair in pairs:
            saved = {pair.name: [t.clone() for t in pair.tensors()]}
            _scale([pair], ranges)
            if same():
                held.append(pair.name)
            else:
                _restore([pair], saved)
                left[pair.name] = "the network would not compute the same: something between is not homogeneous"
        return held, left


def factors_of(made: Tensor, read: Tensor) -> Tensor:
    """Return what channels are to be divided by ``(C,)`` so that both ranges become proportional to one another.

    Args:
        made: Range of each channel where it is made ``(C,)``.
        read: Range of the weights that read it ``(C,)``.

    Returns:
        ``sqrt(made / read)``, over its geometric mean; 1 where a channel or all that reads it is zero.
    """
    alive = (made > 0) & (read > 0)
    if not bool(alive.any()):
        return torch.ones_like(made)
    logarithm = torch.where(alive, 0.5 * (made / read).log(), torch.zeros_like(made))
    middle = logarithm[alive].mean()
    return torch.where(alive, (logarithm - middle).exp().clamp(1 / _MOST, _MOST), torch.ones_like(made))


def _pairs(model: nn.Module, inputs: Tensor) -> tuple[list[_Pair], dict[str, str]]:
    norms = foldable(model, inputs[:2])
    pairs, left = [], {}
    for name, group in take_inventory(model, inputs[:2]).groups.items():
        found = _pair(model, group, norms)
        if isinstance(found, str):
            left[name] = found
        else:
            pairs.append(found)
    return pairs, left


def _pair(model: nn.Module, group: ChannelGroup, norms: Mapping[str, str]) -> _Pair | str:
    if len(group.producers) != 1 or group.parts != 1:
        return "several layers make its channels"
    readers = {name: model.get_submodule(name) for name in group.consumers}
    if not any(isinstance(reader, Int8Layer) for reader in readers.values()):
        return "no int8 layer reads it"
    weights = []
    for name, reader in readers.items():
        read = group.channels * group.multiples.get(name, 1)
        grouped = isinstance(reader, CONVOLUTIONS) and reader.groups != 1
        if not isinstance(reader, (*CONVOLUTIONS, nn.Linear)) or grouped or reader.weight.shape[1] != read:
            return "it is read together with others' channels"
        weights.append(reader.weight)
    maker = model.get_submodule(group.producers[0])
    if group.producers[0] in norms:
        maker = model.get_submodule(norms[group.producers[0]])
    scaled = tuple(t for t in (maker.weight, maker.bias) if isinstance(t, nn.Parameter))
    if not scaled:
        return "the batch-norm after it has no scale"
    return _Pair(group.producers[0], scaled, tuple(weights), group.channels)


def _ranges(model: nn.Module, inputs: Tensor, pairs: Mapping[str, _Pair]) -> dict[str, Tensor]:
    """Return the largest magnitude of each channel ``(C,)`` where it is read, for every pair."""
    found: dict[str, Tensor] = {}
    owners = {id(weight): pair for pair in pairs.values() for weight in pair.readers}

    def look(module: nn.Module, given: Tensor) -> None:
        pair = owners[id(module.weight)]
        last = given.movedim(1, -1) if isinstance(module, CONVOLUTIONS) else given
        top = last.abs().flatten(0, -2).amax(0).view(pair.channels, -1).amax(1)
        found[pair.name] = torch.maximum(found[pair.name], top) if pair.name in found else top

    with ExitStack() as hooks:
        for module in model.modules():
            if isinstance(module, (*CONVOLUTIONS, nn.Linear)) and id(module.weight) in owners:
                hooks.callback(module.register_forward_pre_hook(lambda m, given: look(m, given[0])).remove)
        model(inputs)
    return found


def _scale(pairs: Sequence[_Pair], ranges: Mapping[str, Tensor]) -> None:
    made = dict(ranges)
    for _ in range(_SWEEPS):
        for pair in pairs:
            factors = factors_of(made[pair.name], pair.weight_range())
            pair.scale(factors)
            made[pair.name] = made[pair.name] / factors


def _restore(pairs: Sequence[_Pair], saved: Mapping[str, Sequence[Tensor]]) -> None:
    for pair in pairs:
        for tensor, old in zip(pair.tensors(), saved[pair.name], strict=True):
            tensor.copy_(old)


def _close(found: Tensor, wanted: Tensor) -> bool:
    return bool(torch.allclose(found, wanted, rtol=_RELATIVE, atol=_ABSOLUTE * float(wanted.abs().max())))
