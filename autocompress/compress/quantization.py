"""Int8 in the torch model: what the engine will compute, simulated, so that it can be scored and fine-tuned.

Weights: per output channel, symmetric, [-127, 127], scale from the current largest magnitude, so training moves it.
Activations: per tensor, zero point 0; unsigned [0, 255] where calibration saw no negative value, else signed
[-128, 127]; the scale is what a method of `calibrations` says of a histogram of calibration data. Gradients pass
straight through. The Q/DQ that `graph.qdq` writes reproduces these numbers.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autocompress.catalogue import Method
from autocompress.compress.base import CompressionContext, Transform, check_names
from autocompress.compress.calibration import calibration
from autocompress.compress.calibrations.base import Calibration, Magnitudes
from autocompress.compress.recurrent import QuantLSTM, int8_lstms
from autocompress.compress.rounding import fake_quantize, fake_quantize_weight, largest_step
from autocompress.errors import CompressionError
from autocompress.policy import CompressionPolicy

METHOD = Method(
    "int8",
    "quantization",
    "weights per channel, activations per tensor, as Q/DQ",
    "Jacob et al., CVPR 2018",
    ("openvino", "onnxruntime", "tensorrt", "tensorrt-rtx"),
)
_BINS = 2048
_SAMPLES = 2**17


@dataclass(frozen=True)
class QuantizationRange:
    """Quantization of one tensor: ``real = scale * code``, or ``scale * (code - 128)`` where signed codes are uint8.

    Attributes:
        scale: Step, in the tensor's unit.
        signed: Codes in [-128, 127], else [0, 255].
    """

    scale: float
    signed: bool

    def rounded(self, x: Tensor) -> Tensor:
        """Return `x` quantized and dequantized, same shape, in fp32."""
        low, high = (-128, 127) if self.signed else (0, 255)
        return fake_quantize(x.float(), torch.tensor(self.scale), low, high)


class ActivationQuantizer(nn.Module):
    """Fake-quantize a tensor per tensor; a histogram of what it sees sets the scale.

    State: `scale` and `signed` are buffers and travel with the weights.

    Args:
        calibration: Chooses the scale.

    Attributes:
        learned: The step while it is trained, instead of `scale`; see `recovery.lsq`.
    """

    scale: Tensor
    signed: Tensor

    def __init__(self, calibration: Calibration) -> None:
        super().__init__()
        self._calibration = calibration
        self.register_buffer("scale", torch.tensor(1.0))
        self.register_buffer("signed", torch.tensor(True))
        self.mode = "quantize"
        self.learned: Tensor | None = None
        self._histogram = torch.zeros(_BINS)
        self._top = 0.0
        self._lowest = 0.0

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        # A stored layer may divide channels of its input: `smoothing` is made of what is here.
        if f"{prefix}divisor" in state_dict:
            from autocompress.compress.smoothing import hold_divisor

            hold_divisor(self, len(state_dict[f"{prefix}divisor"]))
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def range(self) -> QuantizationRange:
        """Return the current quantization."""
        return QuantizationRange(float(self.scale), bool(self.signed))

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` quantized and dequantized, same shape; unchanged while observing or off."""
        if self.mode == "off":
            return x
        if self.mode == "observe":
            self._observe(x.detach().float())
            return x
        low, high = (-128, 127) if self.signed else (0, 255)
        if self.learned is not None:
            return learned_step(x.float(), self.learned, low, high, features=x[0].numel()).to(x.dtype)
        return fake_quantize(x, self.scale, low, high)

    def _observe(self, x: Tensor) -> None:
        self._lowest = min(self._lowest, float(x.min()))
        magnitude = x.abs().flatten()
        top = float(magnitude.max())
        if not math.isfinite(top + self._top):
            self._top = math.inf
            return
        # Every k-th value is enough for the histogram, whose cost would otherwise be the calibration's.
        magnitude = magnitude[:: _stride(magnitude.numel())]
        if top > self._top:
            # Old counts move to the bins that their centres fall into under the wider range.
            if self._top > 0:
                centres = (torch.arange(_BINS) + 0.5) * (self._top / top)
                self._histogram = torch.zeros(_BINS).index_add_(0, centres.long(), self._histogram)
            self._top = top
        if self._top > 0:
            self._histogram += torch.histc(magnitude, _BINS, 0.0, self._top)

    def finish(self, name: str) -> None:
        """Set `scale` and `signed` from what was observed, and start quantizing.

        Raises:
            CompressionError: Nothing but zeros was seen, or a value that is not finite.
        """
        if not 0 < self._top < math.inf:
            seen = "nothing but zeros, or no data," if self._top == 0 else "a NaN or an infinite value"
            raise CompressionError(
                f"Calibration saw {seen} at the input of {name!r}, so it cannot be quantized to int8; check the "
                "calibration data."
            )
        negative = self._lowest < 0
        magnitudes = Magnitudes(self._histogram, self._top, negative)
        self.scale.fill_(self._calibration.threshold(magnitudes) / magnitudes.levels)
        self.signed.fill_(negative)
        self.mode = "quantize"
        self.forget()

    def forget(self) -> None:
        """Drop what was observed, by a calibration that failed perhaps."""
        self._histogram, self._top, self._lowest = torch.zeros(_BINS), 0.0, 0.0


