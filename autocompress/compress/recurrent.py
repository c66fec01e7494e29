"""Int8 LSTMs in the torch model: weights rounded as the engine stores them.

What an LSTM reads and its states are rounded by the engine while it runs, each time to the range that they have then
(dynamic quantization): nothing is calibrated, and that rounding, to 1/255 of the range, is not simulated.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from autocompress.catalogue import Method
from autocompress.compress.rounding import fake_quantize_weight

METHOD = Method(
    "int8-lstm",
    "quantization",
    "LSTMs: weights per channel, what they read rounded at run time",
    "ONNX Runtime, operator DynamicQuantizeLSTM",
    ("onnxruntime",),
)


class QuantLSTM(nn.LSTM):
    """An LSTM that computes with the weights of the int8 engine; biases stay as they are.

    Attributes:
        simulate: Whether weights are rounded.
    """

    # Of the class: an `nn.LSTM` becomes one by its class alone.
    simulate = True

    def forward(self, input: Any, hx: tuple[Tensor, Tensor] | None = None) -> Any:
        """Map as `torch.nn.LSTM` does."""
        if not self.simulate:
            return super().forward(input, hx)
        kept = self._flat_weights
        rounded = [
            fake_quantize_weight(weight) if weight is not None and name.startswith("weight") else weight
            for name, weight in zip(self._flat_weights_names, kept, strict=True)
        ]
        self._flat_weights = rounded
        try:
            return super().forward(input, hx)
        finally:
            self._flat_weights = kept

    def stacked(self) -> list[tuple[Tensor, Tensor]]:
        """Return, of each layer, the weights of its input and of its states, directions stacked.

        Shapes are ``(directions, 4 hidden, in)`` and ``(directions, 4 hidden, hidden)``; gates are in torch's order:
        input, forget, cell, output.
        """
        ends = ("", "_reverse") if self.bidirectional else ("",)
        return [
            (
                _stack([getattr(self, f"weight_ih_l{layer}{end}") for end in ends]),
                _stack([getattr(self, f"weight_hh_l{layer}{end}") for end in ends]),
            )
            for layer in range(self.num_layers)
        ]


def _stack(weights: list[Tensor]) -> Tensor:
    return torch.stack([weight.detach().float() for weight in weights])


def int8_lstms(model: nn.Module) -> Iterator[tuple[str, QuantLSTM]]:
    """Yield the int8 LSTMs and their names, in the model's order."""
    for name, module in model.named_modules():
        if isinstance(module, QuantLSTM):
            yield name, module
