"""SmoothQuant: the outliers of a few input channels of int8 linear layers moved into their weights.

All channels that a linear layer reads share one int8 step, so a single channel twenty times as large as the others
leaves them five codes. Such channels are divided where the layer reads them, and its weights, which have a step per
output channel, are multiplied (Xiao et al., ICML 2023). Here only outliers are touched: channels beyond a threshold are
brought below it, and all others keep their room, because the largest value that calibration saw of an ordinary channel
says little of other data. Which threshold, each set of layers that reads one tensor chooses by the error of its own
outputs. Divisors are powers of two, so the network in float computes the same to the bit.

The division stays an operation of its own in the torch model; `graph.input_division` puts it into the graph, in the
norm or layer that makes the tensor where nothing else reads that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from autocompress.catalogue import Method
from autocompress.compress.quantization import ActivationQuantizer, QuantLinear, quantization_mode, quantized_layers
from autocompress.compress.rounding import fake_quantize, fake_quantize_weight

METHOD = Method(
    "smoothquant",
    "quantization",
    "outlier channels that int8 linear layers read, moved into their weights",
    "Xiao et al., SmoothQuant, ICML 2023",
)
# Rows of a layer's input that its error is measured on.
_ROWS = 512
# Thresholds between the largest channel (1) and the median one (0), on a logarithmic scale.
_THRESHOLDS = tuple(step / 10 for step in range(9, -1, -1))
# Of settings whose squared error is within this factor of the least, the mildest is taken: it leaves most room for
# values that calibration did not see.
_SLACK = 1.5
# Samples that decide whether the network still computes the same, and by how much it may differ.
_CHECKED, _RELATIVE, _ABSOLUTE = 2, 1e-3, 1e-4


class SmoothedQuantizer(ActivationQuantizer):
    """Divide a tensor's channels, then fake-quantize it.

    Attributes:
        divisor: Powers of two ``(C,)``, a buffer; 1 where a channel is left as it is.
        suspended: Whether it is not divided; see `undivided`.
    """

    divisor: Tensor
    suspended: bool = False

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` ``(..., C)`` divided, then quantized and dequantized."""
        return super().forward(x if self.suspended else x * self.divisor.reciprocal().to(x.dtype))

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        # What was stored without a divisor divides by nothing.
        super()._load_from_state_dict({f"{prefix}divisor": torch.ones_like(self.divisor), **state_dict}, prefix, *rest)


