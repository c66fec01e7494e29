"""Beliefs of losses: what is kept of trials is the same however it was learned, and trials change what is expected."""

from __future__ import annotations

from typing import Any

import numpy as np

from autocompress.exploration.knapsack.beliefs import LossModel
from autocompress.exploration.knapsack.choice_graph import Graph
from autocompress.exploration.knapsack.problem import Costs, Index

PARAMETERS, CHOICES = 8, 4
SEVERITY = np.linspace(0, 1, CHOICES)


def graph() -> Graph:
    ms: dict[str, Any] = {
        f"{kind}/{i}": {c: 1.0 - 0.2 * c for c in range(CHOICES)} for kind in "ab" for i in range(PARAMETERS // 2)
    }
    return Graph(Costs(ms))


def losses(of: Graph, strength: np.ndarray[Any, Any]) -> dict[str, dict[Any, float]]:
    return {name: {c: float(strength[i] * SEVERITY[c] ** 2) for c in range(CHOICES)} for i, name in enumerate(of.names)}


def drawn(count: int, seed: int = 0) -> list[Index]:
    return list(np.random.default_rng(seed).integers(0, CHOICES, (count, PARAMETERS)))


def test_rows_exchanged_leave_the_kernel_that_adding_makes() -> None:
    of, rows = graph(), drawn(12)
    given = losses(of, np.full(PARAMETERS, 0.1))
    added = LossModel(of, given, [(0, 4)], 400)
    exchanged = LossModel(of, given, [(0, 4)], 400)
    for row in rows:
        added.add(row)
    for row in drawn(12, seed=1):
        exchanged.add(row)
    for position in (5, 0, 11, 3, 1, 2, 4, 6, 7, 8, 9, 10):
        exchanged.replace(position, rows[position])
    assert len(added.models) > 2
    shares = np.linspace(0.05, 0.6, 12)
    for one, other in zip(added.models, exchanged.models, strict=True):
        assert np.allclose(one._kernel[:12, :12], other._kernel[:12, :12], rtol=1e-12)
        assert np.allclose(one._alike[:12, :12], other._alike[:12, :12], rtol=1e-12)
        assert np.allclose(one.prior_totals, other.prior_totals, rtol=1e-12)
        assert np.allclose(one._in_common[:12], other._in_common[:12], rtol=1e-12)
    for belief in (added, exchanged):
        belief.update(shares, 0.01, np.arange(12))
    probe = np.array(drawn(5, seed=2))
    found = [belief.shares(belief.effects(None, 0.0), probe) for belief in (added, exchanged)]
    assert np.allclose(*found, rtol=1e-9)


def test_every_entry_of_the_kernel_is_what_two_rows_have_in_common() -> None:
    of, rows = graph(), drawn(6)
    belief = LossModel(of, losses(of, np.linspace(0.05, 0.4, PARAMETERS)), [], 400)
    for row in rows:
        belief.add(row)
    for model in belief.models:
        prior, places = model.prior, np.arange(PARAMETERS)
        for i, first in enumerate(rows):
            for j, second in enumerate(rows):
                same = first == second
                own = (prior.own_sd[places, first] ** 2 * same).sum()
                common = (prior.common_sd[places, first] * prior.common_sd[places, second]).sum()
                assert np.isclose(model._kernel[i, j], own + common, rtol=1e-12)
                unlike = prior.reach[~same].sum()
                assert np.isclose(model._alike[i, j], np.exp(-unlike / 0.3), rtol=1e-9)
        expected = [prior.shared[:, places, row].sum(1) for row in rows]
        assert np.allclose(model._in_common[:6], expected, rtol=1e-12)


def test_trials_mend_what_sensitivities_had_wrong() -> None:
    of = graph()
    truth = np.array([0.3, 0.05, 0.05, 0.05, 0.05, 0.05, 0.05, 0.3])
    belief = LossModel(of, losses(of, np.full(PARAMETERS, 0.1)), [], 400)
    rows = np.array(drawn(60))
    probe = np.array(drawn(40, seed=3))

    def share(chosen: Index) -> np.ndarray[Any, Any]:
        lost: np.ndarray[Any, Any] = 1 - np.exp(-(truth * SEVERITY[chosen] ** 2).sum(1))
        return lost

    before = belief.shares(belief.effects(None, 0.0), probe)
    for row in rows:
        belief.add(row)
    belief.update(share(rows), 0.002, np.arange(60))
    after = belief.shares(belief.effects(None, 0.0), probe)
    right = share(probe)
    assert np.corrcoef(after, right)[0, 1] > np.corrcoef(before, right)[0, 1]
    assert np.abs(after - right).mean() < 0.02
