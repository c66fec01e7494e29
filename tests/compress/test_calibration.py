"""Calibration methods against numbers worked out by hand."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import autocompress
from autocompress.catalogue import list_methods
from autocompress.compress import CompressionContext, apply_policy
from autocompress.compress.calibration import CALIBRATIONS, calibration
from autocompress.compress.calibrations.base import Magnitudes
from autocompress.compress.calibrations.entropy import divergence
from autocompress.compress.quantization import activation_ranges, calibrate
from autocompress.compress.reload import load_compressed
from autocompress.config import QuantizationConfig
from autocompress.errors import ConfigError
from autocompress.model.inventory import take_inventory
from autocompress.policy import CompressionPolicy, LayerPolicy
from autocompress.recovery import TrainingFreeCompressor
from autocompress.runs.records import TrialRecord
from tests import networks
from tests.exploration import tiny

NAMES = list(CALIBRATIONS)


def threshold(name: str, counts: list[float] | Tensor, top: float, *, signed: bool = True, **more: float) -> float:
    config = QuantizationConfig.model_validate({"calibration": name, **more})
    return calibration(config).threshold(Magnitudes(torch.as_tensor(counts).float(), top, signed))


def histogram(values: Tensor) -> tuple[Tensor, float]:
    top = float(values.abs().max())
    return torch.histc(values.abs(), 2048, 0, top), top


def test_what_can_be_chosen_is_listed_as_methods() -> None:
    assert set(NAMES) == {"minmax", "percentile", "entropy", "mse"}
    assert set(NAMES) < {method.name for method in list_methods("quantization")}


def test_minmax_clips_nothing() -> None:
    assert threshold("minmax", [1e6, 0, 0, 1], 8.0) == 8.0


@pytest.mark.parametrize(("percentile", "wanted"), [(50, 2), (90, 2), (90.5, 4), (99, 4), (99.5, 8), (100, 8)])
def test_a_percentile_is_the_upper_edge_of_its_bin(percentile: float, wanted: float) -> None:
    assert threshold("percentile", [90, 9, 0, 1], 8.0, percentile=percentile) == wanted


def test_one_value_in_ten_thousand_lies_above_the_usual_percentile() -> None:
    assert threshold("percentile", [19_998, 0, 0, 2], 8.0) == 2.0
    assert threshold("percentile", [19_997, 0, 0, 3], 8.0) == 8.0


def test_divergence_by_hand() -> None:
    # Clipped: 1 0 2 3+5. In two levels: (1+0)/1 on the one filled bin, (2+3)/2 on both. Normalised by 11 and by 6.
    wanted = (math.log(6 / 11) + 2 * math.log(2 / 11 * 6 / 2.5) + 8 * math.log(8 / 11 * 6 / 2.5)) / 11
    assert divergence(np.array([1.0, 0, 2, 3, 5]), 4, 2) == pytest.approx(wanted)
    assert wanted == pytest.approx(0.1992, abs=1e-4)


def test_nothing_is_lost_where_levels_hold_equal_bins_and_nothing_is_clipped() -> None:
    assert divergence(np.array([2.0, 2, 7, 7]), 4, 2) == pytest.approx(0)
    # Clipped onto an empty bin, or nothing left within.
    assert divergence(np.array([2.0, 0, 1]), 2, 2) == divergence(np.array([0.0, 0, 1]), 2, 2) == math.inf


def test_entropy_keeps_an_even_spread_and_cuts_a_thin_tail() -> None:
    assert threshold("entropy", torch.ones(2048), 4.0) == 4.0
    values = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    values[:3] = 40.0
    assert 3 < threshold("entropy", *histogram(values)) < 20
    # Zeros, however many, change nothing: they have a code of their own.
    counts, top = histogram(values)
    counts[0] *= 1000
    assert threshold("entropy", counts, top) == threshold("entropy", *histogram(values))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("signed", [True, False])
def test_thresholds_are_within_the_range_and_follow_its_unit(name: str, signed: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    for values in (torch.randn(50_000, generator=generator), torch.rand(9, generator=generator), torch.ones(5)):
        counts, top = histogram(values)
        found = threshold(name, counts, top, signed=signed)
        assert 0 < found <= top
        assert threshold(name, counts, 10 * top, signed=signed) == pytest.approx(10 * found, rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_constant_tensor_is_not_clipped_away(name: str) -> None:
    policy = CompressionPolicy(layers={"conv1": LayerPolicy("int8")})
    config = QuantizationConfig(calibration=name)
    model = apply_policy(networks.Plain().eval(), policy, CompressionContext(networks.images(), quantization=config))
    calibrate(model, [torch.full((4, 3, 8, 8), 2.0)])
    with torch.no_grad():
        seen = model.get_submodule("conv1.input_quantizer")(torch.full((1,), 2.0))
    assert float(seen) == pytest.approx(2.0, rel=0.02)


def test_candidates_are_made_with_the_method_that_was_asked_for(tmp_path: Path) -> None:
    task = tiny.made("make")
    model, inputs = task.model(), next(task.calibration(64))
    inventory = take_inventory(model, task.example_inputs(2))
    policy = CompressionPolicy(layers={"3": LayerPolicy("int8")})

    def scale(**said: object) -> float:
        config = QuantizationConfig.model_validate(said)
        made = TrainingFreeCompressor(model, inventory, {}, inputs[:2], [inputs], quantization=config).model(policy)
        return activation_ranges(made)["3"].scale

    found = [scale(calibration="percentile", percentile=p) for p in (50, 90, 100)] + [scale(calibration="minmax")]
    assert all(one < other for one, other in pairwise(found[:3])) and found[2] == pytest.approx(found[3])
    assert scale() == scale(calibration="mse") < found[3]


def test_a_stored_candidate_is_calibrated_again_by_the_same_method(tmp_path: Path) -> None:
    task = tiny.made("make")
    policy = CompressionPolicy(layers={"3": LayerPolicy("int8")})
    config = QuantizationConfig(calibration="minmax")
    model = apply_policy(task.model(), policy, CompressionContext(task.example_inputs(2), quantization=config))
    calibrate(model, task.calibration(64))
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    again = load_compressed(task, tmp_path, TrialRecord(1, policy, "complete"), config)
    assert activation_ranges(again) == activation_ranges(model)
    calibrate(again, task.calibration(64))
    assert activation_ranges(again) == activation_ranges(model)


def test_an_unknown_method_is_said_before_anything_is_loaded() -> None:
    with pytest.raises(ConfigError, match=r"Unknown calibration 'entrpy'\. Did you mean 'entropy'"):
        autocompress.sensitivity("digits", sets=["quantization.calibration=entrpy"])
    with pytest.raises(ConfigError, match=r"quantization.percentile = 101"):
        autocompress.sensitivity("digits", sets=["quantization.percentile=101"])