@dataclass
class Readers:
    """Layers that read one tensor, and what was seen of it.

    Attributes:
        names: Their names.
        largest: Largest magnitude of each channel ``(C,)``.
        rows: Some of its rows, ``(R, C)`` each.
        stray: Those of the layers that were given other tensors as well.
    """

    names: list[str]
    largest: Tensor
    rows: list[Tensor] = field(default_factory=list)
    stray: set[str] = field(default_factory=set)

    def see(self, given: Tensor) -> None:
        """Take note of what the layers were given, ``(..., C)``."""
        flat = given.detach().reshape(-1, given.shape[-1])
        self.largest = torch.maximum(self.largest, flat.abs().amax(0).float())
        self.rows.append(flat[:: max(1, -(-len(flat) // _ROWS))].float())
        if sum(map(len, self.rows)) > 2 * _ROWS:
            self.rows = [torch.cat(self.rows)[::2]]


@dataclass
class Observation:
    """What int8 linear layers were given in a calibration.

    Attributes:
        readers: By the tensor they read.
        sample: First inputs of the model ``(N, ...)``.
    """

    readers: list[Readers] = field(default_factory=list)
    sample: Tensor | None = None


@contextmanager
def watching(model: nn.Module) -> Iterator[Observation]:
    """Note what the int8 linear layers of `model` are given in the block."""
    seen = Observation()
    groups: dict[str, Readers] = {}
    last: list[tuple[Tensor, Readers]] = []

    def look(name: str, given: Tensor) -> None:
        if not given.numel():
            return
        shared = last[0][1] if last and last[0][0] is given else None
        if name not in groups and shared is not None:
            shared.names.append(name)
            groups[name] = shared
            return
        if name not in groups:
            groups[name] = Readers([name], torch.zeros(given.shape[-1]))
            seen.readers.append(groups[name])
        group = groups[name]
        if group is not shared:
            if group.names[0] != name:
                group.stray.add(name)
                return
            group.see(given)
            last[:] = [(given, group)]

    def begin(given: tuple[object, ...]) -> None:
        if seen.sample is None and given and isinstance(given[0], Tensor):
            seen.sample = given[0][:_CHECKED].clone()

    with ExitStack() as hooks:
        hooks.callback(model.register_forward_pre_hook(lambda _, given: begin(given)).remove)
        for name, layer in quantized_layers(model):
            if isinstance(layer, QuantLinear):
                handle = layer.register_forward_pre_hook(lambda _, given, name=name: look(name, given[0]))
                hooks.callback(handle.remove)
        yield seen


def smooth(model: nn.Module, seen: Observation) -> list[str]:
    """Set divisors and ranges of the int8 linear layers by what they were given, in place.

    Divisors are set once: layers that have them keep them, and only their ranges are set anew.

    Args:
        model: Calibrated, in eval mode.
        seen: Of `watching` during that calibration.

    Returns:
        Layers that have channels divided.
    """
    layers = {name: layer for name, layer in quantized_layers(model) if isinstance(layer, QuantLinear)}
    owners = [id(p) for _, p in model.named_parameters(remove_duplicate=False)]
    # A calibration may run in bfloat16, which loses as much as int8.
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        chosen = []
        for group in seen.readers:
            names = [name for name in group.names if name not in group.stray]
            members = [layers[name] for name in names]
            if len({_divisor(layer).numpy().tobytes() for layer in members}) > 1:
                continue
            tied = any(owners.count(id(layer.weight)) > 1 for layer in members)
            fixed = tied or any(isinstance(layer.input_quantizer, SmoothedQuantizer) for layer in members)
            chosen.append((members, _choose(members, group, fixed=fixed)))
        for layer in layers.values():
            carry_divisor(layer)
        _apply_checked(model, seen.sample, chosen)
    return list(divisors(model))


@dataclass(frozen=True)
class _Setting:
    """How a tensor could be quantized.

    Attributes:
        divisor: By which channels are divided ``(C,)`` beyond what they are already.
        scale: The step.
    """

    divisor: Tensor
    scale: float


def _choose(layers: Sequence[QuantLinear], group: Readers, *, fixed: bool) -> _Setting:
    """Return the mildest setting whose error is near the least, of what these layers give together."""
    before = _divisor(layers[0])
    rows, largest = torch.cat(group.rows)[:_ROWS] / before, group.largest / before
    quantizer = layers[0].input_quantizer
    low, high = (-128, 127) if quantizer.signed else (0, 255)
    weight = torch.cat([layer.weight.float() for layer in layers])
    wanted = functional.linear(rows, weight)
    ones = torch.ones_like(largest)
    tried = [_Setting(ones, float(quantizer.scale)), _Setting(ones, float(largest.max()) / high)]
    if not fixed:
        tried.extend(_Setting(by, float((largest / by).max()) / high) for by in _divisors(largest))

    def error(setting: _Setting) -> float:
        given = fake_quantize(rows / setting.divisor, torch.tensor(setting.scale), low, high)
        found = functional.linear(given, fake_quantize_weight(weight * setting.divisor))
        return float((found - wanted).square().mean())

    errors = [error(setting) for setting in tried]
    limit = _SLACK * min(errors)
    return next(setting for setting, found in zip(tried, errors, strict=True) if not found > limit)


def _divisors(largest: Tensor) -> Iterator[Tensor]:
    """Yield powers of two ``(C,)`` that bring channels below ever lower thresholds."""
    alive = largest[largest > 0]
    if not len(alive):
        return
    top, middle = float(alive.max()), float(alive.median())
    last = torch.ones_like(largest)
    for share in _THRESHOLDS:
        divisor = torch.exp2((largest / (middle * (top / middle) ** share)).clamp_min(1).log2().ceil())
        if not torch.equal(divisor, last):
            yield divisor
        last = divisor


def _apply_checked(
    model: nn.Module, sample: Tensor | None, chosen: Sequence[tuple[Sequence[QuantLinear], _Setting]]
) -> None:
    """Apply settings; divisors with which the network would not compute the same in float are left out.

    A layer's weight may be read past the layer.
    """
    dividing = [(layers, setting) for layers, setting in chosen if bool((setting.divisor != 1).any())]
    for layers, setting in chosen:
        if bool((setting.divisor == 1).all()):
            _apply(layers, setting)
    if not dividing or sample is None:
        return
    with quantization_mode(model, "off"):
        wanted = model(sample)

        def same() -> bool:
            found = model(sample)
            return torch.allclose(found, wanted, rtol=_RELATIVE, atol=_ABSOLUTE * float(wanted.abs().max()))

        calibrated = [float(layers[0].input_quantizer.scale) for layers, _ in dividing]
        for layers, setting in dividing:
            _apply(layers, setting)
        if same():
            return
        undo = [_Setting(s.divisor.reciprocal(), old) for (_, s), old in zip(dividing, calibrated, strict=True)]
        for (layers, _), back in zip(dividing, undo, strict=True):
            _apply(layers, back)
        for (layers, setting), back in zip(dividing, undo, strict=True):
            _apply(layers, setting)
            if not same():
                _apply(layers, back)


def _apply(layers: Sequence[QuantLinear], setting: _Setting) -> None:
    for layer in layers:
        layer.weight.mul_(setting.divisor.to(layer.weight.dtype))
        quantizer = carry_divisor(layer)
        quantizer.divisor.mul_(setting.divisor)
        quantizer.scale.fill_(setting.scale)


def _divisor(layer: QuantLinear) -> Tensor:
    quantizer = layer.input_quantizer
    return quantizer.divisor if isinstance(quantizer, SmoothedQuantizer) else torch.ones(layer.in_features)


def carry_divisor(layer: QuantLinear) -> SmoothedQuantizer:
    """Have a layer's input quantizer hold a divisor, 1 unless it holds one already, and return it."""
    return hold_divisor(layer.input_quantizer, layer.in_features)


def hold_divisor(quantizer: ActivationQuantizer, channels: int) -> SmoothedQuantizer:
    """Have a quantizer hold a divisor, 1 unless it holds one already, and return it."""
    if not isinstance(quantizer, SmoothedQuantizer):
        quantizer.__class__ = SmoothedQuantizer
        quantizer.register_buffer("divisor", torch.ones(channels))
    assert isinstance(quantizer, SmoothedQuantizer)
    return quantizer


def divisors(model: nn.Module) -> dict[str, Tensor]:
    """Return the divisors ``(C,)`` of the layers that have channels divided, by name."""
    return {
        name: layer.input_quantizer.divisor
        for name, layer in quantized_layers(model)
        if isinstance(layer.input_quantizer, SmoothedQuantizer) and bool((layer.input_quantizer.divisor != 1).any())
    }


@contextmanager
def undivided(model: nn.Module) -> Iterator[None]:
    """Have the layers of `model` read their inputs undivided in the block: what is exported then has no divisions."""
    found = [q for q in model.modules() if isinstance(q, SmoothedQuantizer)]
    for quantizer in found:
        quantizer.suspended = True
    try:
        yield
    finally:
        for quantizer in found:
            quantizer.suspended = False
