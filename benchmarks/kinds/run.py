"""What becomes of networks with habits: every kind walks from the door to the engine, compressed in several ways.

    python -m benchmarks.kinds.run                    # all, to results.csv
    python -m benchmarks.kinds.run --only lstm glu

A kind is *handled* when it is checked, read, built, and every policy tried (all of it in int8; every group pruned;
low rank; two drawn at random from the search space; one of these trained for a few steps) gives an engine file that
agrees with torch. It is *named* when that holds, but a part is left alone and listed with its reason; *refused* when
it ends in one of the package's own errors before anything was spent. Anything else is *raw*, and a fault.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn

from autocompress.config import RunConfig
from autocompress.errors import AutoCompressError, CompressionError
from autocompress.evaluation.evaluator import CandidateEvaluator
from autocompress.measurement.client import EngineWorker
from autocompress.model.inventory import ITS_OUTPUT
from autocompress.policy import CompressionPolicy
from autocompress.recovery.distillation import Teacher
from autocompress.recovery.finetune import Budget, finetune
from autocompress.runs.directory import RunDirectory
from autocompress.runs.time_ledger import TimeLedger
from autocompress.space.search_space import Choice, SearchSpace, bind, configured_space
from autocompress.tasks import LabelFreeTask, Task, UnlabelledTask, check_task
from benchmarks.kinds.networks import EXPECTED, KINDS, SHAPES

HERE = Path(__file__).parent
_SAMPLES, _STEPS, _TRAINING_S = 48, 2, 3.0
# Characters of what is said that the README shows.
_SHOWN = 140
# Outputs are normal: a head of a class is never the last layer that anything hangs on.
_SEED = 0


@dataclass
class Outcome:
    """What became of one kind.

    Attributes:
        kind: Its name.
        status: ``"handled"``, ``"named"``, ``"refused"`` or ``"raw"``.
        layers, groups: How many may be compressed, and how many axes of channels pruned.
        policies: Compressed networks that agreed with torch in the engine.
        said: What was left alone and why, or the error.
        seconds: All of it.
    """

    kind: str
    status: str
    layers: int = 0
    groups: int = 0
    policies: int = 0
    said: str = ""
    seconds: float = 0.0


Choices = Mapping[str, Choice]


def walk(kind: str, worker: EngineWorker, folder: Path, *, engine: str = "openvino", train: bool = True) -> Outcome:
    """Take one kind from the door to the engine."""

    def make() -> Task:
        inputs = _inputs(SHAPES[kind])
        return LabelFreeTask(UnlabelledTask(KINDS[kind](), inputs, inputs[: _SAMPLES // 2], name="kind"))

    return walk_task(kind, make, worker, folder, engine=engine, train=train)


def walk_task(
    name: str,
    make: Callable[[], Task],
    worker: EngineWorker,
    folder: Path,
    *,
    engine: str = "openvino",
    train: bool = False,
    dense: bool = True,
    choose: Callable[[SearchSpace], Iterable[Choices]] | None = None,
    look: Callable[[CandidateEvaluator, SearchSpace, nn.Module], None] = lambda evaluator, space, model: None,
) -> Outcome:
    """Take one task from the door to the engine.

    Args:
        name: What it is called.
        make: Makes the task.
        worker: Builds and runs the engines.
        folder: Where the networks go; made.
        engine: Which.
        train: Whether the first network is trained for a few steps.
        dense: Whether the uncompressed network is built, too.
        choose: Yields what is chosen of the space, for one network each; by default six ways that differ.
        look: Called with every compressed network that was built.
    """
    begun, found = time.monotonic(), Outcome(name, "raw")
    torch.manual_seed(_SEED)
    try:
        task = make()
        check_task(task)
        config = RunConfig(engine=engine, task={"name": task.name}, table="none")  # type: ignore[arg-type]
        evaluator = CandidateEvaluator(task, config, RunDirectory.create(folder, resume=False), worker)
        if dense:
            evaluator.build(evaluator.original, CompressionPolicy(), folder / "dense", TimeLedger())
        found.layers, found.groups = len(evaluator.inventory.layers), len(evaluator.inventory.groups)
        _compressed(found, evaluator, config, train=train, choose=choose or _choices, look=look)
        evaluator.close()
    except AutoCompressError as error:
        # After the first policy a kind is believed to work.
        found.status = "raw" if found.policies else "refused"
        found.said = f"{type(error).__name__}: {error}"
    except Exception as error:  # noqa: BLE001 - this is what is looked for
        found.said = f"{type(error).__name__}: {error}"
    found.said = " ".join(found.said.replace(f"{folder}/", "").split())[:400]
    found.seconds = round(time.monotonic() - begun, 1)
    return found


def _compressed(
    found: Outcome, evaluator: CandidateEvaluator, config: RunConfig, *, train: bool,
    choose: Callable[[SearchSpace], Iterable[Choices]],
    look: Callable[[CandidateEvaluator, SearchSpace, nn.Module], None],
) -> None:  # fmt: skip
    skipped = {n: why for n, why in evaluator.inventory.skipped.items() if why != ITS_OUTPUT}
    found.said = "; ".join(f"{name}: {why}" for name, why in skipped.items())
    space = bind(configured_space(config), evaluator.base, evaluator.inventory, "fp32", evaluator.capabilities)
    teacher = Teacher(evaluator.task.network(), torch.float32)
    for number, choices in enumerate(choose(space)):
        policy = space.policy(choices)
        model = evaluator.compress(policy, TimeLedger())
        if train and number == 0:
            try:
                finetune(model, teacher, evaluator.task, config.recovery, Budget(_STEPS, _TRAINING_S))
            except CompressionError as error:
                skipped["training"] = str(error)
                found.said = "; ".join([*filter(None, [found.said]), str(error)])
                model = evaluator.compress(policy, TimeLedger())
        evaluator.build(model, policy, evaluator.run.path / f"policy-{number}", TimeLedger())
        found.policies += 1
        look(evaluator, space, model)
    found.status = "named" if skipped else "handled"


def _choices(space: SearchSpace) -> Iterator[Choices]:
    """Yield choices: one of each at random, twice, then each kind of choice alone, at its mildest."""
    drawn = random.Random(_SEED)
    for _ in range(2):
        yield {
            name: drawn.choice(list(offered))
            for name, offered in space.parameters.items()
            if not name.startswith("block/")
        }
    for start in ("dtype/", "prune/", "rank/", "block/"):
        own = {name: offered[1] for name, offered in space.parameters.items() if name.startswith(start)}
        if own:
            yield own


def _inputs(shape: tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(_SEED)
    if len(shape) == 1 and shape[0] in (8,):
        return torch.randint(0, 40, (_SAMPLES, *shape), generator=generator).float()
    if shape == (12,):
        return torch.cat(
            [torch.randint(0, 5000, (_SAMPLES, 6), generator=generator), torch.ones(_SAMPLES, 6)], 1
        ).float()
    return torch.randn(_SAMPLES, *shape, generator=generator)


def main() -> None:
    """Walk every kind, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="KIND", help="; ".join(KINDS))
    parser.add_argument("--engine", default="openvino")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = []
    with EngineWorker() as worker, tempfile.TemporaryDirectory() as folder:
        for number, kind in enumerate(options.only or KINDS):
            rows.append(walk(kind, worker, Path(folder) / str(number), engine=options.engine))
            mark = "" if rows[-1].status in (EXPECTED.get(kind) or "handled named").split(":")[0] else "   <--"
            print(f"{kind:36} {rows[-1].status:8} {rows[-1].layers:3} {rows[-1].groups:3} {rows[-1].policies} "
                  f"{rows[-1].seconds:5.1f} s  {rows[-1].said[:150]}{mark}", flush=True)  # fmt: skip
    table = pd.DataFrame([asdict(row) for row in rows])
    print(table["status"].value_counts().to_string())
    if not options.only:
        table.drop(columns="seconds").to_csv(HERE / f"{options.engine}.csv", index=False)
        write_readme()


