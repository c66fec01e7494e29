"""How an engine wants its QuantizeLinear/DequantizeLinear pairs; each engine's file says it of its own, `graph` obeys.

The rules for TensorRT follow NVIDIA's "Q/DQ layer placement recommendations" (TensorRT developer guide, explicit
quantization) and the exclusions of its Model Optimizer (modelopt.onnx.quantization: channels and matrix dimensions
below 16, residual inputs).
"""

from __future__ import annotations

import json
from dataclasses import dataclass

# Rounding commutes with them exactly.
MONOTONE = frozenset({"MaxPool", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose"})
# How codes are chosen, whatever the rules. 2: those behind a ReLU are unsigned, as calibration makes them.
_CODES = 2


@dataclass(frozen=True)
class QdqRules:
    """How one engine wants its Q/DQ. Every field is one rule; off or empty, the engine has no such wish.

    Attributes:
        hoist: Ops that a pair moves above: rounding commutes with them exactly, and the op then runs on int8.
        int32_bias: Whether biases are stored as int32 with the scale of the accumulator, as the engine's fusion needs.
            TensorRT has no int32 DequantizeLinear and refuses the graph: its biases stay in the dense dtype.
        signed_only: Whether activations must be int8, never uint8. TensorRT quantizes around zero; it reads uint8 codes
            as int8 without a word, which cuts off the upper half of them.
        unsigned_only: Whether activations must be uint8, those of both signs around 128. ONNX Runtime computes a
            convolution in int8 only where what it reads and what it gives are of one type, and on x86 has kernels of
            uint8 alone.
        shifted_codes: Whether a convolution's signed codes are uint8 around 128 where the pair stands behind a Concat
            or other ops between it and the convolution. OpenVINO 2026.4 makes them so itself, and computes garbage
            there: behind a Concat always, elsewhere if the convolution's result is joined to others by one.
        hoist_concat: Whether a pair moves above a Concat, one of the same scale onto each input. Exact, and without it
            the parts are joined in the dense dtype and written twice.
        share_residual: Whether the shortcut of an Add that a convolution's output joins reads the int8 tensor that the
            block's first layer reads. The sum is then fused into the convolution and leaves it as int8; no pair ever
            stands between the convolution and the Add, which would cut that fusion.
        least_channels: Convolutions with fewer input or output channels stay dense, unless the number is a multiple of
            8; matrix products with fewer rows or columns always do. int8 Tensor Core kernels pad to this.
        dense_depthwise: Whether convolutions with few channels per group stay dense: no int8 Tensor Core kernel exists
            for them, so that only the conversions around would remain.
        uneven_bias: Whether matrix products of two dimensions get a bias that is not the same for all channels.
            OpenVINO 2026.4 fuses the next layer's quantization into such a product, and computes garbage when it has
            no bias, or one number for all channels.
        dense_behind_reductions: Whether layers that read a ReduceMax or ReduceMin, or another reduction than the global
            pooling of an image where a norm or a product scales channels before or behind it, stay dense. OpenVINO
            2026.4 fuses the quantization of its result into a reduction, and computes garbage: of maxima and minima
            always, of others where the scale has become that of each channel, but for two axes of an image.
        own_weights: Whether each run of a convolution that runs more than once reads an int8 weight of its own.
            OpenVINO 2026.4 folds what follows a convolution, such as a batch norm, into its weight, and into one that
            two of them read twice.
        quantize_results: Whether all that reads an int8 convolution's result reads it from a pair. ONNX Runtime
            computes a convolution in int8 only between a pair before and one behind; else it dequantizes the weights
            at every call and computes in fp32, slower than a dense layer. The network's own results are left alone,
            and with them the convolutions that give them.
        clip_dense: Whether a dense layer that reads an int8 tensor and gives one needs a Clip before it to stay dense:
            else ONNX Runtime sets its weights to int8, with one step for all (`WeightBiasQuantization`).
        pools_in_layout: Whether a MaxPool is fast only in the layout of the convolution before it, so that a pair moves
            above one only behind an int8 convolution and is kept from moving there elsewhere. ONNX Runtime moves them
            itself, and pools uint8 that does not come from an int8 convolution one number at a time: in ResNet-18
            behind a dense stem that takes 5.6 of 7.8 ms.
        whole_attention: Whether a pair stays below the Transpose and Reshape that follow a product of two activations,
            and off that product itself: the pattern of TensorRT's fused attention kernel is left whole. OpenVINO 2026.4
            computes a bf16 product whose result leaves it as int8 in fp32, with its operands converted (MiniLM: 6 %).
        int8_lstm: Whether there is an operator for LSTMs with int8 weights (`graph.int8_lstm`). ONNX Runtime's takes
            0.38 of its dense one's time (256 units, 50 steps). OpenVINO 2026.4 refuses quantized weights of an LSTM.
    """

    hoist: frozenset[str] = frozenset()
    int32_bias: bool = False
    signed_only: bool = False
    unsigned_only: bool = False
    shifted_codes: bool = False
    hoist_concat: bool = False
    share_residual: bool = False
    least_channels: int = 0
    dense_depthwise: bool = False
    uneven_bias: bool = False
    dense_behind_reductions: bool = False
    own_weights: bool = False
    quantize_results: bool = False
    clip_dense: bool = False
    pools_in_layout: bool = False
    whole_attention: bool = False
    int8_lstm: bool = False

    def identity(self, *, attention: bool) -> str:
        """Return the rules that are on, as text; another one after any change of how int8 networks are made.

        Args:
            attention: Whether the network multiplies activations by each other: without, those rules say nothing of it,
                and are left out, so that tables of before them still fit.
        """
        on = {name: sorted(value) if isinstance(value, frozenset) else value for name, value in vars(self).items()}
        if not attention:
            del on["whole_attention"]
        # They keep layers dense that no table has as int8, or right that came out wrong, which no table has either; and
        # an LSTM that may be int8 is told by the network's layers.
        del on["dense_behind_reductions"], on["own_weights"], on["int8_lstm"]
        return json.dumps({"codes": _CODES, **{name: value for name, value in on.items() if value}}, sort_keys=True)
