"""A Gaussian process with a linear part, a smooth part of its own length for every coordinate, and one for each group.

Numpy and scipy alone, for a few thousand points: what the latency predictor needs, hyperparameters chosen by marginal
likelihood with exact gradients. (Rasmussen and Williams, Gaussian Processes for Machine Learning, 2006: automatic
relevance determination in section 5.1, equation 5.9 for the gradient, 5.12 for leaving out.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import LinAlgError, cho_factor, cho_solve
from scipy.optimize import minimize

Matrix = NDArray[np.float64]
Whole = NDArray[np.int64]

# Amplitudes: smooth, rough, smooth within a group, linear, noise. Their logs' spread, and that of the lengths'.
_PARTS = 5
_AMPLITUDE_SPREAD, _LENGTH_SPREAD = 2.5, 1.0
# How much shorter the rough part's lengths are.
_ROUGH = 1.5
_JITTER = 1e-8
# Rows of a covariance that are computed at once: of 2,000 points the matrix takes 32 MB, and each of its parts would.
_ROWS = 256


@dataclass(frozen=True)
class Points:
    """Where the process is looked at.

    Attributes:
        smooth: Coordinates ``(N, D)``, each of a spread of about 1.
        linear: Features of the linear part ``(N, P)``, likewise.
        group_ids: Group of each point ``(N,)``; each group has a smooth part of its own.
    """

    smooth: Matrix
    linear: Matrix
    group_ids: Whole

    def __getitem__(self, rows: Whole | slice) -> Points:
        return Points(self.smooth[rows], self.linear[rows], self.group_ids[rows])

    def __len__(self) -> int:
        return len(self.group_ids)


class GaussianProcess:
    """Regression on noisy values.

    Args:
        lengths: Number of smooth coordinates and their usual length.
        amplitudes: Prior mean of the log variances: of the smooth, the rough, the per-group and the linear part, and of
            the noise.
        tuned_on: At most this many points choose the hyperparameters.
    """

    def __init__(self, lengths: tuple[int, float], amplitudes: Sequence[float], *, tuned_on: int = 500) -> None:
        count, usual = lengths
        self._start = np.concatenate([np.full(count, math.log(usual)), np.asarray(amplitudes, np.float64)])
        self._spread = np.concatenate([np.full(count, _LENGTH_SPREAD), np.full(_PARTS, _AMPLITUDE_SPREAD)])
        self._hyper = self._start
        self._tuned_on = tuned_on

    # -- learning -----------------------------------------------------------------------------------------------------

    def tune(self, points: Points, values: Matrix, noise: Matrix, *, steps: int = 40, seed: int = 0) -> None:
        """Choose the hyperparameters for values ``(N,)`` whose noise has at least these variances ``(N,)``."""
        rows = np.random.default_rng(seed).permutation(len(points))[: self._tuned_on]
        points, noise = points[rows], noise[rows]
        values = values[rows] - values.mean()

        def loss(hyper: Matrix) -> tuple[float, Matrix]:
            far = (hyper - self._start) / self._spread
            found = _evidence(hyper, points, values, noise)
            if found is None:
                return 1e12, np.asarray(far)
            return found[0] + 0.5 * float(far @ far), np.asarray(found[1] + far / self._spread)

        bounds = [
            (start - 3 * spread, start + 3 * spread) for start, spread in zip(self._start, self._spread, strict=True)
        ]
        found = minimize(loss, self._hyper, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": steps})
        self._hyper = np.asarray(found.x)

    def condition(self, points: Points, values: Matrix, noise: Matrix) -> None:
        """Learn values ``(N,)``, with the hyperparameters as they are."""
        self._points, self._mean = points, float(values.mean())
        self._values = values - self._mean
        covariance = _covariance(self._hyper, points, points)
        covariance[np.diag_indices_from(covariance)] += noise + self.noise + _JITTER
        # Of a symmetric matrix the transpose is the same, and LAPACK factors it where it lies.
        self._factor = cho_factor(covariance.T, lower=True, overwrite_a=True)
        self._weights: Matrix = cho_solve(self._factor, self._values)
        self._short = _FastMean(self._hyper, points, self._weights)

    @property
    def noise(self) -> float:
        """Variance of what the parts do not explain."""
        return math.exp(self._hyper[-1])

    # -- asking -------------------------------------------------------------------------------------------------------

    def mean(self, points: Points) -> Matrix:
        """Return the expected values ``(N,)``, in single precision."""
        return self._short.mean(points) + self._mean

    def moments(self, points: Points) -> tuple[Matrix, Matrix]:
        """Return the expected values ``(N,)`` and their covariance ``(N, N)``, noise left out."""
        across = _covariance(self._hyper, points, self._points)
        explained = across @ cho_solve(self._factor, across.T)
        covariance = np.asarray(_covariance(self._hyper, points, points) - explained)
        return np.asarray(across @ self._weights + self._mean), covariance

    def left_out(self, groups: Sequence[Whole]) -> list[tuple[Matrix, Matrix]]:
        """Return for each group of learned points what all others say of them: values, and variances with noise."""
        inverse = cho_solve(self._factor, np.eye(len(self._points), order="F"), overwrite_b=True)
        found = []
        for rows in groups:
            own = np.linalg.inv(inverse[np.ix_(rows, rows)])
            found.append((self._values[rows] + self._mean - own @ self._weights[rows], np.diag(own)))
        return found


class _FastMean:
    """What means alone take: asked for far more often than moments, and seven digits are plenty.

    All that does not depend on where the process is asked for is computed once.
    """

    def __init__(self, hyper: Matrix, points: Points, weights: Matrix) -> None:
        self._lengths = np.exp(hyper[:-_PARTS])
        self._smooth, self._rough, self._own, linear = (float(value) for value in np.exp(hyper[-_PARTS:-1]))
        self._scaled = (points.smooth / self._lengths).astype(np.float32)
        self._norms = (self._scaled**2).sum(1)
        self._weights = weights.astype(np.float32)
        groups = np.unique(points.group_ids)
        self._of_group = {int(group): np.flatnonzero(points.group_ids == group) for group in groups}
        self._slope = points.linear.T @ weights * (linear / max(points.linear.shape[1], 1))

    def mean(self, points: Points) -> Matrix:
        """Return the expected values ``(N,)`` less the learned ones' mean."""
        scaled = (points.smooth / self._lengths).astype(np.float32)
        found = np.array([self._one(row, int(group)) for row, group in zip(scaled, points.group_ids, strict=True)])
        return np.asarray(found + [float(row @ self._slope) for row in points.linear])

    def _one(self, scaled: Matrix, group: int) -> float:
        """Return what the smooth, the rough and the own part say at one place.

        One at a time: a product of matrices rounds a row otherwise beside other rows, so that what was asked for before
        would decide a digit.
        """
        away = self._scaled @ scaled
        away *= -2
        away += self._norms
        away += scaled @ scaled
        np.maximum(away, 0, out=away)
        near = np.exp(-0.5 * away)
        np.sqrt(away, out=away)
        away *= math.sqrt(3) * _ROUGH
        fading = np.exp(-away)
        away += 1
        away *= fading
        found = self._smooth * float(near @ self._weights) + self._rough * float(away @ self._weights)
        own = self._of_group.get(group)
        return found if own is None else found + self._own * float(near[own] @ self._weights[own])


