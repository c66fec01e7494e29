"""What choices cost in quality, without labels: how far the outputs move, by the task's own divergence.

For every (parameter, choice) the network with that choice alone, reconstructed as a candidate is, is compared with the
uncompressed one, recalibrated likewise. What int8 does is attributed to the layers by one network. Where there is less
time than that takes, whole networks, stages and layers are measured in this order, and what is left follows from them.
`SensitivityCache` keeps what single choices lose.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from autocompress.compress import rewrite
from autocompress.compress.layout import in_fast_layout
from autocompress.compress.task_evidence import channel_scores
from autocompress.config import QuantizationConfig, RunConfig
from autocompress.engines.base import dense_dtypes
from autocompress.errors import CompressionError, NotANumberError
from autocompress.exploration.int8_sensitivity import Int8Sensitivity
from autocompress.exploration.loss_curve import at_severity, completed
from autocompress.exploration.sensitivity_cache import SensitivityCache
from autocompress.graph.qdq_rules import RULES
from autocompress.measurement.client import EngineWorker
from autocompress.model.inventory import Inventory, take_inventory
from autocompress.policy import CompressionPolicy, LayerPolicy
from autocompress.recovery import TrainingFreeCompressor
from autocompress.space.parameter import Parameter
from autocompress.space.search_space import Choice, SearchSpace, bind, configured_space
from autocompress.space.severity import severity
from autocompress.tasks.base import Task

# Samples that a choice is judged on, those of a forward and backward pass, and of a forward pass at once.
SAMPLES, _INT8_SAMPLES, _ROWS = 256, 64, 64
# Of what is kept in the cache: losses after reconstruction, of layers factorized along their outputs.
_METHOD = "reconstructed, ranks of outputs, against what is recalibrated"
# In any unit, what is no loss.
_SMALLEST = 1e-9
# Stages of a network that are measured together, and layers whose int8 is measured before anything else of its kind.
_STAGES, _URGENT = 4, 8
# Networks that are made at most to find the layers which cannot be int8.
_MOST_HALVES = 16


@dataclass(frozen=True)
class Sensitivity:
    """Losses of all choices of a space.

    Attributes:
        losses: Parameter to its choices to their loss, in the unit of the task's divergence, 0 for what does nothing;
            empty where nothing is known.
        measured: Choices measured, those of the cache included; the others are estimated from them.
        choices: All choices that do something.
        samples: Samples they were compared on.
        seconds: Spent in this pass.
        note: Why nothing is known; None otherwise.
        unit: What losses are.
    """

    losses: Mapping[str, Mapping[Choice, float]]
    measured: int
    choices: int
    samples: int
    seconds: float
    note: str | None = None
    unit: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form; choices are in the order they are offered."""
        rows = {n: [{"choice": c, "loss": loss} for c, loss in found.items()] for n, found in self.losses.items()}
        return {
            "unit": self.unit, "samples": self.samples, "choices": self.choices, "measured": self.measured,
            "seconds": self.seconds, "losses": rows,
        }  # fmt: skip


