"""What a sampler believes of losses and costs: beliefs before the first trial, and how trials change them.

`LossModel` chooses, by how well each foresees the trials it has not seen, the link to an additive loss, how far to
trust the sensitivities, and how far effects stray from them. `CostBelief` corrects predicted costs by measured ones: a
factor of everything, a constant, and a difference for each choice. Neither chooses what to try.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import product

import numpy as np

from autocompress.exploration.knapsack.additive_model import AdditiveModel, Effects, Posterior, Prior, Scales
from autocompress.exploration.knapsack.choice_graph import Graph
from autocompress.exploration.knapsack.loss_transforms import LINKS, POWERS, LossTransform
from autocompress.exploration.knapsack.problem import Array, Choice, Index

# Prior standard deviations relative to the prior mean: per choice, per parameter, and their floor.
_OWN, _COMMON, _LEAST = 0.3, 0.8, 0.05
# Prior standard deviations of effects that parameters of one kind share, relative to the mean effect: of all choices of
# the kind, and of the choices at one place of their lists.
_KIND, _LEVEL = 1.5, 0.4
# Grids from which the leave-one-out density chooses. Weight of the measured losses against assumed severity, an
# exponent in the prior mean; 0 is always tried as well:
_TRUSTS = (1.0, 0.5)
# Standard deviation of an observed loss, relative to it:
_RELATIVE_NOISE = (0.05, 0.1, 0.2, 0.4)
# Factor on the prior standard deviations of effects:
_STRAYS = (0.3, 1.0, 3.0, 10.0)
# Prior standard deviation of a pair's interaction, beside none:
_INTERACTIONS = (0.003, 0.03)
# Factor on the standard deviation of the residual that is not additive:
_LOCAL = (0.0, 0.1, 1.0)
# Hyperparameters are chosen again when the number of trials has grown by this factor.
_REFIT = 1.5
# Standard deviation of the constant cost that predictions leave out, relative to the predicted cost of the reference:
# arithmetic knows nothing of a recurrence, of calls, of copies (a CRNN whose LSTM took half of the time: every proposal
# for 0.6x came out at 0.62x to 0.75x).
_CONSTANT = 0.5
# Exact costs that are kept.
_REMEMBERED = 20_000
_FIRST_REFIT = 4


def refit_size(count: int) -> int:
    """Return of how many trials the choice of links and scales is made: the same for any count until the next size."""
    size, following = 0, _FIRST_REFIT
    while following <= count:
        size, following = following, int(np.ceil(following * _REFIT))
    return size


def padded(graph: Graph, flat: Array) -> Array:
    """Return a flat vector of choices as `(parameters, widest)`."""
    widest = max(len(c) for c in graph.choices)
    found = np.zeros((len(graph.names), widest))
    for i, offered in enumerate(graph.choices):
        found[i, : len(offered)] = flat[graph.offsets[i] : graph.offsets[i + 1]]
    return found


def flattened(graph: Graph, table: Array) -> Array:
    """Return the reverse of `padded`."""
    return np.concatenate([table[i, : len(offered)] for i, offered in enumerate(graph.choices)])


def positions(graph: Graph) -> Array:
    """Return how far down its parameter's list each choice stands, in [0, 1], `(parameters, widest)`."""
    return padded(graph, np.concatenate([np.linspace(0, 1, len(c)) if len(c) > 1 else [0.0] for c in graph.choices]))


@dataclass(frozen=True)
class LossFit:
    """One choice of link, prior (a position in `LossModel.models`) and scales."""

    link: LossTransform
    prior: int
    noise: float
    scales: Scales


_BEFORE = LossFit(LossTransform("survival"), 0, 0.2, Scales())