def write_readme() -> None:
    """Put what the files of both engines say into the README."""
    found = {path.stem: pd.read_csv(path, keep_default_na=False) for path in sorted(HERE.glob("*.csv"))}
    first = next(iter(found.values()))
    lines = [
        f"| {' | '.join(['kind', 'layers', 'axes of channels', *found, 'left alone, or refused'])} |",
        f"|{'---|' * (4 + len(found))}",
    ]
    for index, row in first.iterrows():
        status = [table.loc[index, "status"] for table in found.values()]
        said = row["said"].replace("|", "/")
        said = f"{said[:_SHOWN]}…" if len(said) > _SHOWN else said
        lines.append(f"| {row['kind']} | {row['layers']} | {row['groups']} | {' | '.join(status)} | {said} |")
    counted = "; ".join(
        f"{name}: " + ", ".join(f"{count} {status}" for status, count in table["status"].value_counts().items())
        for name, table in found.items()
    )
    path = HERE / "README.md"
    begin, end = "<!-- table: begin -->", "<!-- table: end -->"
    before, _, rest = path.read_text().partition(begin)
    text = "\n".join([counted + ".", "", *lines])
    path.write_text(f"{before}{begin}\n{text}\n{end}{rest.partition(end)[2]}")


if __name__ == "__main__":
    main()
