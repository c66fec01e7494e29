from __future__ import annotations

import time

import numpy as np
import pytest

from autocompress.measurement.statistics import drift, half_width, mad, median_interval, ratio_interval


def rounds(count: int, each: int, spread: float, seed: int) -> list[np.ndarray]:
    """Samples around 10 ms whose rounds differ by `spread`."""
    rng = np.random.default_rng(seed)
    return [(10 + spread * rng.standard_normal() + 0.1 * rng.random(each)).astype(np.float32) for _ in range(count)]


def test_intervals_contain_the_middle_and_are_repeatable() -> None:
    taken = rounds(10, 50, 0.2, seed=0)
    median, low, high = median_interval(taken, seed=3)
    assert low < median < high
    assert median == pytest.approx(np.median(np.concatenate(taken)))
    assert median_interval(taken, seed=3) == (median, low, high)
    ratios = [0.5, 0.51, 0.49, 0.5, 0.52, 0.48]
    assert ratio_interval(ratios, seed=3) == ratio_interval(ratios, seed=3)
    assert ratio_interval(ratios)[0] == 0.5


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    covered = [low <= 10.05 <= high for _, low, high in (median_interval(rounds(12, 20, 0.2, s)) for s in range(60))]
    # 95 % asked for; the percentile bootstrap of a dozen rounds is a little too narrow.
    assert np.mean(covered) > 0.85


def test_one_round_has_an_interval_of_no_width() -> None:
    assert ratio_interval([0.5]) == (0.5, 0.5, 0.5)


def test_cost_does_not_grow_with_samples() -> None:
    taken = rounds(10, 20_000, 0.1, seed=0)
    start = time.perf_counter()
    median_interval(taken)
    assert time.perf_counter() - start < 1


def test_drift_is_a_trend_and_not_scatter() -> None:
    rng = np.random.default_rng(0)
    scatter = [drift(10 + rng.standard_normal(20)) for _ in range(200)]
    assert np.mean([found != 0 for found in scatter]) < 0.02
    rising = 10 + 0.1 * np.arange(21) + 0.05 * rng.standard_normal(21)
    assert drift(rising) == pytest.approx(2 / 11, rel=0.1)
    assert drift(rising[::-1]) == pytest.approx(-2 / 11, rel=0.1)
    # One round far off, as when another program came by, is no trend.
    assert drift([10.0] * 19 + [20.0]) == 0
    assert drift([1.0, 2.0, 3.0]) == 0


def test_half_width_is_relative() -> None:
    assert half_width(2.0, 1.9, 2.1) == pytest.approx(0.05)
    assert half_width(0.0, 0.0, 0.0) == float("inf")


def test_mad_ignores_outliers() -> None:
    assert mad(np.array([1, 2, 3, 4, 1000], dtype=np.float32)) == 1
