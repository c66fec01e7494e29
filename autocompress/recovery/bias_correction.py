"""Int8 layers put right one after another, each against what it gave with nothing quantized.

The network runs once, quantized; every int8 layer is corrected as it is reached, from the inputs that the layers before
it give by then. Biases take up the mean of what is off (bias correction; Nagel et al., ICCV 2019), where a batch-norm
follows its running mean does; weights may be rounded by `adaround` first.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

from autocompress.catalogue import Method
from autocompress.compress.quantization import Int8Layer, quantization_mode, quantized_layers
from autocompress.compress.rounding import fake_quantize_weight
from autocompress.model.batch_norm_folding import foldable
from autocompress.model.channel_tracing import CONVOLUTIONS
from autocompress.recovery.adaround import adaptive_rounding
from autocompress.recovery.fit_samples import VALUES, patches, places

METHOD = Method(
    "bias_correction",
    "quantization",
    "the mean error that int8 makes in each channel, measured and taken off",
    "Nagel et al., Data-free quantization, ICCV 2019",
)
# Values of what all layers gave in float at most; a layer's rows are fewer where there are many layers.
_TOTAL = 2**26


@dataclass(frozen=True)
class FloatOutputs:
    """What a network's int8 layers give with nothing quantized.

    Attributes:
        rows: Layer to places of its output, and the values there ``(R, C)``. Layers that run more than once are not
            in it.
        norms: Layer to the batch-norm that alone reads it.
    """

    rows: dict[str, tuple[tuple[Tensor, ...], Tensor]] = field(default_factory=dict)
    norms: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module, inputs: Tensor) -> FloatOutputs:
        """Run `model`, which is not changed, in float over calibration inputs ``(N, ...)``."""
        found = cls()
        layers = dict(quantized_layers(model))
        values = min(VALUES, _TOTAL // max(1, len(layers)))
        generator = torch.Generator().manual_seed(0)
        calls: Counter[str] = Counter()

        def keep(name: str, layer: nn.Module, output: Tensor) -> None:
            calls[name] += 1
            if calls[name] == 1:
                found.rows[name] = places(layer, output, generator, values)

        with ExitStack() as hooks, quantization_mode(model, "off"), torch.no_grad():
            found.norms.update(foldable(model, inputs[:2]))
            for name, layer in layers.items():
                handle = layer.register_forward_hook(lambda m, _i, output, name=name: keep(name, m, output))
                hooks.callback(handle.remove)
            model.eval()(inputs)
        for name, count in calls.items():
            if count > 1:
                del found.rows[name]
        return found


def correct(
    model: nn.Module,
    inputs: Tensor,
    wanted: FloatOutputs,
    *,
    steps: int = 0,
    deadline: float = math.inf,
    progress: Callable[[float, str], None] = lambda fraction, text: None,
) -> dict[str, str]:
    """Correct every int8 layer of a calibrated `model` in place; return those that could not be, with the reason.

    Args:
        model: Its weights are not rounded yet.
        inputs: Calibration inputs ``(N, ...)``.
        wanted: Of the same network, before anything was done to its weights.
        steps: Of `adaround` for each layer; 0: weights stay in float, and are rounded to nearest when they are used.
        deadline: `time.monotonic()` after which weights are rounded to nearest all the same.
        progress: Called with the fraction of the layers done and a layer's name.
    """
    layers = dict(quantized_layers(model))
    notes: dict[str, str] = {}
    seen: set[str] = set()

    def visit(name: str, layer: Int8Layer, given: Tensor) -> None:
        if name in seen:
            return
        progress(len(seen) / len(layers), name)
        seen.add(name)
        reason = _correct(
            layer,
            _norm_of(model, wanted, name),
            given,
            wanted.rows.get(name),
            steps=steps if time.monotonic() < deadline else 0,
        )
        if reason is not None:
            notes[name] = reason

    with ExitStack() as hooks, quantization_mode(model, "quantize"), torch.no_grad():
        for name, layer in layers.items():
            handle = layer.register_forward_pre_hook(lambda m, given, name=name: visit(name, m, given[0]))
            hooks.callback(handle.remove)
        model.eval()(inputs)
    return notes


def _norm_of(model: nn.Module, wanted: FloatOutputs, name: str) -> nn.modules.batchnorm._BatchNorm | None:
    norm = model.get_submodule(wanted.norms[name]) if name in wanted.norms else None
    return norm if isinstance(norm, nn.modules.batchnorm._BatchNorm) else None


def _correct(
    layer: Int8Layer,
    norm: nn.modules.batchnorm._BatchNorm | None,
    given: Tensor,
    target: tuple[tuple[Tensor, ...], Tensor] | None,
    *,
    steps: int,
) -> str | None:
    if target is None:
        return "runs more than once"
    at, rows = target
    count = min(len(rows), max(1, 2 * VALUES // (layer.weight[0].numel() * _groups(layer))))
    inputs = patches(layer, layer.input_quantizer(given), tuple(index[:count] for index in at))
    if inputs is None or (isinstance(layer, CONVOLUTIONS) and layer.padding_mode != "zeros"):
        return "its padding is not of a kind that is read here"
    rows = rows[:count].float()
    wanted = rows if layer.bias is None else rows - layer.bias
    if steps:
        layer.weight.copy_(adaptive_rounding(layer.weight, inputs, wanted, _groups(layer), steps=steps))
    off = wanted.mean(0) - _multiplied(layer, inputs.mean(0))
    if layer.bias is not None:
        layer.bias += off
    elif norm is not None and norm.running_mean is not None:
        norm.running_mean -= off
    else:
        return "it has neither a bias nor a batch-norm after it to take up the mean"
    return None


def _groups(layer: Int8Layer) -> int:
    return layer.groups if isinstance(layer, CONVOLUTIONS) else 1


def _multiplied(layer: Int8Layer, row: Tensor) -> Tensor:
    """Return what the rounded weights give for a row ``(K,)`` of what they are multiplied with: ``(C,)``."""
    groups = _groups(layer)
    weight = fake_quantize_weight(layer.weight).flatten(1)
    parts = zip(row.chunk(groups), weight.chunk(groups), strict=True)
    return torch.cat([functional.linear(x, w) for x, w in parts])
