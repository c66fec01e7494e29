"""A Bayesian linear model of effects that add up: one per choice of every parameter, and some of pairs of choices.

The model is kept in the space of observations (kernel form), so its cost grows with trials and not with choices: adding
a trial adds a row to the kernel matrix, a posterior is one Cholesky factorisation, and a draw is a draw from the
prior corrected by the data (Matheron's rule; Wilson et al., "Efficiently sampling functions from Gaussian process
posteriors", 2020). Knows numbers only: neither Optuna nor what the choices mean.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.linalg import cho_factor, cho_solve, solve_triangular

from autocompress.exploration.knapsack.problem import Array, Index

_JITTER = 1e-9
# Correlation length of the residual, as a fraction of `Prior.reach`.
_LENGTH = 0.3


@dataclass(frozen=True)
class Prior:
    """What is believed of the effects before the first observation.

    Attributes:
        mean: `(parameters, widest)`, padded with zeros.
        own_sd: `(parameters, widest)`: by how much each effect may be off on its own.
        common_sd: `(parameters, widest)`: by how much all effects of a parameter may be off together.
        scale_sd: By how much the mean of everything may be off, as a factor.
        intercept_sd: Of a constant in every observation.
        pairs: `(pairs, 2)` parameters whose effects may interact.
        severity: `(parameters, widest)`, in [0, 1]: an interaction is a weight times the product of two severities.
        shared: `(features, parameters, widest)`: effects that many parameters have in common, each of which may be off
            by a draw with a standard deviation of 1; what all layers lose in int8 says something of the next one.
        reach: `(parameters,)`, summing to 1: how much each parameter makes two rows unlike.
        local_sd: Standard deviation of the residual that is not additive, correlated between rows that are alike.
    """

    mean: Array
    own_sd: Array
    common_sd: Array
    scale_sd: float
    intercept_sd: float
    pairs: Index
    severity: Array
    shared: Array
    reach: Array
    local_sd: float


@dataclass(frozen=True)
class Scales:
    """What evidence decides: how far effects stray from their prior, and how well they explain what is seen.

    Attributes:
        effects: Multiplies the prior variance of every effect.
        pairs: Variance of an interaction's weight; 0 leaves interactions out.
        noise: Multiplies the variance of every observation.
        local: Multiplies the prior variance of what does not add up.
        constant: Multiplies the prior variance of the constant in every observation.
    """

    effects: float = 1.0
    pairs: float = 0.0
    noise: float = 1.0
    local: float = 0.0
    constant: float = 0.0


@dataclass(frozen=True)
class Effects:
    """One belief: effects `(parameters, widest)`, weights of pairs, the constant, the factor of known offsets."""

    effects: Array
    pairs: Array
    intercept: float
    scale: float = 1.0


class AdditiveModel:
    """Rows of choices, and the kernel between them.

    A row holds the position of each parameter's choice, or -1 for a parameter that takes no part.

    Args:
        prior: Beliefs; `mean` may be changed with `set_prior` only.
        capacity: Rows kept; adding beyond it is an error, `replace` takes the place of an old one.
    """

    def __init__(self, prior: Prior, capacity: int) -> None:
        self.capacity = capacity
        self.count = 0
        parameters = prior.mean.shape[0]
        self._parameters = np.arange(parameters)
        start = min(64, capacity)
        self.rows = np.full((start, parameters), -1, np.int64)
        self._alike = np.zeros((start, start))
        self._offsets = np.zeros(start)
        self._kernel = np.zeros((start, start))
        self.set_prior(prior)

    def set_prior(self, prior: Prior) -> None:
        """Take other beliefs; what has been observed stays."""
        self.prior, self._whole = prior, float(prior.reach.sum())

        def pad(values: Array) -> Array:
            # Position -1 reads the last column: a parameter that takes no part adds nothing.
            return np.concatenate([values, np.zeros((len(values), 1))], 1)

        self._mean, self._own = pad(prior.mean), pad(prior.own_sd) ** 2
        self._common, self._severity = pad(prior.common_sd), pad(prior.severity)
        # What is read together lies together.
        shared = np.concatenate([prior.shared, np.zeros((*prior.shared.shape[:2], 1))], 2)
        self._shared = np.ascontiguousarray(shared.transpose(1, 2, 0))
        self._in_common = np.zeros((len(self.rows), len(prior.shared)))
        self._common_of = np.zeros(self.rows.shape)
        self._means = np.zeros(len(self.rows))
        self._products = np.zeros((len(self.rows), len(prior.pairs)))
        count, self.count = self.count, 0
        for i in range(count):
            self._fill(i, self.rows[i].copy(), self._offsets[i], None)
            self.count = i + 1

    def weights_of(self, row: Index) -> Array:
        """Return what each parameter of a row counts where another row has the same, `(parameters, 2)`.

        First of effects, then of what does not add up.
        """
        return np.stack([self._own[self._parameters, row], self.prior.reach], 1)

    def equal(self, row: Index, position: int, weights: Array) -> Array:
        """Return the sums of `weights` `(parameters, n)` over what each row has in common with one, `(rows, n)`.

        That one is to stand at `position`. Models that hold the same rows find theirs together, for `add` or `replace`.
        """
        found = np.ones((max(self.count, position + 1), len(row)))
        found[: self.count] = self.rows[: self.count] == row
        found[position] = 1.0
        return found @ weights

    def add(self, row: Index, offset: float = 0.0, equal: Array | None = None) -> int:
        """Add an observation's choices; return its position.

        Args:
            row: Position of each parameter's choice, or -1.
            offset: Known part of the observation that the factor of the prior means multiplies, too.
            equal: What `equal` returns for `weights_of` this row, where it is known.
        """
        if self.count == self.capacity:
            raise ValueError(f"the model holds its {self.capacity} rows already")
        if self.count == len(self.rows):
            self._grow()
        self._fill(self.count, row, offset, equal)
        self.count += 1
        return self.count - 1

    def replace(self, position: int, row: Index, offset: float = 0.0, equal: Array | None = None) -> None:
        """Let another observation take the place of one; arguments as of `add`."""
        self._fill(position, row, offset, equal)

    def _grow(self) -> None:
        size = min(2 * len(self.rows), self.capacity)
        more = size - len(self.rows)
        self.rows = np.concatenate([self.rows, np.full((more, self.rows.shape[1]), -1, np.int64)])
        self._kernel = np.pad(self._kernel, ((0, more), (0, more)))
        self._alike = np.pad(self._alike, ((0, more), (0, more)))
        self._offsets, self._means = np.pad(self._offsets, (0, more)), np.pad(self._means, (0, more))
        self._products = np.pad(self._products, ((0, more), (0, 0)))
        self._in_common = np.pad(self._in_common, ((0, more), (0, 0)))
        self._common_of = np.pad(self._common_of, ((0, more), (0, 0)))

    def _fill(self, i: int, row: Index, offset: float, equal: Array | None) -> None:
        equal = self.equal(row, i, self.weights_of(row)) if equal is None else equal
        self.rows[i], self._offsets[i] = row, offset
        size = max(self.count, i + 1)
        self._common_of[i] = self._common[self._parameters, row]
        own, alike = equal.T
        line = self._common_of[:size] @ self._common_of[i] + own
        self._kernel[i, :size] = self._kernel[:size, i] = line
        self._alike[i, :size] = self._alike[:size, i] = np.exp((alike - self._whole) / _LENGTH)
        self._means[i] = self._mean[self._parameters, row].sum() + offset
        self._in_common[i] = self._shared[self._parameters, row].sum(0)
        if len(self.prior.pairs):
            severity = self._severity[self._parameters, row]
            self._products[i] = severity[self.prior.pairs[:, 0]] * severity[self.prior.pairs[:, 1]]

    def alike(self, rows: Index, others: Index) -> Array:
        """Return how alike rows are, `(rows, others)`, in (0, 1]."""
        unlike = np.stack([(others != row) @ self.prior.reach for row in rows])
        found: Array = np.exp(-unlike / _LENGTH)
        return found

    @property
    def prior_totals(self) -> Array:
        """Prior mean of every row."""
        return self._means[: self.count]

    def fit(self, observed: Array, variances: Array, scales: Scales, rows: Index | None = None) -> Posterior:
        """Condition on what was observed in every row, or in some.

        Args:
            observed: `(rows,)`.
            variances: `(rows,)`, of each observation's noise, before `scales.noise`.
            scales: How much prior and noise vary.
            rows: Positions of the rows that `observed` belongs to, where they are not all.
        """
        at = np.arange(self.count) if rows is None else rows
        block = np.ix_(at, at)
        means, products, common = self._means[at], self._products[at], self._in_common[at]
        matrix = scales.effects * self._kernel[block] + self.prior.scale_sd**2 * np.outer(means, means)
        matrix += scales.constant * self.prior.intercept_sd**2 + common @ common.T
        if scales.pairs:
            matrix += scales.pairs * products @ products.T
        if scales.local:
            matrix += scales.local * self.prior.local_sd**2 * self._alike[block]
        matrix[np.diag_indices(len(at))] += scales.noise * variances + _JITTER * (1 + matrix.diagonal())
        return Posterior(
            self, scales, np.asarray(observed, float), noise=scales.noise * variances, matrix=matrix, at=at
        )

    def total(self, effects: Effects, rows: Index, offsets: Array | float = 0.0) -> Array:
        """Return the sum of effects of rows `(n, parameters)`, with the offsets they have."""
        padded = np.concatenate([effects.effects, np.zeros((len(effects.effects), 1))], 1)
        total: Array = padded[self._parameters, rows].sum(1) + effects.intercept + effects.scale * offsets
        if effects.pairs.any():
            severity = self._severity[self._parameters, rows]
            first, second = self.prior.pairs.T
            total = total + (severity[:, first] * severity[:, second]) @ effects.pairs
        return total


class Posterior:
    """A model conditioned on observations."""

    def __init__(
        self, model: AdditiveModel, scales: Scales, observed: Array, *, noise: Array, matrix: Array, at: Index
    ) -> None:
        self._model, self._scales, self._noise = model, scales, noise
        self._factor = cho_factor(matrix, lower=True, check_finite=False)
        # Copies: rows may be replaced while the posterior lives.
        self._rows, self._offsets = model.rows[at], model._offsets[at]
        self._products, self._common, self._means = model._products[at], model._in_common[at], model._means[at]
        self._observed = observed
        self._weight = self._solve(observed - self._means)
        prior = model.prior
        self._prior = Effects(prior.mean, np.zeros(len(prior.pairs)), 0.0)

    def _solve(self, residual: Array) -> Array:
        found: Array = cho_solve(self._factor, residual, check_finite=False)
        return found

    def log_score(self) -> Array:
        """Return the log density of each observation given all others (leave-one-out), `(rows,)`."""
        error, variance = self._errors()
        return -0.5 * (np.log(2 * np.pi * variance) + error**2 / variance)

    def left_out(self) -> Array:
        """Return what each observation is expected to be, given all others, `(rows,)`."""
        return self._observed - self._errors()[0]

    def _errors(self) -> tuple[Array, Array]:
        """Return error and variance of each observation given all others, `(rows,)` each."""
        inverse = self._solve(np.eye(len(self._rows)))
        variance = 1 / inverse.diagonal()
        return self._weight * variance, variance

    def mean(self) -> Effects:
        """Return the expected effects."""
        return self._corrected(self._prior, self._weight)

    def draw(self, rng: np.random.Generator) -> Effects:
        """Return effects drawn from the posterior."""
        model, prior, scales = self._model, self._model.prior, self._scales
        shape = prior.mean.shape
        scale = 1 + prior.scale_sd * rng.standard_normal()
        strayed = prior.own_sd * rng.standard_normal(shape) + prior.common_sd * rng.standard_normal((shape[0], 1))
        together = np.tensordot(rng.standard_normal(len(prior.shared)), prior.shared, 1)
        start = Effects(
            scale * prior.mean + together + np.sqrt(scales.effects) * strayed,
            np.sqrt(scales.pairs) * rng.standard_normal(len(prior.pairs)),
            np.sqrt(scales.constant) * prior.intercept_sd * rng.standard_normal(),
            scale,
        )
        seen = model.total(start, self._rows, self._offsets)
        seen = seen + np.sqrt(self._noise) * rng.standard_normal(len(self._rows))
        return self._corrected(start, self._solve(self._observed - seen))

    def local(self, rows: Index) -> Array:
        """Return what is expected of rows `(n, parameters)` beside their effects, from rows like them, `(n,)`."""
        scale = self._scales.local * self._model.prior.local_sd**2
        if not scale:
            return np.zeros(len(rows))
        found: Array = scale * self._model.alike(rows, self._rows) @ self._weight
        return found

    def pair_sd(self) -> Array:
        """Return the standard deviation of each pair's weight."""
        whitened = solve_triangular(self._factor[0], self._products, lower=True, check_finite=False)
        variance = self._scales.pairs - self._scales.pairs**2 * (whitened**2).sum(0)
        found: Array = np.sqrt(np.maximum(variance, 0.0))
        return found

    def _corrected(self, start: Effects, weight: Array) -> Effects:
        """Add to effects what a residual, multiplied by the inverse of the kernel, says of them."""
        model, prior, scales = self._model, self._model.prior, self._scales
        width = prior.mean.shape[1]
        # How much each choice was part of, `(parameters, widest)`; position -1 falls into a last column.
        flat = np.where(self._rows < 0, width, self._rows) + model._parameters * (width + 1)
        part = np.bincount(
            flat.ravel(), np.repeat(weight, self._rows.shape[1]), minlength=len(model._parameters) * (width + 1)
        ).reshape(-1, width + 1)[:, :width]
        common = prior.common_sd * (prior.common_sd * part).sum(1, keepdims=True)
        change = scales.effects * (prior.own_sd**2 * part + common)
        factor = prior.scale_sd**2 * float(weight @ self._means)
        together = np.tensordot(self._common.T @ weight, prior.shared, 1)
        change = change + factor * prior.mean + together
        return Effects(
            start.effects + change,
            start.pairs + scales.pairs * (self._products.T @ weight),
            start.intercept + scales.constant * prior.intercept_sd**2 * float(weight.sum()),
            start.scale + factor,
        )