class SensitivityPass:
    """Measure what choices do to one model, coarse first where there is little time.

    Args:
        base: The uncompressed model, rewritten, in eval mode; not changed.
        inventory: Of this model.
        scores: Of channels, as `CompressionContext` takes them.
        task: Gives calibration data and the divergence, and names the model for the cache.
        space: What may be chosen.
        quantization: How ranges of activations are set.
        compressor: Makes compressed forms of `base`; None makes one of the task's calibration data.
        inputs: What networks are compared on ``(N, ...)``; None takes calibration data. Samples that `compressor` has
            not fitted anything to tell more.
    """

    def __init__(
        self, base: nn.Module, inventory: Inventory, scores: Mapping[str, Tensor], task: Task, space: SearchSpace, *,
        quantization: QuantizationConfig | None = None, compressor: TrainingFreeCompressor | None = None,
        inputs: Tensor | None = None,
    ) -> None:  # fmt: skip
        self._base, self._space, self._task = base, space, task
        quantization = quantization or QuantizationConfig()
        if inputs is None:
            inputs = next(iter(task.calibration(SAMPLES)))
        self._inputs = inputs[:SAMPLES]
        self._compressor = compressor or TrainingFreeCompressor(
            base, inventory, scores, task.example_inputs(2), [self._inputs], quantization=quantization
        )
        self.cache = SensitivityCache(base, task, [space.file.importance, SAMPLES, _METHOD], quantization, self._inputs)
        self._int8: tuple[Int8Sensitivity, Mapping[str, float]] | None = None
        self._int8_made = False

    def run(
        self, deadline: float = math.inf, progress: Callable[[float, str], None] = lambda share, text: None
    ) -> Sensitivity:
        """Measure until all is measured or `time.monotonic()` is `deadline`.

        int8 comes first: one network tells of all its layers. Where there is no time for every single choice, whole
        networks, then stages, then layers are measured, mild choices before harsh ones, spread over the network.
        """
        started = time.monotonic()
        clock = _Clock(deadline)
        single = self.cache.read()
        reference = self._dense_outputs
        if not bool(torch.isfinite(reference).all()):
            return self._result({}, 0, 0, started, "the uncompressed model's outputs are not finite")
        wanted = self._singles()
        missing = [pair for pair in wanted if pair[1] not in single.get(pair[0], {})]
        shared: dict[str, dict[Choice, float]] = {}
        if missing:
            progress(0.0, "int8")
            with clock.measuring():
                shared |= {name: {"int8": part} for name, part in self._int8_choices().items()}
        if missing and not clock.over():
            recalibrated, order = self._moved_outputs, missing
            if math.isfinite(deadline):
                first = self._one(missing[0], reference, recalibrated, single, clock)
                order = missing[1:]
                if first * len(order) > clock.left:
                    shared |= self._coarse(reference, recalibrated, clock, progress)
                    order = [pair for pair in self._hurried(missing) if pair != missing[0]]
            for number, pair in enumerate(order):
                if clock.over():
                    break
                progress(number / len(order), pair[0])
                self._one(pair, reference, recalibrated, single, clock)
        measured = sum(choice in single.get(name, {}) for name, choice in wanted)
        known = [loss for found in (*single.values(), *shared.values()) for loss in found.values()]
        note: str | None = None
        if not known:
            note = "there was no time to measure any choice"
        elif not any(loss > _SMALLEST for loss in known if math.isfinite(loss)):
            note = "no choice moves the model's outputs"
        losses = {} if note else self._complete(single, shared)
        return self._result(losses, measured, len(wanted), started, note)

    def _result(
        self, losses: Mapping[str, Mapping[Choice, float]], measured: int, choices: int, started: float,
        note: str | None,
    ) -> Sensitivity:  # fmt: skip
        seconds = time.monotonic() - started
        return Sensitivity(losses, measured, choices, len(self._inputs), seconds, note, self._task.divergence_name)

    def divergence(self, policy: CompressionPolicy) -> float:
        """Return how far the outputs of a network are from the uncompressed one's; infinite if it cannot be made."""
        loss = self._loss(policy, self._dense_outputs if policy.is_structural_identity else self._moved_outputs)
        return loss if math.isfinite(loss) else math.inf

    @cached_property
    def _dense_outputs(self) -> Tensor:
        """What the uncompressed network gives."""
        with torch.no_grad():
            return self._outputs(self._base)

    @cached_property
    def _moved_outputs(self) -> Tensor:
        """What it gives with its batch-norms as those of changed networks are.

        That moves the outputs by itself: counted to every choice alike, it would hide what the mild ones lose.
        """
        with torch.no_grad():
            return self._outputs(self._compressor.recalibrated())

    # -- what is measured, in which order -----------------------------------------------------------------------------

    def _singles(self) -> list[tuple[str, Choice]]:
        """Return every choice that does something: each parameter's strongest, then its middle, then the others."""
        rounds: dict[int, list[tuple[str, Choice]]] = {}
        for name in self._space.parameters:
            steps = self._steps(name)
            middle = (len(steps) - 1) // 2
            for place, choice in enumerate(steps):
                turn = 0 if place == len(steps) - 1 else 1 if place == middle else 2
                rounds.setdefault(turn, []).append((name, choice))
        return [pair for _, pairs in sorted(rounds.items()) for pair in pairs]

    def _hurried(self, pairs: Sequence[tuple[str, Choice]]) -> list[tuple[str, Choice]]:
        """Return choices in the order that tells most when it is cut short.

        int8 of the layers that it harms most; then of every parameter the mildest choice, the next one and so on, far
        apart in the network first.
        """
        place = {name: number for number, name in enumerate(spread(list(self._space.parameters)))}
        parts = self._int8_parts()
        worst = sorted(parts.values(), reverse=True)
        urgent = worst[min(len(worst) - 1, _URGENT)] if worst else math.inf

        def key(pair: tuple[str, Choice]) -> tuple[float, float]:
            name, choice = pair
            kind, layer = Parameter.of(name)
            if kind == "dtype":
                return (-1.0 if parts.get(layer, 0.0) >= urgent else 99.0), place[name]
            return float(self._steps(name).index(choice)), place[name]

        return sorted(pairs, key=key)

    def _steps(self, name: str) -> list[Choice]:
        """Return a parameter's choices that do something, mildest first."""
        offered = self._space.parameters[name]
        return [c for c in sorted(offered, key=lambda choice: severity(name, choice)) if c != offered[0]]

    def _coarse(
        self, reference: Tensor, recalibrated: Tensor, clock: _Clock, progress: Callable[[float, str], None]
    ) -> dict[str, dict[Choice, float]]:
        """Measure the mildest choices of whole networks, then of their stages; return what each parameter loses."""
        found: dict[str, dict[Choice, float]] = {}
        kinds: dict[str, list[str]] = {}
        for name in self._space.parameters:
            kind = Parameter.of(name).kind
            # A network without any of its blocks tells nothing of one of them; int8 is known.
            if kind not in ("block", "dtype"):
                kinds.setdefault(kind, []).append(name)
        sets = list(kinds.items())
        for kind, names in kinds.items():
            size = math.ceil(len(names) / _STAGES)
            if size < len(names):
                sets += [(kind, names[start : start + size]) for start in range(0, len(names), size)]
        for number, (kind, names) in enumerate(sets):
            if clock.over():
                break
            progress(number / len(sets), f"{kind}, {len(names)} together")
            choices = {name: self._steps(name)[0] for name in names}
            policy = self._space.policy(choices)
            with clock.measuring():
                loss = self._loss(policy, reference if policy.is_structural_identity else recalibrated)
            if math.isfinite(loss):
                found |= {name: {choice: max(loss, 0.0) / len(names)} for name, choice in choices.items()}
        return found

    # -- measuring ----------------------------------------------------------------------------------------------------

    def int8(self) -> tuple[Int8Sensitivity, Mapping[str, float]] | None:
        """Return the network with every layer in int8, and each layer's part of what that does; made once.

        Layers whose int8 alone leaves nothing of the network are not int8 in it; what they do has no end. None where
        int8 is no choice, or the network cannot be made.
        """
        if not self._int8_made:
            self._int8_made = True
            self._int8 = self._made_int8(self._space.int8_layers)
        return self._int8

    def _made_int8(self, layers: Sequence[str]) -> tuple[Int8Sensitivity, Mapping[str, float]] | None:
        if not layers:
            return None
        refused: list[str] = []
        try:
            model = self._in_int8(layers)
        except CompressionError:
            refused = self._refused_int8(layers)
            layers = [layer for layer in layers if layer not in refused]
            try:
                model = self._in_int8(layers)
            except CompressionError:
                return None
        found = Int8Sensitivity(
            model, layers, self._inputs[:_INT8_SAMPLES], self._task.divergence, self._compressor.dtype
        )
        return found, {**found.attributed(), **dict.fromkeys(refused, math.inf)}

    def _refused_int8(self, layers: Sequence[str]) -> list[str]:
        """Return which of these layers cannot be int8, as all together cannot: calibration saw only zeros there, say.

        They are halved; what `_MOST_HALVES` networks do not tell apart is left out together.
        """
        refused: list[str] = []
        pending, tried = [list(layers)], 0
        while pending:
            failing = pending.pop()
            if len(failing) == 1 or tried >= _MOST_HALVES:
                refused += failing
                continue
            middle = len(failing) // 2
            for half in (failing[:middle], failing[middle:]):
                tried += 1
                try:
                    self._in_int8(half)
                except CompressionError:
                    pending.append(half)
        return refused

    def _in_int8(self, layers: Sequence[str]) -> nn.Module:
        return self._compressor.model(
            CompressionPolicy(self._space.dense_dtype, layers=dict.fromkeys(layers, LayerPolicy("int8")))
        )

    def _int8_parts(self) -> Mapping[str, float]:
        found = self.int8()
        return {} if found is None else found[1]

    def _int8_choices(self) -> dict[str, float]:
        """Return what int8 loses, by parameter of the space."""
        parts = self._int8_parts()
        if "dtype/*" in self._space.parameters:
            return {"dtype/*": sum(parts.values())} if parts else {}
        return {f"dtype/{layer}": part for layer, part in parts.items()}

    def _one(
        self, pair: tuple[str, Choice], reference: Tensor, recalibrated: Tensor,
        single: dict[str, dict[Choice, float]], clock: _Clock,
    ) -> float:  # fmt: skip
        """Measure one choice, note what it loses, and return the seconds that took."""
        name, choice = pair
        policy = self._space.policy({name: choice})
        with clock.measuring():
            int8 = self.int8() if choice == "int8" else None
            layer = Parameter.of(name).target
            if int8 is not None and policy.int8_layers == (layer,) and layer in int8[0].layers:
                loss = int8[0].alone(layer)
            else:
                loss = self._loss(policy, reference if policy.is_structural_identity else recalibrated)
        single.setdefault(name, {})[choice] = loss
        self.cache.add(name, choice, loss)
        return clock.last

    def _loss(self, policy: CompressionPolicy, expected: Tensor) -> float:
        try:
            model = self._compressor.model(policy)
            with torch.no_grad():
                return float(self._task.divergence(self._outputs(model), expected))
        except (CompressionError, NotANumberError):
            return math.inf

    def _outputs(self, model: nn.Module) -> Tensor:
        dtype = self._compressor.dtype
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            return torch.cat([model(rows).float() for rows in torch.split(self._inputs, _ROWS)])

    # -- what is not measured -----------------------------------------------------------------------------------------

    def _complete(
        self, single: Mapping[str, Mapping[Choice, float]], shared: Mapping[str, Mapping[Choice, float]]
    ) -> dict[str, dict[Choice, float]]:
        """Return a loss for every choice; what could not be computed loses twice the most that any other does.

        `shared` counts where nothing was measured of a parameter on its own.
        """
        known = {**shared, **single}
        finite = [loss for found in known.values() for loss in found.values() if math.isfinite(loss)]
        most = 2 * max(finite)
        clean = {
            name: {c: max(loss, 0.0) if math.isfinite(loss) else most for c, loss in found.items()}
            for name, found in known.items()
        }
        usual: dict[str, list[float]] = {}
        for name, found in clean.items():
            # Of what loses so much at the strength that was measured, all of it.
            points = sorted((severity(name, c), loss) for c, loss in found.items() if severity(name, c) > 0)
            strongest = max(severity(name, c) for c in self._space.parameters.get(name, (0.0,)))
            if points and strongest > 0:
                usual.setdefault(Parameter.of(name).kind, []).append(at_severity(points, strongest))
        everything = [loss for found in usual.values() for loss in found] or [max(finite)]
        losses = {}
        for name, offered in self._space.parameters.items():
            kind = Parameter.of(name).kind
            # A whole block is worth more than the harshest choice of one layer.
            typical = median(usual[kind]) if kind in usual else max(everything)
            losses[name] = completed(name, offered, clean.get(name, {}), typical)
        return losses


