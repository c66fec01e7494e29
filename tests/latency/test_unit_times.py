"""Layers' times are remembered, carried over to widths not seen, and say nothing of kinds never timed."""

from __future__ import annotations

import numpy as np
import pytest

from autocompress.latency.kernel_model import UnitTable
from autocompress.latency.unit_times import LayerTime, UnitTimes
from autocompress.latency.units import Unit
from autocompress.policy import CompressionPolicy
from tests.latency.made_up import BASE_MS, LAYOUT, measure, unit_cost


def known(seed: int, *, only: str | None = None) -> tuple[UnitTable, UnitTimes]:
    table = UnitTable()
    times = UnitTimes(table)
    found = [time for network in measure(30, seed=seed).layers for time in network]
    times.observe(time for time in found if only in (None, time.unit.kind))
    return table, times


def predict(table: UnitTable, times: UnitTimes, units: list[Unit]) -> np.ndarray:
    return times.ratios(np.array(table.add(units)))


def test_nothing_known_is_nothing_said() -> None:
    table = UnitTable()
    times = UnitTimes(table)
    assert len(times) == 0
    assert list(predict(table, times, list(LAYOUT.units(CompressionPolicy())))) == [0.0] * len(
        LAYOUT.units(CompressionPolicy())
    )


def test_layers_never_seen_are_predicted_from_those_like_them() -> None:
    table, times = known(0)
    units = list({u: 0 for o in measure(20, seed=1).observations for u in LAYOUT.units(o.policy)})
    new = [u for u in units if u not in table.index and unit_cost(u) > 0.005]
    assert len(new) > 40
    errors = np.abs(predict(table, times, new) / (np.array([unit_cost(u) for u in new]) / BASE_MS) - 1)
    assert np.median(errors) < 0.08 and np.isfinite(errors).all()


def test_the_mean_of_repeated_times_is_believed() -> None:
    table = UnitTable()
    times = UnitTimes(table)
    units = LAYOUT.units(CompressionPolicy("bf16"))
    for factor in (0.9, 1.0, 1.1):
        times.observe(LayerTime(unit, factor * 0.1, factor * 1.0) for unit in units)
    assert len(times) == len(set(units))
    assert predict(table, times, list(units)) == pytest.approx(0.1, rel=0.05)


def test_what_is_learned_later_counts() -> None:
    table, times = known(2)
    unit = LAYOUT.units(CompressionPolicy("bf16"))[2]
    before = float(predict(table, times, [unit])[0])
    times.observe([LayerTime(unit, 2 * before, 1.0)] * 8)
    assert float(predict(table, times, [unit])[0]) > 1.2 * before


def test_times_that_are_no_times_are_left_out() -> None:
    table = UnitTable()
    times = UnitTimes(table)
    unit = LAYOUT.units(CompressionPolicy("bf16"))[0]
    times.observe([LayerTime(unit, 0.0, 0.0), LayerTime(unit, 0.1, 0.0)])
    assert len(times) == 0


def test_kinds_that_were_never_timed_are_said_nothing_of() -> None:
    table, times = known(3, only="conv")
    units = LAYOUT.units(CompressionPolicy("bf16"))
    found = dict(zip([u.kind for u in units], predict(table, times, list(units)), strict=True))
    assert found["linear"] == found["pointwise"] == 0.0 and found["conv"] > 0


def test_each_unit_has_one_number() -> None:
    table = UnitTable()
    units = LAYOUT.units(CompressionPolicy("bf16"))
    first = table.add(units)
    assert table.add(units) == first and len(table) == len(set(units))
    assert [len(array) for array in table.arrays()] == [len(table)] * 4
    table.add([units[0]._replace(out_channels=24)])
    assert [len(array) for array in table.arrays()] == [len(table)] * 4 == [len(set(units)) + 1] * 4
    assert table.arrays()[2][-1] == table.arrays()[2][0] and table.arrays()[3][-1] == table.arrays()[3][0]
