"""How many samples a step takes, and how many epochs a training."""

from __future__ import annotations

import pytest

from autocompress.config import RecoveryConfig
from autocompress.recovery.budget import batch_within, epochs_within, training_batch


@pytest.mark.parametrize(
    ("sample_seconds", "seconds", "least", "expected"),
    [
        (0.0001, 60.0, 8, 128),  # 1,500 samples a step would do
        (0.005, 60.0, 8, 16),  # 30 would
        (0.005, 60.0, 32, 32),
        (1.0, 60.0, 8, 8),
        (0.0, 60.0, 8, 128),  # nothing is known
    ],
)
def test_batches_are_as_small_as_a_hundred_steps_need(
    sample_seconds: float, seconds: float, least: int, expected: int
) -> None:
    assert batch_within(128, sample_seconds, seconds, least=least) == expected


def test_a_batch_never_grows() -> None:
    assert batch_within(5, 1.0, 1.0, least=32) == 5


@pytest.mark.parametrize(("samples", "expected"), [(100_000, 128), (250, 31), (20, 8), (5, 5), (1, 2)])
def test_few_samples_make_small_batches(samples: int, expected: int) -> None:
    assert training_batch(samples, RecoveryConfig()) == expected


def test_epochs_are_as_many_as_make_enough_steps_unless_they_were_given() -> None:
    assert epochs_within(50_000, RecoveryConfig()) == 240
    assert epochs_within(250, RecoveryConfig()) == 5000
    assert epochs_within(250, RecoveryConfig(epochs=3)) == 3