class LossModel:
    """Losses of all choices, from sensitivities and from trials.

    Args:
        graph: Of the costs.
        losses: Sensitivities in any unit that grows in proportion to the quality lost, or None: every parameter loses
            alike, and the more the further down its list a choice stands.
        pairs: Parameters whose losses may interact.
        capacity: Trials the model holds.
    """

    def __init__(
        self,
        graph: Graph,
        losses: Mapping[str, Mapping[Choice, float]] | None,
        pairs: list[tuple[int, int]],
        capacity: int,
    ) -> None:
        self._graph = graph
        place = positions(graph)
        self.chosen = place > 0
        flat = place**1.5
        # What adds up is a power of a loss where the link has it so: of the sensitivities, too.
        self._blends = [(trust, power) for trust in _TRUSTS for power in POWERS] if losses is not None else []
        self._blends.append((0.0, 0.0))
        given = flat if losses is None else np.maximum(padded(graph, graph.flatten(losses)), 0.0)
        flat, given = self._unit(flat), self._unit(given)
        self.models = []
        for trust, power in self._blends:
            blend = np.maximum(given, 1e-3) ** (trust * power) * np.maximum(flat, 1e-3) ** (1 - trust)
            blend = np.where(self.chosen, blend, 0.0)
            least = _LEAST * blend[self.chosen].mean() * self.chosen if self.chosen.any() else blend
            prior = Prior(
                blend, _OWN * blend + least, _COMMON * blend, 0.5, 0.0, np.array(pairs, np.int64).reshape(-1, 2), place,
                self._kinds(blend), blend.max(1) / max(blend.max(1).sum(), 1e-12),
                0.1 * float(blend.max(1).sum()),
            )  # fmt: skip
            self.models.append(AdditiveModel(prior, capacity))
        self.fit = _BEFORE
        self.factor = 1.0
        self._fitted = 0
        self.posterior: Posterior | None = None

    def _kinds(self, mean: Array) -> Array:
        """Return what parameters of one kind have in common: a factor of all effects, and one for each choice."""
        kinds = self._graph.kinds()
        found = []
        for members in kinds:
            if len(members) > 1 and len(kinds) > 1:
                feature = np.zeros_like(mean)
                feature[members] = _KIND * mean[members]
                found.append(feature)
            if len(members) > 1:
                for choice in range(1, max(len(self._graph.choices[i]) for i in members)):
                    feature = np.zeros_like(mean)
                    feature[members, choice] = _LEVEL * mean[members, choice]
                    found.append(feature)
        return np.array(found).reshape(-1, *mean.shape)

    def _unit(self, values: Array) -> Array:
        """Scale so that a typical choice loses one: the unit of the sensitivities is not the quality's."""
        found = values[self.chosen & (values > 0)]
        typical = float(np.exp(np.log(found).mean())) if len(found) else 1.0
        return values / typical

    @property
    def model(self) -> AdditiveModel:
        """The model with the prior that is believed."""
        return self.models[self.fit.prior]

    def add(self, row: Index) -> None:
        """Add a trial's choices."""
        for model, equal in zip(self.models, self._equal(row, self.model.count), strict=True):
            model.add(row, equal=equal)

    def replace(self, position: int, row: Index) -> None:
        """Let a trial take another's place."""
        for model, equal in zip(self.models, self._equal(row, position), strict=True):
            model.replace(position, row, equal=equal)

    def _equal(self, row: Index, position: int) -> list[Array]:
        """Return what the models, which hold the same rows, each take for `equal`: one pass over the rows for all."""
        weights = np.concatenate([model.weights_of(row) for model in self.models], 1)
        return np.split(self.model.equal(row, position, weights), len(self.models), 1)

    def update(self, shares: Array, error: float, telling: Index) -> None:
        """Condition on the shares of quality lost in every trial; choose link and scales where it is time to.

        Args:
            shares: `(rows,)`.
            error: Standard deviation of a measured share.
            telling: Rows that the choice is made from.
        """
        size = refit_size(len(shares))
        if size != self._fitted and size:
            self.fit, self._fitted = self._choose(shares, telling, error), size
        self.factor, loss, noise = self._scaled(self.fit, shares, error, self.model.prior_totals)
        self.posterior = self.model.fit(loss, noise, self.fit.scales)

    def _scaled(self, fit: LossFit, shares: Array, error: float, means: Array) -> tuple[float, Array, Array]:
        """Return the factor between losses and prior units, the losses in prior units, and their variances."""
        loss = fit.link.forward(shares)
        square = float(means @ means)
        factor = max(float(loss @ means) / square, 1e-9) if square > 0 else 1.0
        loss = loss / factor
        middle = float(np.median(loss[loss > 0])) if (loss > 0).any() else 1.0
        measured = error * fit.link.slope(shares) / factor
        return factor, loss, (fit.noise * loss + 0.03 * middle) ** 2 + measured**2

    def _choose(self, shares: Array, rows: Index, error: float) -> LossFit:
        options = [
            LossFit(link, prior, noise, Scales())
            for link, (prior, (trust, power)), noise in product(LINKS, enumerate(self._blends), _RELATIVE_NOISE)
            if not trust or power == link.power
        ]
        found = max(options, key=lambda fit: self._score(shares, rows, error, fit))
        interactions = _INTERACTIONS if len(self.model.prior.pairs) and len(rows) >= 12 else ()
        options = [
            LossFit(found.link, found.prior, noise, Scales(stray, pairs, 1.0, local))
            for stray, local, pairs in product(_STRAYS, _LOCAL, (0.0, *interactions))
            for noise in (found.noise, found.noise / 2)
        ]
        return max(options, key=lambda fit: self._score(shares, rows, error, fit))

    def _score(self, shares: Array, rows: Index, error: float, fit: LossFit) -> float:
        """Return how well a fit foresees each share from the others: the log density of the shares themselves."""
        model = self.models[fit.prior]
        factor, loss, noise = self._scaled(fit, shares[rows], error, model.prior_totals[rows])
        score = model.fit(loss, noise, fit.scales, rows).log_score()
        return float((score + np.log(fit.link.slope(shares[rows]) / factor)).sum())

    def effects(self, rng: np.random.Generator | None, thompson_scale: float) -> Effects:
        """Return losses in the unit of `fit.link`: expected ones, moved by `thompson_scale` towards a draw."""
        if self.posterior is None:
            prior = self.model.prior
            mean = Effects(prior.mean, np.zeros(len(prior.pairs)), 0.0)
            if rng is not None and thompson_scale:
                stray = prior.own_sd * rng.standard_normal(prior.mean.shape)
                stray = stray + prior.common_sd * rng.standard_normal((len(prior.mean), 1))
                mean = Effects(prior.mean + thompson_scale * stray, mean.pairs, 0.0)
        else:
            mean = self.posterior.mean()
            if rng is not None and thompson_scale:
                draw = self.posterior.draw(rng)
                mean = Effects(
                    mean.effects + thompson_scale * (draw.effects - mean.effects),
                    mean.pairs + thompson_scale * (draw.pairs - mean.pairs),
                    0.0,
                )
        effects = self.factor * np.where(self.chosen, np.maximum(mean.effects, 0.0), 0.0)
        return Effects(effects, self.factor * mean.pairs, 0.0)

    def shares(self, effects: Effects, rows: Index) -> Array:
        """Return the share of quality that rows `(n, parameters)` lose."""
        loss = self.model.total(effects, rows)
        if self.posterior is not None:
            loss = loss + self.factor * self.posterior.local(rows)
        return self.fit.link.inverse(loss)

    def interactions(self, effects: Effects) -> dict[tuple[str, str], Array]:
        """Return the tables of those pairs whose interaction the trials speak for."""
        if self.posterior is None or not self.fit.scales.pairs:
            return {}
        names, place = self._graph.names, self.model.prior.severity
        expected = self.posterior.mean().pairs
        clear = np.abs(expected) > self.posterior.pair_sd()
        found = {}
        for number in np.flatnonzero(clear):
            i, j = self.model.prior.pairs[number]
            n, m = len(self._graph.choices[i]), len(self._graph.choices[j])
            found[names[i], names[j]] = effects.pairs[number] * np.outer(place[i, :n], place[j, :m])
        return found


