"""Random small networks composed of the habits in `networks`, and what becomes of each: a property, for hypothesis.

    python -m benchmarks.kinds.composed --examples 2000 --seed 0

Of every network a random group is pruned, a random layer is int8 and another of low rank; the engine has to agree with
torch, or one of the package's own errors has to come. Nothing else may be raised.
"""

from __future__ import annotations

import argparse
import math
import random
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as hypothesis_seed
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from autocompress.config import RunConfig
from autocompress.errors import AutoCompressError
from autocompress.evaluation.evaluator import CandidateEvaluator
from autocompress.files import write_json
from autocompress.measurement.client import EngineWorker
from autocompress.policy import CompressionPolicy
from autocompress.runs.directory import RunDirectory
from autocompress.runs.time_ledger import TimeLedger
from autocompress.space.search_space import bind, configured_space
from autocompress.tasks import LabelFreeTask, UnlabelledTask

HERE = Path(__file__).parent
_SAMPLES, _SIZE = 20, 8
# Networks between two writings of what was found so far.
_WRITTEN_EVERY = 25


class Block(nn.Module):
    """Maps ``(N, width, H, W)`` to ``(N, width, H, W)``: modules by name, and what forward does with them."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor], **modules: Any) -> None:
        super().__init__()
        for name, module in modules.items():
            setattr(self, name, module)
        self._does = forward

    def forward(self, x: Tensor) -> Tensor:
        """Apply it."""
        return self._does(self, x)


def _conv(ins: int, outs: int, size: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(ins, outs, size, padding=size // 2, **options)


def _shuffled(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


def _shared(width: int) -> nn.Module:
    made = nn.Sequential(_conv(width, width), nn.ReLU(), _conv(width, width))
    made[2].weight = made[0].weight
    return made


def _without(module: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = F.relu(module(x))
    return found


BLOCKS: dict[str, Callable[[int], nn.Module]] = {
    "plain": lambda c: nn.Sequential(_conv(c, c), nn.BatchNorm2d(c), nn.ReLU()),
    "residual": lambda c: Block(lambda m, x: F.relu(x + m.b(F.relu(m.a(x)))), a=_conv(c, c), b=_conv(c, c)),
    "bottleneck": lambda c: Block(lambda m, x: x + m.b(F.silu(m.a(x))), a=_conv(c, c // 2, 1), b=_conv(c // 2, c)),
    "inverted": lambda c: Block(
        lambda m, x: x + m.c(F.relu6(m.b(F.relu6(m.a(x))))),
        a=_conv(c, 2 * c, 1), b=_conv(2 * c, 2 * c, groups=2 * c), c=_conv(2 * c, c, 1),
    ),
    "prelu": lambda c: nn.Sequential(_conv(c, c), nn.PReLU(c)),
    "layer scale": lambda c: Block(lambda m, x: x + m.g * m.a(x), a=_conv(c, c), g=nn.Parameter(torch.rand(c, 1, 1))),
    "group norm": lambda c: Block(lambda m, x: x + F.relu(m.n(m.a(x))), a=_conv(c, c), n=nn.GroupNorm(4, c)),
    "instance norm": lambda c: nn.Sequential(_conv(c, c), nn.InstanceNorm2d(c, affine=True), nn.LeakyReLU()),
    "gate": lambda c: Block(
        lambda m, x: x * m.b(F.relu(m.a(x.mean((2, 3), keepdim=True)))).sigmoid(), a=_conv(c, 4, 1), b=_conv(4, c, 1)
    ),
    "halves": lambda c: Block(
        lambda m, x: x + m.b(torch.mul(*m.a(x).chunk(2, 1))), a=_conv(c, 2 * c, 1), b=_conv(c, c, 1)
    ),
    "grouped": lambda c: nn.Sequential(_conv(c, c, groups=4), nn.GELU()),
    "depthwise": lambda c: nn.Sequential(_conv(c, c, groups=c), nn.Hardswish(), _conv(c, c, 1)),
    "concatenation": lambda c: Block(
        lambda m, x: m.c(torch.cat([F.relu(m.a(x)), m.b(x)], 1)), a=_conv(c, c), b=_conv(c, c, 1), c=_conv(2 * c, c, 1)
    ),
    "dense": lambda c: Block(lambda m, x: m.b(torch.cat([x, F.relu(m.a(x))], 1)), a=_conv(c, 4), b=_conv(c + 4, c, 1)),
    "shuffle": lambda c: Block(lambda m, x: _shuffled(F.relu(m.a(x))), a=_conv(c, c, groups=2)),
    "down and up": lambda c: Block(
        lambda m, x: x + F.interpolate(F.relu(m.a(x)), scale_factor=2), a=_conv(c, c, stride=2)
    ),
    "transposed": lambda c: Block(
        lambda m, x: x + m.b(F.relu(m.a(x))), a=_conv(c, c, stride=2), b=nn.ConvTranspose2d(c, c, 2, 2)
    ),
    "convnext": lambda c: Block(
        lambda m, x: x + m.b(F.gelu(m.a(m.n(m.d(x).permute(0, 2, 3, 1))))).permute(0, 3, 1, 2),
        d=_conv(c, c, 5, groups=c), n=nn.LayerNorm(c), a=nn.Linear(c, 2 * c), b=nn.Linear(2 * c, c),
    ),
    "attention": lambda c: Block(
        lambda m, x: x + m.a(*3 * [x.flatten(2).transpose(1, 2)], need_weights=False)[0].transpose(1, 2).view_as(x),
        a=nn.MultiheadAttention(c, 2, batch_first=True),
    ),
    "twice": lambda c: Block(lambda m, x: F.relu(m.a(F.relu(m.a(x)))), a=_conv(c, c)),
    "shared": _shared,
    "weight norm": lambda c: nn.Sequential(parametrizations.weight_norm(_conv(c, c)), nn.Tanh()),
    "no gradients": lambda c: Block(lambda m, x: _without(m.a, x), a=_conv(c, c)),
    "unused": lambda c: Block(lambda m, x: (m.b(x), F.relu(m.a(x)))[1], a=_conv(c, c), b=_conv(c, c)),
    "maximum": lambda c: Block(lambda m, x: torch.maximum(m.a(x), m.b(x)), a=_conv(c, c), b=_conv(c, c, 1)),
    "norm of channels": lambda c: Block(
        lambda m, x: m.g * F.normalize(m.a(x), dim=1), a=_conv(c, c), g=nn.Parameter(torch.rand(c, 1, 1))
    ),
    "slices": lambda c: Block(
        lambda m, x: torch.cat([x[:, : c // 2], m.a(x[:, c // 2 :])], 1), a=_conv(c // 2, c // 2)
    ),
}  # fmt: skip


HEADS: dict[str, Callable[[int], nn.Module]] = {
    "mean": lambda c: Block(lambda m, x: m.fc(x.mean((2, 3))), fc=nn.Linear(c, 5)),
    "maximum": lambda c: Block(lambda m, x: m.fc(x.amax((2, 3))), fc=nn.Linear(c, 5)),
    "flat": lambda c: Block(lambda m, x: m.fc(x.flatten(1)), fc=nn.Linear(c * _SIZE**2, 5)),
    "view": lambda c: Block(lambda m, x: m.fc(x.contiguous().view(len(x), -1)), fc=nn.Linear(c * _SIZE**2, 5)),
    "tokens": lambda c: Block(
        lambda m, x: m.fc(m.n(x.flatten(2).transpose(1, 2)).mean(1)), n=nn.LayerNorm(c), fc=nn.Linear(c, 5)
    ),
    "map": lambda c: _conv(c, 3, 1),
    "number": lambda c: Block(lambda m, x: m.fc(x.mean((2, 3)))[:, 0], fc=nn.Linear(c, 1)),
}  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """What a network is made of, and what its weights and policies are drawn by."""

    width: int
    blocks: tuple[str, ...]
    head: str
    seed: int

    def make(self) -> nn.Module:
        """Return the network in eval mode."""
        torch.manual_seed(self.seed)
        stem = nn.Sequential(_conv(3, self.width), nn.BatchNorm2d(self.width), nn.ReLU())
        return nn.Sequential(
            stem, *(BLOCKS[name](self.width) for name in self.blocks), HEADS[self.head](self.width)
        ).eval()


RECIPES = st.builds(
    Recipe,
    width=st.sampled_from((8, 16)),
    blocks=st.lists(st.sampled_from(sorted(BLOCKS)), min_size=1, max_size=4).map(tuple),
    head=st.sampled_from(sorted(HEADS)),
    seed=st.integers(0, 2**16),
)


def outcome(recipe: Recipe, worker: EngineWorker, engine: str = "openvino") -> str:
    """Return ``"agrees"`` or the package's own error; whatever else is raised, is raised."""
    inputs = torch.randn(_SAMPLES, 3, _SIZE, _SIZE, generator=torch.Generator().manual_seed(recipe.seed))
    task = LabelFreeTask(UnlabelledTask(recipe.make(), inputs, inputs[:4], name="composed"))
    config = RunConfig(engine=engine, task={"name": "composed"}, table="none")  # type: ignore[arg-type]
    drawn = random.Random(recipe.seed)
    with tempfile.TemporaryDirectory() as folder:
        try:
            evaluator = CandidateEvaluator(
                task, config, RunDirectory.create(Path(folder) / "run", resume=False), worker
            )
            evaluator.build(evaluator.original, CompressionPolicy(), Path(folder) / "dense", TimeLedger())
            space = bind(configured_space(config), evaluator.base, evaluator.inventory, "fp32", evaluator.capabilities)
            choices = {}
            for start in ("prune/", "dtype/", "rank/"):
                own = [name for name in space.parameters if name.startswith(start)]
                if own:
                    name = drawn.choice(own)
                    choices[name] = drawn.choice(list(space.parameters[name])[1:])
            policy = space.policy(choices)
            evaluator.build(evaluator.compress(policy, TimeLedger()), policy, Path(folder) / "policy", TimeLedger())
        except AutoCompressError as error:
            return f"{type(error).__name__}: {str(error).replace(folder, '')[:160]}"
    return "agrees"


