"""Load one network's task, training it where that was not done yet, and say how good it is in torch.

    python -m benchmarks.strangers.prepare NETWORK [--images DIR] [--cache DIR]

Prints one JSON document: parameters, the metric on test data, and the seconds this took.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

from autocompress.config import TaskConfig
from autocompress.tasks import Task, load_task
from benchmarks.strangers.networks import NETWORKS, Network


def task_config(network: Network, images: str | None, cache: str | None) -> TaskConfig:
    """Return the task's part of a run file."""
    return TaskConfig(
        name=network.task,
        metric=network.metric,
        data=images if network.images else None,
        weights=cache if network.trained else None,
    )


def metric_in_torch(task: Task) -> float:
    """Return the metric of the uncompressed network on test data."""
    model = task.model()
    outputs, targets = [], []
    with torch.inference_mode():
        for inputs, target in task.test(50):
            outputs.append(model(inputs))
            targets.append(target)
    return task.metric(torch.cat(outputs), torch.cat(targets))


def main() -> None:
    """Prepare one network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", choices=NETWORKS)
    parser.add_argument("--images", type=Path)
    parser.add_argument("--cache", type=Path)
    options = parser.parse_args()
    started = time.monotonic()
    images, cache = (None if path is None else str(path) for path in (options.images, options.cache))
    task = load_task(task_config(NETWORKS[options.network], images, cache))
    loaded = time.monotonic() - started
    found = {
        "metric": metric_in_torch(task),
        "parameters": sum(p.numel() for p in task.model().parameters()),
        "input": list(task.example_inputs(1).shape),
        "seconds_to_load": round(loaded, 1),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
