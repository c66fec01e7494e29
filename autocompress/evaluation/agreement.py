"""Whether two forms of one model compute the same: torch, ONNX graph, engine file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from autocompress.engines.base import Array
from autocompress.errors import VerificationError
from autocompress.policy import CompressionPolicy

# Largest relative error (RMS of the difference over RMS of the expected outputs) between two forms of one model on the
# reference inputs. The torch model computes in fp32 with int8 simulated; bf16 keeps 8 bits of mantissa in every layer,
# and one rounding flipped by it moves an int8 code by a whole step, so those bounds are wide. They catch a wrong graph
# (errors near 1), not rounding: accuracy is always computed by the engine itself.
TOLERANCES = {"fp32": 2e-3, "fp16": 2e-2, "bf16": 0.1, "int8": 0.1}
# Where a dtype's rounding itself moves the outputs far, as of a network that pruning has broken, an engine may be off
# by this many times what torch is in that dtype, but never by as much as a wrong graph is.
_ROUNDING, _MOST_ROUNDING = 2.0, 0.5
# Where int8 itself moves the outputs far, so do the codes that a runtime rounds to the other side of a step. A graph
# that leaves int8 out of a model, or puts it in another place, is off by about the whole of what int8 does.
INT8_SHARE = 0.5


def relative_error(expected: Array, found: Array) -> float:
    """Return the RMS of the difference over the RMS of `expected`."""
    scale = float(np.sqrt(np.mean(np.square(expected, dtype=np.float64))))
    return float(np.sqrt(np.mean(np.square(expected - found, dtype=np.float64)))) / max(scale, 1e-12)


def check_outputs_match(
    what: str, expected: Array, found: Array, policy: CompressionPolicy, onnx: Path, *, dense_dtype: str | None = None,
    int8_error: Callable[[], float] | None = None, rounding_error: Callable[[], float] | None = None,
) -> None:  # fmt: skip
    """Check outputs ``(N, ...)`` against what the model computes, as closely as the policy's dtypes allow.

    Args:
        what: What gave the outputs, for the message.
        expected: What it should give.
        found: What it gave.
        policy: Of the model.
        onnx: Its graph, for the message.
        dense_dtype: What layers that are not int8 ran in; None is the policy's.
        int8_error: Relative error that int8 itself makes of this model; asked for when it decides.
        rounding_error: Relative error that torch makes of this model in the dense dtype; asked for when it decides.

    Raises:
        VerificationError: Shapes or values differ.
    """
    if expected.shape != found.shape:
        raise VerificationError(f"{what} gives outputs {found.shape}, the model {expected.shape} ({onnx}).")
    kinds = {dense_dtype or policy.dense_dtype, *(["int8"] if policy.int8_layers else [])}
    error = relative_error(expected, found)
    tolerance = max(TOLERANCES[kind] for kind in kinds)
    if error > tolerance and "int8" in kinds and int8_error is not None:
        tolerance = max(tolerance, INT8_SHARE * int8_error())
    if error > tolerance and rounding_error is not None:
        tolerance = max(tolerance, min(_ROUNDING * rounding_error(), _MOST_ROUNDING))
    if not error <= tolerance:
        raise VerificationError(
            f"{what} differs from the torch model: relative error {error:.3g}, allowed {tolerance:.3g} for "
            f"{'/'.join(sorted(kinds))}. The graph is kept at {onnx}."
        )