def main() -> None:
    """Draw networks, and count what becomes of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engine", default="openvino")
    parser.add_argument("--minutes", type=float, default=math.inf, help="no network is begun after this long")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    counts: Counter[str] = Counter()
    odd: list[dict[str, Any]] = []
    begun = time.monotonic()

    def write() -> None:
        drawn = {"examples": sum(counts.values()), "seed": options.seed, "engine": options.engine}
        document = {**drawn, "counts": counts, "odd": odd}
        write_json(HERE / f"composed-{options.engine}-{options.seed}.json", document)

    with EngineWorker() as worker:

        @hypothesis_seed(options.seed)
        @settings(
            max_examples=options.examples, deadline=None, database=None, phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @given(RECIPES)
        def look(recipe: Recipe) -> None:
            if time.monotonic() - begun > 60 * options.minutes:
                return
            try:
                found = outcome(recipe, worker, options.engine)
            except Exception as error:  # noqa: BLE001 - this is what is looked for
                found = f"raw {type(error).__name__}: {str(error)[:160]}"
            kind = "raw" if found.startswith("raw") else found.partition(":")[0]
            counts[kind] += 1
            if sum(counts.values()) % _WRITTEN_EVERY == 0:
                write()
            if found != "agrees":
                odd.append({**asdict(recipe), "found": found})
                print(sum(counts.values()), recipe, found, flush=True)

        look()
    write()
    print(counts)


if __name__ == "__main__":
    main()
