"""A module of a user's that, when it is imported, prints, and switches gradients off for the whole process."""

from __future__ import annotations

import torch

from autocompress import ClassificationTask
from benchmarks.cases.making import Plain, fitted, images_task

print("loading the model zoo ...")
torch.set_grad_enabled(False)


def task() -> ClassificationTask:
    """Gradients are off when this is called, and after."""
    with torch.enable_grad():
        return images_task(fitted(Plain, "plain"), "global-switches")