def learned_step(x: Tensor, step: Tensor, low: int, high: int, *, features: int) -> Tensor:
    """Return `x` rounded to multiples of `step`, of which the gradient is that of LSQ (Esser et al., ICLR 2020).

    Args:
        x: What is rounded.
        step: Positive; of a shape that broadcasts to that of `x`.
        low, high: Smallest and largest code.
        features: Values that share a step, of one sample; the more, the smaller its gradient.
    """
    scale = 1 / math.sqrt(features * high)
    step = step * scale + (step - step * scale).detach()
    codes = (x / step).clamp(low, high)
    return (codes + (codes.round() - codes).detach()) * step


def _stride(values: int) -> int:
    """Return a step that takes about `_SAMPLES` of so many values, from every column, row and channel alike.

    A step that shares a factor with a map's width never meets some of its columns.
    """
    stride = max(1, values // _SAMPLES)
    while math.gcd(stride, values) != 1:
        stride += 1
    return stride


class _Int8Layer:
    """What int8 layers share.

    Attributes:
        input_quantizer: Of what the layer is given.
        simulate: Whether weights are rounded.
        learned: Steps of the weights ``(out,)`` while they are trained; see `recovery.lsq`.
    """

    weight: Tensor
    input_quantizer: ActivationQuantizer
    simulate: bool
    learned: Tensor | None

    def largest_step(self) -> Tensor:
        """Return the step of each output channel ``(out,)`` with which no weight is cut off."""
        return largest_step(self.weight)

    def used_weight(self) -> Tensor:
        """Return the weight that the layer computes with."""
        if not self.simulate:
            return self.weight
        if self.learned is None:
            return fake_quantize_weight(self.weight)
        steps = self.learned.view(-1, *[1] * (self.weight.ndim - 1))
        return learned_step(self.weight, steps, -127, 127, features=self.weight[0].numel())


class _Int8Convolution(_Int8Layer):
    """A convolution that computes as the int8 engine will."""

    bias: Tensor | None

    def forward(self, input: Tensor) -> Tensor:
        """Map ``(N, C, ...)`` to ``(N, C', ...)``."""
        output: Tensor = self._conv_forward(self.input_quantizer(input), self.used_weight(), self.bias)  # type: ignore[attr-defined]
        return output


class QuantConv1d(_Int8Convolution, nn.Conv1d):
    """Of sequences ``(N, C, L)``."""


class QuantConv2d(_Int8Convolution, nn.Conv2d):
    """Of images ``(N, C, H, W)``."""


class QuantConv3d(_Int8Convolution, nn.Conv3d):
    """Of volumes ``(N, C, D, H, W)``."""


class QuantLinear(_Int8Layer, nn.Linear):
    """A linear layer that computes as the int8 engine will."""

    def forward(self, input: Tensor) -> Tensor:
        """Map ``(N, ..., in)`` to ``(N, ..., out)``."""
        return F.linear(self.input_quantizer(input), self.used_weight(), self.bias)


Int8Layer = QuantConv1d | QuantConv2d | QuantConv3d | QuantLinear
_QUANTIZED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: QuantConv1d,
    nn.Conv2d: QuantConv2d,
    nn.Conv3d: QuantConv3d,
    nn.Linear: QuantLinear,
}


