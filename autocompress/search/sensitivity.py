"""What each choice costs in quality, on its own and without labels: how far the outputs move.

For every (parameter, choice) the network with that choice alone, reconstructed as a candidate is, is compared with the
uncompressed one, recalibrated likewise, by the Kullback-Leibler divergence of their outputs on calibration data. The
strongest choices come first; what there is no time for follows from them. Figures are kept in the user's cache, so that
another target or an interrupted pass begins with what is known.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from autocompress.compress import rewrite
from autocompress.compress.scoring import channel_scores
from autocompress.config import QuantizationConfig, RunConfig
from autocompress.engines.base import dense_dtypes
from autocompress.environment import cache_directory
from autocompress.errors import CompressionError, ConfigError
from autocompress.inventory import Inventory, take_inventory
from autocompress.latency.table_file import append_text
from autocompress.policy import CompressionPolicy
from autocompress.recovery import OneShot, fast_dtype
from autocompress.recovery.distillation import distillation_loss
from autocompress.search.fitting import severity
from autocompress.search.space import Choice, SearchSpace, bind, configured_space
from autocompress.tasks.base import Task
from autocompress.worker.client import EngineWorker

# Calibration samples that a choice is judged on.
SAMPLES = 256
# Of what is kept in the cache: losses after reconstruction, of layers factorized along their outputs.
_METHOD = "reconstructed, ranks of outputs, against what is recalibrated"
# How a loss grows with what is taken away, where only one choice of a parameter was measured.
_USUAL_POWER, _POWERS = 2.0, (0.5, 5.0)
_SMALLEST = 1e-9


@dataclass(frozen=True)
class Sensitivity:
    """Losses of all choices of a space.

    Attributes:
        losses: Parameter to its choices to their loss in nats, 0 for what does nothing.
        measured: Choices measured, those of the cache included; the others are estimated from them.
        choices: All choices that do something.
        samples: Calibration samples they were compared on.
        seconds: Spent in this pass.
    """

    losses: Mapping[str, Mapping[Choice, float]]
    measured: int
    choices: int
    samples: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form; choices are in the order they are offered."""
        rows = {n: [{"choice": c, "loss": loss} for c, loss in found.items()] for n, found in self.losses.items()}
        return {
            "unit": "nats", "samples": self.samples, "choices": self.choices, "measured": self.measured,
            "seconds": self.seconds, "losses": rows,
        }  # fmt: skip


class SensitivityPass:
    """Measure what single choices do to one model.

    Args:
        base: The uncompressed model, rewritten, in eval mode; not changed.
        inventory: Of this model.
        scores: Of channels, as `CompressionContext` takes them.
        task: Gives calibration data, and names the model for the cache.
        space: What may be chosen.
        quantization: How ranges of activations are set.
    """

    def __init__(
        self, base: nn.Module, inventory: Inventory, scores: Mapping[str, Tensor], task: Task, space: SearchSpace, *,
        quantization: QuantizationConfig | None = None,
    ) -> None:  # fmt: skip
        self._base, self._space = base, space
        self._inputs = next(iter(task.calibration(SAMPLES)))
        inputs, quantization = task.example_inputs(2), quantization or QuantizationConfig()
        self._oneshot = OneShot(base, inventory, scores, inputs, [self._inputs], quantization=quantization)
        self.path = cache_directory() / "sensitivity" / f"{_key(base, task, space, quantization)}.jsonl"

    def run(
        self, deadline: float = math.inf, progress: Callable[[float, str], None] = lambda share, text: None
    ) -> Sensitivity | None:
        """Measure until all is measured or `time.monotonic()` is `deadline`; None where the outputs say nothing.

        That is the case when the uncompressed model's outputs are not finite, or no choice moves them.
        """
        started = time.monotonic()
        known = self._stored()
        with torch.no_grad():
            expected = self._outputs(self._base)
        if not bool(torch.isfinite(expected).all()):
            return None
        with torch.no_grad():
            # What changes the structure has its batch-norms recalibrated, which moves the outputs by itself: counted to
            # every choice alike, that hid what the mild ones lose.
            recalibrated = self._outputs(self._oneshot.recalibrated())
        wanted = self._order()
        for number, (name, choice) in enumerate(wanted):
            if choice in known.get(name, {}):
                continue
            if time.monotonic() >= deadline:
                break
            progress(number / len(wanted), name)
            policy = self._space.policy({name: choice})
            loss = self._loss(policy, expected if policy.is_structural_identity else recalibrated)
            known.setdefault(name, {})[choice] = loss
            self._store(name, choice, loss)
        if not any(loss > _SMALLEST for found in known.values() for loss in found.values() if math.isfinite(loss)):
            return None
        measured = sum(choice in known.get(name, {}) for name, choice in wanted)
        seconds = time.monotonic() - started
        return Sensitivity(self._complete(known), measured, len(wanted), len(self._inputs), seconds)

    # -- measuring ----------------------------------------------------------------------------------------------------

    def _order(self) -> list[tuple[str, Choice]]:
        """Return every choice that does something: each parameter's strongest, then its middle, then the others."""
        rounds: dict[int, list[tuple[str, Choice]]] = {}
        for name, offered in self._space.parameters.items():
            steps = sorted(offered, key=lambda choice: severity(name, choice))
            steps = [choice for choice in steps if choice != offered[0]]
            middle = (len(steps) - 1) // 2
            for place, choice in enumerate(steps):
                turn = 0 if place == len(steps) - 1 else 1 if place == middle else 2
                rounds.setdefault(turn, []).append((name, choice))
        return [pair for _, pairs in sorted(rounds.items()) for pair in pairs]

    def _loss(self, policy: CompressionPolicy, expected: Tensor) -> float:
        try:
            model = self._oneshot.model(policy)
        except CompressionError:
            return math.inf
        with torch.no_grad():
            return float(distillation_loss(self._outputs(model), expected, 1.0))

    def _outputs(self, model: nn.Module) -> Tensor:
        dtype = fast_dtype()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            return model(self._inputs).float()  # type: ignore[no-any-return]

    # -- what is not measured -----------------------------------------------------------------------------------------

    def _complete(self, known: Mapping[str, Mapping[Choice, float]]) -> dict[str, dict[Choice, float]]:
        """Return a loss for every choice; what could not be computed loses twice the most that any other does."""
        finite = [loss for found in known.values() for loss in found.values() if math.isfinite(loss)]
        most = 2 * max(finite)
        usual: dict[str, list[float]] = {}
        clean: dict[str, dict[Choice, float]] = {}
        for name, found in known.items():
            clean[name] = {c: max(loss, 0.0) if math.isfinite(loss) else most for c, loss in found.items()}
            strongest = max(clean[name].values(), default=0.0)
            usual.setdefault(name.partition("/")[0], []).append(strongest)
        everything = [loss for found in usual.values() for loss in found]
        losses = {}
        for name, offered in self._space.parameters.items():
            typical = median(usual.get(name.partition("/")[0], everything))
            losses[name] = completed(name, offered, clean.get(name, {}), typical)
        return losses

    # -- the cache ----------------------------------------------------------------------------------------------------

    def _stored(self) -> dict[str, dict[Choice, float]]:
        """Return what earlier passes measured; a line cut short by a crash is left out."""
        found: dict[str, dict[Choice, float]] = {}
        try:
            lines = self.path.read_text().splitlines()
        except OSError:
            return found
        for line in lines:
            try:
                row = json.loads(line)
                loss = math.inf if row["loss"] is None else float(row["loss"])
                found.setdefault(row["parameter"], {})[row["choice"]] = loss
            except (ValueError, KeyError, TypeError):
                continue
        return found

    def _store(self, name: str, choice: Choice, loss: float) -> None:
        row = {"parameter": name, "choice": choice, "loss": loss if math.isfinite(loss) else None}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # A line that a crash cut short must not swallow this one.
            whole = not self.path.exists() or self.path.read_bytes()[-1:] in (b"", b"\n")
            append_text(self.path, ("" if whole else "\n") + json.dumps(row) + "\n")
        except (OSError, ConfigError):
            # The cache is a convenience: what cannot be kept is measured again.
            return


