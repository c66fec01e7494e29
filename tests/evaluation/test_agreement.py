from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from autocompress.errors import VerificationError
from autocompress.evaluation.agreement import check_outputs_match, relative_error
from autocompress.policy import CompressionPolicy, LayerPolicy

EXPECTED = np.array([[3.0, 4.0]])  # RMS 5 / sqrt(2)
INT8 = CompressionPolicy(layers={"conv": LayerPolicy("int8")})
ONNX = Path("model.onnx")


def test_the_error_is_relative_to_what_is_expected() -> None:
    assert relative_error(EXPECTED, EXPECTED + np.array([[0.3, 0.4]])) == pytest.approx(0.1)


def test_where_int8_moves_much_rounding_may_move_half_of_it() -> None:
    found = EXPECTED * 1.2
    with pytest.raises(VerificationError, match=r"relative error 0.2, allowed 0.1 for fp32/int8"):
        check_outputs_match("the engine", EXPECTED, found, INT8, ONNX)
    check_outputs_match("the engine", EXPECTED, found, INT8, ONNX, int8_error=lambda: 0.5)
    with pytest.raises(VerificationError, match=r"allowed 0.15"):
        check_outputs_match("the engine", EXPECTED, found, INT8, ONNX, int8_error=lambda: 0.3)


def test_without_int8_there_is_no_such_allowance() -> None:
    with pytest.raises(VerificationError, match=r"allowed 0.002 for fp32"):
        check_outputs_match("the engine", EXPECTED, EXPECTED * 1.2, CompressionPolicy(), ONNX, int8_error=lambda: 0.5)


def test_what_rounding_does_to_a_broken_network_is_no_fault_of_the_engine() -> None:
    half = CompressionPolicy(dense_dtype="bf16")
    check_outputs_match("the engine", EXPECTED, EXPECTED * 1.2, half, ONNX, rounding_error=lambda: 0.12)
    with pytest.raises(VerificationError, match=r"relative error 0.2, allowed 0.1 for bf16"):
        check_outputs_match("the engine", EXPECTED, EXPECTED * 1.2, half, ONNX, rounding_error=lambda: 0.02)
    # However far rounding leads, a wrong graph does not pass.
    with pytest.raises(VerificationError, match=r"allowed 0.5"):
        check_outputs_match("the engine", EXPECTED, EXPECTED * 1.9, half, ONNX, rounding_error=lambda: 5.0)
