"""What a process over thousands of points takes; what it predicts is the predictor's to test."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from autocompress.prediction import gaussian_process as module
from autocompress.prediction.gaussian_process import GaussianProcess, Points


def learned(count: int) -> GaussianProcess:
    rng = np.random.default_rng(0)
    process = GaussianProcess((6, 3.0), (-2.0, -3.5, -4.5, -2.0, -4.5))
    points = Points(rng.normal(size=(count, 6)), rng.normal(size=(count, 4)), rng.integers(0, 20, count))
    process.condition(points, rng.normal(size=count), np.full(count, 0.01))
    return process


def test_learning_takes_one_matrix_and_leaving_out_another() -> None:
    count = 1200
    tracemalloc.start()
    try:
        process = learned(count)
        once = tracemalloc.get_traced_memory()[1] / (8 * count**2)
        process.left_out([np.arange(start, start + 10) for start in range(0, count, 10)])
        peak, left = (bytes_ / (8 * count**2) for bytes_ in reversed(tracemalloc.get_traced_memory()))
    finally:
        tracemalloc.stop()
    # Rows that are computed at once take 256 / 1200 of a matrix for each of their parts.
    assert once < 2.8 and peak < 2.8 and left < 1.5


def test_rows_at_once_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    few = learned(300)
    monkeypatch.setattr(module, "_ROWS", 10_000)
    whole = learned(300)
    np.testing.assert_allclose(few._weights, whole._weights, rtol=1e-9)
    assert few._factor[1] and few._factor[0].flags.f_contiguous


def test_a_mean_does_not_depend_on_what_is_asked_for_beside_it() -> None:
    process, rng = learned(1500), np.random.default_rng(1)
    points = Points(rng.normal(size=(40, 6)), rng.normal(size=(40, 4)), rng.integers(0, 30, 40))
    alone = [float(process.mean(points[index : index + 1])[0]) for index in range(40)]
    assert process.mean(points).tolist() == alone
    assert process.mean(points[::-1]).tolist() == alone[::-1]
