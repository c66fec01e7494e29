"""How long a fine-tuning takes, in which steps, and how its learning rate runs. Numbers only; `finetune` trains."""

from __future__ import annotations

import math
from dataclasses import dataclass

from autocompress.config import RecoveryConfig

# Share of a training in which the rate rises.
_WARM_UP = 0.1
# Steps of an epoch at least, for which batches are made smaller; and samples of a batch at least.
_LEAST_STEPS, LEAST_BATCH = 8, 8
# Steps that a training needs to get anywhere; forward passes that one step takes as long as: of the student, its
# backward pass (two), and of the teacher.
_WANTED_STEPS, _PASSES = 100, 4
# A training under a time limit has so many times the default epochs, or so many steps where epochs are few: the time is
# what ends it. ResNet-20 had 8 of its 20 minutes left after 24 epochs, and a limit to meet.
_TIMES_WITHIN, _STEPS_WITHIN = 10, 40_000


@dataclass(frozen=True)
class Budget:
    """How long one fine-tuning may take: whichever ends first.

    Attributes:
        epochs: Passes over the training data; fractions are allowed.
        seconds: Wall time, comparisons and calibration included; held to within a step.
    """

    epochs: float
    seconds: float


def training_batch(samples: int, config: RecoveryConfig) -> int:
    """Return the batch size for so many training samples: the configured one, or smaller so that an epoch has steps."""
    return max(2, min(config.batch_size, max(LEAST_BATCH, samples // _LEAST_STEPS), max(samples, 1)))


def batch_within(batch: int, sample_seconds: float, seconds: float, *, least: int = LEAST_BATCH) -> int:
    """Return a batch size with which `_WANTED_STEPS` steps fit into the time: `batch`, or a smaller power of two.

    A transformer made 13 steps of 128 sentences in half a minute and gained nothing; of 16 it made eight times as many.

    Args:
        batch: The largest that is wanted.
        sample_seconds: Of one sample's forward pass.
        seconds: Of the training.
        least: The smallest that makes sense for the network.
    """
    most = seconds / max(_PASSES * sample_seconds * _WANTED_STEPS, 1e-9)
    if most >= batch:
        return batch
    return min(batch, max(least, 1 << math.floor(math.log2(max(most, 1.0)))))


def epochs_within(samples: int, config: RecoveryConfig) -> float:
    """Return the epochs of a training that a time limit ends: those given, else more than fit into most limits.

    24 epochs of 250 samples are 200 steps, over in seconds where the network is small.
    """
    if config.epochs is not None:
        return config.epochs
    return max(_TIMES_WITHIN * config.whole_epochs, _STEPS_WITHIN / max(1, samples // training_batch(samples, config)))


def learning_rate_factor(progress: float) -> float:
    """Return the share of the peak rate at `progress` in [0, 1]: linear warm-up, then cosine to zero."""
    if progress < _WARM_UP:
        return max(progress / _WARM_UP, 0.02)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - _WARM_UP) / (1 - _WARM_UP))))
