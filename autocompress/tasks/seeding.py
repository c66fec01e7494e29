"""The seed of a run."""

from __future__ import annotations

import random

import numpy as np
import torch


def seed_everything(seed: int) -> None:
    """Seed the generators of random, numpy and torch in this process."""
    random.seed(seed)
    # numpy's legacy generator takes 32 bits; torch takes 64.
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
