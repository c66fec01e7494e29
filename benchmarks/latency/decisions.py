"""Does a trial's measurement order two networks that lie 5 % apart?

    python benchmarks/latency/decisions.py [--engine openvino] [--pairs 40]

Builds convolutional networks of many widths (random weights, 32², batch 1, one thread), measures each on eight
occasions against the widest, and takes pairs whose ratios lie 4 to 6 % apart. Then each network of a pair is measured
once more as a search's trial would: by `Protocol.trial`, and by the protocol of before occasions (one process for both
files, 0.4 s of each, rounds in turns). A pair is ordered rightly where the slower network has the larger ratio. Writes
``results/DEVICE/decisions.json``.
"""

from __future__ import annotations

import argparse
import itertools
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from aa import RESULTS
from torch import nn

from autocompress.engines import EngineFile, EngineOptions
from autocompress.files import write_json
from autocompress.graph.export import save_onnx, to_onnx
from autocompress.measurement.client import EngineWorker
from autocompress.measurement.fingerprint import device_fingerprint
from autocompress.measurement.protocol import Protocol

WIDTHS = range(40, 100, 2)
BEFORE = Protocol(
    warm_up_s=0.1, min_iterations=40, min_seconds=0.4, max_seconds=0.8, noise_limit=0.03, patience_s=2.0, instances=1
)  # fmt: skip
INPUT = (1, 3, 32, 32)


def network(width: int) -> nn.Module:
    """Return a network of six convolutions; the last two have half the resolution."""
    torch.manual_seed(width)
    widths, strides = [3, 32, width, width, 96, width, 96], [1, 1, 1, 2, 1, 1]
    layers: list[nn.Module] = []
    for (before, after), stride in zip(itertools.pairwise(widths), strides, strict=True):
        layers += [nn.Conv2d(before, after, 3, stride, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(96, 10)).eval()


def main() -> None:
    """Build, measure, pair and decide."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", default="openvino", choices=("openvino", "onnxruntime"))
    parser.add_argument("--pairs", type=int, default=40)
    options = parser.parse_args()
    inputs = np.random.default_rng(0).standard_normal(INPUT, np.float32)
    with tempfile.TemporaryDirectory() as name, EngineWorker() as worker:
        files: dict[int, EngineFile] = {}
        for width in WIDTHS:
            graph = Path(name) / f"{width}.onnx"
            save_onnx(to_onnx(network(width), torch.zeros(INPUT)), graph)
            files[width] = worker.build(options.engine, graph, EngineOptions(), Path(name) / f"engine-{width}")
        widest = files[max(WIDTHS)]
        truth = {
            width: worker.measure([widest, file], inputs, Protocol.again(8))[1].ratio for width, file in files.items()
        }
        close = [
            (a, b) for a, b in itertools.permutations(WIDTHS, 2) if 1.04 <= truth[b] / truth[a] <= 1.06
        ]  # fmt: skip
        chosen = random.Random(0).sample(close, min(options.pairs, len(close)))
        found: list[dict[str, Any]] = []
        for faster, slower in chosen:
            one: dict[str, Any] = {"faster": faster, "slower": slower, "truth": truth[slower] / truth[faster]}
            for label, protocol in (("occasion", Protocol.trial()), ("before", BEFORE)):
                begun = time.monotonic()
                ratios = [worker.measure([widest, files[w]], inputs, protocol)[1].ratio for w in (faster, slower)]
                one[label] = {"ratios": ratios, "seconds": (time.monotonic() - begun) / 2}
            found.append(one)
            print(one, flush=True)
    right = {
        label: sum(one[label]["ratios"][0] < one[label]["ratios"][1] for one in found)
        for label in ("occasion", "before")
    }
    document = {
        "device": device_fingerprint(), "engine": options.engine, "pairs": len(found), "right": right,
        "seconds": {label: float(np.median([one[label]["seconds"] for one in found])) for label in right},
        "truth": {str(width): ratio for width, ratio in truth.items()}, "found": found,
    }  # fmt: skip
    write_json(RESULTS / "decisions.json", document)
    print({key: document[key] for key in ("pairs", "right", "seconds")})


if __name__ == "__main__":
    main()