class _Clock:
    """Tells whether there is time for another measurement as long as the last one."""

    def __init__(self, deadline: float) -> None:
        self._deadline, self.last = deadline, 0.0

    @property
    def left(self) -> float:
        return self._deadline - time.monotonic()

    def over(self) -> bool:
        return math.isfinite(self._deadline) and self.left <= self.last

    @contextmanager
    def measuring(self) -> Iterator[None]:
        begun = time.monotonic()
        try:
            yield
        finally:
            self.last = time.monotonic() - begun


def spread(names: Sequence[str]) -> list[str]:
    """Return names so that the first few of them lie far apart: halves, quarters, eighths."""
    found: list[str] = []
    step = 1 << max(len(names) - 1, 1).bit_length()
    while step >= 1:
        found += [names[at] for at in range(step // 2, len(names), step)]
        step //= 2
    return list(dict.fromkeys([*found, *names]))


def of_task(
    task: Task, config: RunConfig, progress: Callable[[float, str], None] = lambda share, text: None
) -> Sensitivity:
    """Return the losses of all choices that a search of this task would have.

    Raises:
        ConfigError: The space leaves nothing to choose.
        UnavailableError: The engine, which decides whether int8 is a choice, is not here.
    """
    with EngineWorker() as worker:
        described = worker.describe(config.engine, config.engine_options)
    capabilities = described["capabilities"]
    dense_dtype = dense_dtypes(capabilities, config.dense_dtype, f"{config.engine} ({described['device']})")[0]
    base = in_fast_layout(rewrite(task.network()), task.example_inputs(2))
    inventory = take_inventory(base, task.example_inputs(2), int8_lstm=RULES[config.engine].int8_lstm)
    file = configured_space(config)
    space = bind(file, base, inventory, dense_dtype, capabilities)
    scores = channel_scores(task, base, inventory, file.importance)
    measuring = SensitivityPass(base, inventory, scores, task, space, quantization=config.quantization)
    return measuring.run(progress=progress)