def _squares(left: Matrix, right: Matrix) -> Matrix:
    found = (left**2).sum(1)[:, None] + (right**2).sum(1)[None] - 2 * left @ right.T
    return np.asarray(np.maximum(found, 0.0))


def _covariance(hyper: Matrix, left: Points, right: Points) -> Matrix:
    found = np.empty((len(left), len(right)))
    for start in range(0, len(left), _ROWS):
        found[start : start + _ROWS] = _covariance_of_rows(hyper, left[start : start + _ROWS], right)
    return found


def _covariance_of_rows(hyper: Matrix, left: Points, right: Points) -> Matrix:
    lengths, (smooth, rough, own, linear, _) = np.exp(hyper[:-_PARTS]), np.exp(hyper[-_PARTS:])
    squares = _squares(left.smooth / lengths, right.smooth / lengths)
    near = np.exp(-0.5 * squares)
    away = np.sqrt(squares) * (math.sqrt(3) * _ROUGH)
    found = near * smooth
    found += own * near * (left.group_ids[:, None] == right.group_ids[None])
    found += rough * (1 + away) * np.exp(-away)
    found += (linear / max(left.linear.shape[1], 1)) * (left.linear @ right.linear.T)
    return np.asarray(found)


def _evidence(hyper: Matrix, points: Points, values: Matrix, noise: Matrix) -> tuple[float, Matrix] | None:
    """Return the negative log marginal likelihood and its gradient; None where it is not to be had."""
    lengths, (smooth, rough, own, linear, free) = np.exp(hyper[:-_PARTS]), np.exp(hyper[-_PARTS:])
    scaled = points.smooth / lengths
    squares = _squares(scaled, scaled)
    near = np.exp(-0.5 * squares)
    away = math.sqrt(3) * _ROUGH * np.sqrt(squares)
    fading = np.exp(-away)
    alike = near * (points.group_ids[:, None] == points.group_ids[None])
    wide = (1 + away) * fading
    straight = points.linear @ points.linear.T / max(points.linear.shape[1], 1)
    covariance = smooth * near + rough * wide + own * alike + linear * straight
    covariance[np.diag_indices_from(covariance)] += noise + free + _JITTER
    try:
        factor = cho_factor(covariance, lower=True)
    except LinAlgError:
        return None
    inverse = cho_solve(factor, np.eye(len(values)))
    weights = inverse @ values
    loss = 0.5 * float(values @ weights) + float(np.log(np.diag(factor[0])).sum())
    slope = 0.5 * (inverse - np.outer(weights, weights))
    # How the covariance of two points moves with their squared distance along one coordinate.
    pull = slope * (smooth * near + own * alike + 3 * _ROUGH**2 * rough * fading)
    by_length = 2 * (pull.sum(1) @ scaled**2 - np.einsum("nd,nd->d", scaled, pull @ scaled))
    parts = [smooth * near, rough * wide, own * alike, linear * straight]
    by_amplitude = [float((slope * part).sum()) for part in parts] + [free * float(np.trace(slope))]
    return loss, np.concatenate([by_length, by_amplitude])