class Quantization(Transform):
    """Make every layer that the policy calls int8, or that a factorized int8 layer became, compute in simulated int8.

    Of a factorized linear layer, the second factor stays dense.
    Parameter names stay as they were; each layer but an LSTM gains ``input_quantizer.scale`` and ``.signed``.
    """

    def apply(self, model: nn.Module, policy: CompressionPolicy, context: CompressionContext) -> nn.Module:
        """See `Transform.apply`."""
        check_names(policy.int8_layers, model, policy)
        wanted = set(policy.int8_layers)
        known = {*_QUANTIZED, nn.LSTM}
        names = [n for n, m in model.named_modules() if type(m) in known and _is_int8(n, m, wanted)]
        if not names:
            return model
        model = copy.deepcopy(model)
        method = calibration(context.quantization)
        for name in names:
            layer = model.get_submodule(name)
            if type(layer) is nn.LSTM:
                layer.__class__ = QuantLSTM
                continue
            layer.__class__ = _QUANTIZED[type(layer)]
            assert isinstance(layer, Int8Layer)
            layer.input_quantizer = ActivationQuantizer(method)
            layer.simulate, layer.learned = True, None
        return model


def _is_int8(name: str, module: nn.Module, wanted: set[str]) -> bool:
    parent, _, child = name.rpartition(".")
    if name in wanted:
        return True
    # Of a factorized linear layer only the first factor is int8: OpenVINO 2026.4 gives garbage for an int8 matrix
    # product that feeds another one directly (found by the check of every engine against torch); the second is small.
    return parent in wanted and not (isinstance(module, nn.Linear) and child != "0")


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, Int8Layer]]:
    """Yield the int8 layers and their names, in the model's order."""
    for name, module in model.named_modules():
        if isinstance(module, Int8Layer):
            yield name, module


def activation_ranges(model: nn.Module) -> dict[str, QuantizationRange]:
    """Return the input quantization of every int8 layer, by name."""
    return {name: layer.input_quantizer.range() for name, layer in quantized_layers(model)}


@contextmanager
def quantization_mode(model: nn.Module, mode: str) -> Iterator[None]:
    """Run the block with every quantizer in `mode` (``"quantize"``, ``"observe"``, ``"off"``) and restore it after.

    Weights are rounded only in ``"quantize"``.
    """
    before = [(layer, layer.simulate, layer.input_quantizer.mode) for _, layer in quantized_layers(model)]
    lstms = [(lstm, lstm.simulate) for _, lstm in int8_lstms(model)]
    for layer, _, _ in before:
        layer.simulate = mode == "quantize"
        layer.input_quantizer.mode = mode
    for lstm, _ in lstms:
        lstm.simulate = mode == "quantize"
    try:
        yield
    finally:
        for layer, simulate, old in before:
            layer.simulate = simulate
            layer.input_quantizer.mode = old
        for lstm, simulate in lstms:
            lstm.simulate = simulate


@contextmanager
def observing(model: nn.Module) -> Iterator[None]:
    """Set every activation range from what `model` is given in the block; changes `model` in place.

    Raises:
        CompressionError: A layer saw only zeros, a value that is not finite, or no data.
    """
    # `smoothing` is made of what is here.
    from autocompress.compress.smoothing import smooth, watching

    layers = list(quantized_layers(model))
    for _, layer in layers:
        layer.input_quantizer.forget()
    with quantization_mode(model, "observe"), watching(model) as seen:
        yield
    for name, layer in layers:
        layer.input_quantizer.finish(name)
        layer.simulate = True
    smooth(model, seen)


def calibrate(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Set every activation range from `batches` of inputs ``(N, ...)``, streamed; changes `model` in place.

    Raises:
        CompressionError: See `observing`.
    """
    if not any(quantized_layers(model)):
        return
    model.eval()
    with observing(model), torch.no_grad():
        for inputs in batches:
            model(inputs)
