"""Candidates per minute: every graph exported, graphs edited, and the next candidate made while one is built.

    python benchmarks/search/throughput.py resnet20 --data cifar10-jpeg.tar --weights DIR [--engine openvino]

Random candidates of the default space go through `CandidateEvaluator.evaluate`, as a search's trials do, each in all
three ways, one after the other and in turns, so that a machine that slows down slows all of them. Run nothing else
meanwhile.
Writes benchmarks/search/results/throughput.json, one entry for each model and engine.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

from compare import HERE, WEIGHTS, arguments_of

from autocompress import environment
from autocompress.config import RunConfig, TaskConfig
from autocompress.errors import EngineError, VerificationError
from autocompress.evaluation.evaluator import CandidateEvaluator
from autocompress.evaluation.profiler import random_choices
from autocompress.files import read_json, write_json
from autocompress.measurement.client import EngineWorker
from autocompress.measurement.fingerprint import device_fingerprint
from autocompress.policy import CompressionPolicy
from autocompress.runs.directory import RunDirectory
from autocompress.space.search_space import SearchSpace, load_space
from autocompress.tasks import load_task

RESULTS = HERE / "results" / "throughput.json"
# Candidates of one turn: the next one can be made ahead of all of them but the first.
_TURN = 5


def turn(evaluator: CandidateEvaluator, policies: Sequence[CompressionPolicy], *, first: int, ahead: bool) -> float:
    """Evaluate candidates; return the seconds for one."""
    begun = time.perf_counter()
    for index, policy in enumerate(policies):
        following = policies[index + 1] if index + 1 < len(policies) else None

        def meanwhile(policy: CompressionPolicy | None = following) -> None:
            assert policy is not None
            evaluator.prepare(policy, look=False)

        beside: Callable[[], None] | None = meanwhile if ahead and following is not None else None
        # One that the checks refuse costs a search the same.
        with suppress(EngineError, VerificationError):
            evaluator.evaluate(policy, first + index, meanwhile=beside)
    return (time.perf_counter() - begun) / len(policies)


def main() -> None:
    """Evaluate the candidates in all ways."""
    parser = arguments_of(__doc__)
    parser.add_argument("--engine", default="openvino")
    parser.add_argument("--turns", type=int, default=4)
    arguments = parser.parse_args()
    environment.seed_everything(0)
    weights = str(Path(arguments.weights) / WEIGHTS[arguments.model])
    task = load_task(TaskConfig(name="cifar10", model=arguments.model, data=arguments.data, weights=weights))
    config = RunConfig(engine=arguments.engine)
    seconds: dict[str, list[float]] = {"exported": [], "edited": [], "ahead": []}
    with tempfile.TemporaryDirectory() as folder, EngineWorker() as worker:
        evaluator = CandidateEvaluator(task, config, RunDirectory.create(Path(folder) / "run", resume=False), worker)
        baseline = evaluator.open_baseline()
        space = SearchSpace(load_space("default"), evaluator.inventory, baseline.policy.dense_dtype, int8=True)
        rng = random.Random(0)
        # The first one finds caches cold.
        evaluator.evaluate(space.policy(random_choices(space, rng)), 0)
        number = 1
        for _ in range(arguments.turns):
            policies = [space.policy(random_choices(space, rng)) for _ in range(_TURN)]
            for way, found in seconds.items():
                if way == "exported":
                    evaluator.graphs.export_from_now_on()
                else:
                    evaluator.graphs.edit_again()
                found.append(turn(evaluator, policies, first=number, ahead=way == "ahead"))
                number += _TURN
                print(way, f"{found[-1]:.2f} s", flush=True)
        evaluator.close()
    document: dict[str, Any] = read_json(RESULTS) if RESULTS.exists() else {}
    document[f"{arguments.model}-{arguments.engine}"] = {
        "device": device_fingerprint(), "environment": environment.describe(), "threads": config.threads,
        "candidates": arguments.turns * _TURN, "seconds_each": seconds,
        "per_minute": {way: 60 / median(found) for way, found in seconds.items()},
        "ahead_over_exported": median(a / b for a, b in zip(seconds["exported"], seconds["ahead"], strict=True)),
        "ahead_over_edited": median(a / b for a, b in zip(seconds["edited"], seconds["ahead"], strict=True)),
    }  # fmt: skip
    write_json(RESULTS, document)
    print(document[f"{arguments.model}-{arguments.engine}"]["per_minute"])


if __name__ == "__main__":
    main()
