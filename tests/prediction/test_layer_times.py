"""Layers' times are remembered, carried over to widths not seen, and predicted without a network's own rows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from autocompress.graph.layout import Unit
from autocompress.policy import CompressionPolicy
from autocompress.prediction.layer_features import UnitTable
from autocompress.prediction.layer_times import LayerTime, UnitTimes
from tests.prediction.made_up import BASE_MS, LAYOUT, measure, unit_cost


def known(seed: int, count: int = 30) -> tuple[UnitTable, UnitTimes]:
    table = UnitTable()
    times = UnitTimes(table)
    times.observe(time for network in measure(count, seed=seed).layers for time in network)
    times.refresh()
    return table, times


def predict(table: UnitTable, times: UnitTimes, units: list[Unit]) -> np.ndarray:
    return times.ratios(np.array(table.add(units)))


def test_layers_never_seen_are_predicted_from_those_like_them() -> None:
    table, times = known(0)
    seen = {time.unit for network in measure(30, seed=0).layers for time in network}
    units = list({u: 0 for o in measure(20, seed=1).observations for u in LAYOUT.units(o.policy)})
    new = [u for u in units if u not in seen and unit_cost(u) > 0.005]
    assert len(new) > 40
    errors = np.abs(predict(table, times, new) / (np.array([unit_cost(u) for u in new]) / BASE_MS) - 1)
    assert np.median(errors) < 0.06 and np.isfinite(errors).all()


def test_how_well_a_layer_is_known_shows_in_its_variance() -> None:
    table, times = known(4)
    unit = measure(30, seed=4).layers[0][2].unit
    far = unit._replace(in_channels=1000, out_channels=1)
    near, alone = np.diag(times.covariance(np.array(table.add([unit, far]))))
    assert 0 <= near < 0.01 < alone


def test_the_mean_of_repeated_times_is_believed() -> None:
    table = UnitTable()
    times = UnitTimes(table)
    units = LAYOUT.units(CompressionPolicy("bf16"))
    for factor in (0.9, 1.0, 1.1):
        times.observe(LayerTime(unit, factor * 0.1, factor * 1.0, str(factor)) for unit in units)
    times.refresh()
    assert len(times) == 3 * len(units)
    assert predict(table, times, list(units)) == pytest.approx(0.1, rel=0.05)


def test_what_is_learned_later_counts() -> None:
    table, times = known(2)
    unit = LAYOUT.units(CompressionPolicy("bf16"))[2]
    before = float(predict(table, times, [unit])[0])
    # A few rows more change little and are waited with.
    times.observe([LayerTime(unit, 2 * before, 1.0)] * 3)
    times.refresh()
    assert float(predict(table, times, [unit])[0]) == before
    times.observe([LayerTime(unit, 2 * before, 1.0)] * len(times))
    times.refresh()
    assert float(predict(table, times, [unit])[0]) > 1.5 * before


def test_a_networks_own_rows_can_be_left_out() -> None:
    table = UnitTable()
    times = UnitTimes(table)
    networks = measure(30, seed=5).layers
    slow = [replace(time, ratio=3 * time.ratio) for time in networks[0]]
    times.observe(time for network in [slow, *networks[1:]] for time in network)
    times.refresh()
    numbers = np.array(table.add([time.unit for time in slow]))
    own = np.array([time.ratio for time in networks[0]])
    without = times.without(slow[0].network, numbers)
    assert np.median(np.abs(without / own - 1)) < 0.1
    assert np.median(times.ratios(numbers) / without) > 1.05
    assert np.array_equal(times.without("another", numbers), times.ratios(numbers))


def test_times_that_are_no_times_are_left_out() -> None:
    table = UnitTable()
    times = UnitTimes(table)
    unit = LAYOUT.units(CompressionPolicy("bf16"))[0]
    times.observe([LayerTime(unit, 0.0, 0.0), LayerTime(unit, 0.1, 0.0)])
    assert len(times) == 0


def test_more_rows_than_are_learned_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autocompress.prediction.layer_times._MOST", 100)
    table, times = known(6)
    assert len(times) > 150
    units = list(LAYOUT.units(CompressionPolicy("bf16")))
    true = np.array([unit_cost(u) for u in units]) / BASE_MS
    assert np.median(np.abs(predict(table, times, units) / true - 1)) < 0.1


def test_each_unit_has_one_number() -> None:
    table = UnitTable()
    units = LAYOUT.units(CompressionPolicy("bf16"))
    first = table.add(units)
    assert table.add(units) == first and len(table) == len(set(units))
    (other,) = table.add([units[0]._replace(out_channels=24)])
    assert other == len(set(units)) == len(table) - 1
    both = np.array([first[0], other])
    assert len(set(table.layers(both))) == 1
    for rows in (table.counts(both), table.coordinates(both), table.logs(both)):
        assert np.isfinite(rows).all() and not np.array_equal(rows[0], rows[1])