class CostBelief:
    """Costs of all choices, corrected by what was measured.

    Args:
        graph: Of the predicted costs.
        capacity: Trials the model holds.
        exact: What a row is predicted to cost; None where that is the sum of what its choices cost.
    """

    def __init__(self, graph: Graph, capacity: int, exact: Callable[[Index], float] | None = None) -> None:
        self._graph, self._exact = graph, exact
        self._asked: dict[bytes, float] = {}
        finite = np.where(np.isfinite(graph.flat_cost), graph.flat_cost, 0.0)
        self._flat = finite
        table = padded(graph, finite)
        self._parameters = np.arange(len(graph.names))
        self._table = np.concatenate([table, np.zeros((len(table), 1))], 1)
        ends = [(graph.position(pair.first), graph.position(pair.second)) for pair in graph.costs.pairs]
        self._pairs = np.array(ends, np.int64).reshape(-1, 2)
        most = max(len(offered) for offered in graph.choices)
        # Position -1 reads the zeros: a pair with a parameter that takes no part costs nothing.
        self._joint = np.zeros((len(self._pairs), most + 1, most + 1))
        reach = np.abs(table - table[:, :1])
        for number, (pair, (i, j)) in enumerate(zip(graph.costs.pairs, self._pairs, strict=True)):
            ms = np.array(pair.ms, float)
            ms = np.where(np.isfinite(ms), ms, 0.0)
            reach[i, : len(ms)] += np.abs(ms - ms[:1]).mean(1)
            reach[j, : ms.shape[1]] += np.abs(ms - ms[:, :1]).mean(0)
            self._joint[number, : len(ms), : ms.shape[1]] = ms
        widest = reach.max(1, keepdims=True)
        own = 0.1 * np.maximum(reach, 0.3 * widest) + 1e-6 * max(float(widest.max()), 1e-12)
        none = np.zeros((0, 2), np.int64)
        share = (widest / max(float(widest.sum()), 1e-12))[:, 0]
        reference = float(abs(self.predicted(np.zeros((1, len(table)), np.int64))[0]))
        self.model = AdditiveModel(
            Prior(
                np.zeros_like(table), own, 0 * own, 0.3, _CONSTANT * reference, none, table,
                np.zeros((0, *table.shape)), share, 0.3 * reference,
            ),
            capacity,
        )  # fmt: skip
        self._scales, self._fitted, self._ratio = Scales(), 0, 1.0
        self._effects: Effects | None = None
        self.spread = 0.05

    def predicted(self, rows: Index) -> Array:
        """Return the cost of rows `(n, parameters)` before any correction."""
        return self._summed(rows) if self._exact is None else np.array([self._ask(row) for row in rows])

    def _summed(self, rows: Index) -> Array:
        total: Array = self._table[self._parameters, rows].sum(1) + self._graph.costs.fixed_ms
        first, second = self._pairs.T
        joint: Array = self._joint[np.arange(len(self._pairs)), rows[:, first], rows[:, second]].sum(1)
        return total + joint

    def _ask(self, row: Index) -> float:
        assert self._exact is not None
        key = row.tobytes()
        if key not in self._asked:
            if len(self._asked) >= _REMEMBERED:
                self._asked.clear()
            found = float(self._exact(row))
            # What cannot be predicted is worth its sum.
            self._asked[key] = found if np.isfinite(found) else float(self._summed(row[None])[0])
        return self._asked[key]

    def add(self, row: Index) -> None:
        """Add a trial's choices."""
        self.model.add(row, float(self.predicted(row[None])[0]))

    def replace(self, position: int, row: Index) -> None:
        """Let a trial take another's place."""
        self.model.replace(position, row, float(self.predicted(row[None])[0]))

    def update(self, measured: Array, telling: Index) -> None:
        """Condition on the measured cost of every row, NaN where none was; `telling` as in `LossModel.update`."""
        known = np.isfinite(measured)
        # The unit comes from the dearer half: small predictions may be far off, or negative.
        predicted = self.model.prior_totals
        sure = known & (predicted > 0) & (predicted >= np.median(predicted[known]) if known.any() else known)
        if not sure.any():
            return
        self._ratio = float(np.median(measured[sure] / predicted[sure]))
        seen = np.where(known, measured / self._ratio, self.model.prior_totals)
        # What was not measured gets a variance that makes it worth nothing.
        variances = np.where(known, (0.02 * np.abs(seen)) ** 2 + 1e-12, 1e6 * (1 + np.abs(seen)) ** 2)
        size = refit_size(len(seen))
        if size != self._fitted and size:
            self._fitted = size
            options = [
                Scales(e, 0.0, n, local, constant)
                for constant in (0.0, 1.0)
                for e in (0.1, 1.0, 10.0)
                for n in (0.1, 1.0, 10.0)
                for local in (0.0, 0.03, 0.3)
            ]
            rows = telling[known[telling]]
            self._scales = max(
                options, key=lambda s: float(self.model.fit(seen[rows], variances[rows], s, rows).log_score().sum())
            )
            if len(rows) > 2:
                foreseen = self.model.fit(seen[rows], variances[rows], self._scales, rows).left_out()
                error = float(np.median(np.abs(foreseen / seen[rows] - 1)))
                self.spread = float(np.clip(1.5 * error, 0.003, 0.2))
        self._posterior = self.model.fit(seen, variances, self._scales)
        self._effects = self._posterior.mean()

    def flat(self) -> tuple[Array, float, float]:
        """Return the corrected cost of every choice, the factor of pairs, and the fixed cost."""
        if self._effects is None:
            return self._graph.flat_cost, 1.0, self._graph.costs.fixed_ms
        factor = self._ratio * max(self._effects.scale, 0.05)
        corrected = factor * self._flat + self._ratio * flattened(self._graph, self._effects.effects)
        corrected = np.where(np.isfinite(self._graph.flat_cost), corrected, np.inf)
        return corrected, factor, factor * self._graph.costs.fixed_ms + self._ratio * self._effects.intercept

    def total(self, rows: Index) -> Array:
        """Return the corrected cost of rows."""
        if self._effects is None:
            return self.predicted(rows)
        found = self.model.total(self._effects, rows, self.predicted(rows)) + self._posterior.local(rows)
        return self._ratio * found

    def local(self, row: Index) -> float:
        """Return the part of a row's cost that does not add up."""
        return 0.0 if self._effects is None else self._ratio * float(self._posterior.local(row[None])[0])