def completed(
    name: str, offered: Sequence[Choice], known: Mapping[Choice, float], typical: float
) -> dict[Choice, float]:
    """Return the loss of every choice of a parameter: measured ones, and a power law of severity between them.

    Args:
        name: The parameter.
        offered: Its choices, the first does nothing.
        known: Losses that were measured.
        typical: Loss of the strongest choice where none was.
    """
    points = sorted((severity(name, choice), loss) for choice, loss in known.items() if severity(name, choice) > 0)
    strongest = max(severity(name, choice) for choice in offered)
    points = points or [(strongest, typical)]
    found: dict[Choice, float] = {offered[0]: 0.0}
    for choice in offered[1:]:
        found[choice] = known[choice] if choice in known else _between(points, severity(name, choice))
    return found


def _between(points: Sequence[tuple[float, float]], place: float) -> float:
    """Return the loss at a severity, by the power law through the two nearest measured ones."""
    above = [number for number, point in enumerate(points) if point[0] > place]
    at = above[0] if above else len(points) - 1
    near = points[at]
    power = _USUAL_POWER
    if len(points) > 1:
        other = points[at - 1] if at else points[1]
        if min(other[1], near[1]) > _SMALLEST:
            power = math.log(near[1] / other[1]) / math.log(near[0] / other[0])
    power = min(max(power, _POWERS[0]), _POWERS[1])
    return float(near[1] * (place / near[0]) ** power)


def _key(base: nn.Module, task: Task, space: SearchSpace, quantization: QuantizationConfig) -> str:
    # What is the default is left out, so that what was measured before it could be chosen is still known.
    said = quantization.model_dump(exclude_defaults=True)
    parts = [task.fingerprint(), space.file.importance, SAMPLES, _METHOD, *([said] if said else [])]
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode())
    for name, tensor in base.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def cached_at() -> Path:
    """Return the folder that losses are kept in."""
    return cache_directory() / "sensitivity"


def of_task(
    task: Task, config: RunConfig, progress: Callable[[float, str], None] = lambda share, text: None
) -> Sensitivity | None:
    """Return the losses of all choices that a search of this task would have; None as `SensitivityPass.run`.

    Raises:
        ConfigError: The space leaves nothing to choose.
        UnavailableError: The engine, which decides whether int8 is a choice, is not here.
    """
    with EngineWorker() as worker:
        described = worker.describe(config.engine, config.engine_options)
    capabilities = described["capabilities"]
    dense_dtype = dense_dtypes(capabilities, config.dense_dtype, f"{config.engine} ({described['device']})")[0]
    base = rewrite(task.model()).to(memory_format=torch.channels_last)
    inventory = take_inventory(base, task.example_inputs(2))
    file = configured_space(config)
    space = bind(file, base, inventory, dense_dtype, capabilities)
    scores = channel_scores(task, base, inventory, file.importance)
    return SensitivityPass(base, inventory, scores, task, space, quantization=config.quantization).run(
        progress=progress
    )
