"""A metric by its task's name: percent and points for shares, plain numbers for the rest."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from autocompress.runs.metric import Metric, metric_name


@pytest.mark.parametrize(
    "name", ["accuracy", "top1", "top-5", "top1 agreement", "agreement", "pixel accuracy", "mean recall", "exact match"]
)
def test_shares_are_percent_and_points(name: str) -> None:
    metric = Metric(name)
    assert metric.value(0.9917) == "99.17%" and metric.axis == f"{name} (%)" and metric.scale == 100
    assert (metric.change(0.01234), metric.change(-0.002), metric.change(1e-5)) == ("−1.23 pp", "+0.20 pp", "±0.00 pp")
    assert metric.loss(0.005) == "0.5 pp"


@pytest.mark.parametrize("name", ["cosine", "R2", "kl", "Spearman", "mIoU", "F1", "score", "stop distance"])
def test_other_metrics_are_plain(name: str) -> None:
    metric = Metric(name)
    assert metric.value(0.981) == "0.9810" and metric.axis == name and metric.scale == 1
    assert (metric.change(0.0326), metric.change(-0.002), metric.change(1e-5)) == ("−0.0326", "+0.0020", "±0.0000")
    assert metric.loss(0.03) == "0.03"


def test_the_name_is_the_tasks_own_or_what_fits() -> None:
    assert metric_name(SimpleNamespace(metric_name="Spearman", kind="cosine", outputs="classes")) == "Spearman"
    assert metric_name(SimpleNamespace(kind="cosine", outputs="values")) == "cosine"
    assert metric_name(SimpleNamespace(outputs="classes")) == "accuracy"
    assert metric_name(SimpleNamespace(outputs="values")) == "score"
