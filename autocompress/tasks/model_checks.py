"""Whether a model is a function of one sample: the same outputs each time, alone and in a batch, and no NaN.

Engines compute such a function, and every candidate is compared with the model that it came from; a model that is none
cannot be verified. Owns no data.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from autocompress.errors import ConfigError
from autocompress.tasks.adapters import as_tensor

# Sums in another order move outputs by 1e-5 of their size; chance and other samples of a batch by far more.
_SAME_CALL, _SAME_BATCH = 1e-3, 1e-2
_NAMED = 3  # layers named in a message


def run(model: nn.Module, inputs: Tensor) -> Tensor:
    """Return a model's outputs ``(N, ...)``, several as one, without touching `inputs`."""
    with torch.no_grad():
        return as_tensor(model(inputs.clone())).float()


def check_model(where: str, model: nn.Module, inputs: Tensor) -> Tensor:
    """Return a model's outputs for a few samples, once it is known to be a function of each.

    Args:
        where: Who says so: ``"Task 'mine'"``.
        model: As the task gives it.
        inputs: Finite samples ``(N, ...)``, N from 1 on.

    Raises:
        ConfigError: The model does not take them, its outputs differ between two calls, or between a sample alone and
            in a batch.
    """
    where = f"{where}: model {type(model).__name__}"
    outputs = _runs(where, model, inputs)
    if not torch.isfinite(outputs).all():
        return outputs
    if _distance(outputs, run(model, inputs)) > _SAME_CALL:
        raise ConfigError(
            f"{where} gives other outputs for the same input when it is called again{_where_random(model, inputs)}. "
            "Every compressed candidate is compared with it, so it must give the same each time: let dropout hang on "
            "the mode (F.dropout(..., training=self.training)), and leave random numbers out of forward."
        )
    if len(inputs) > 1:
        _check_alone(where, model, inputs, outputs)
    return outputs


def _check_alone(where: str, model: nn.Module, inputs: Tensor, outputs: Tensor) -> None:
    try:
        alone = run(model, inputs[:1])
    except Exception as error:  # batch-norm in training mode, for one
        raise ConfigError(f"{where} does not take one sample alone ({error}): {_mixing(model)}") from error
    if _distance(outputs[:1], alone) > _SAME_BATCH:
        raise ConfigError(
            f"{where} gives other outputs for a sample alone than in a batch of {len(inputs)}: {_mixing(model)}"
        )


def _runs(where: str, model: nn.Module, inputs: Tensor) -> Tensor:
    try:
        outputs = run(model, inputs)
    except ConfigError:
        raise
    except Exception as error:  # whatever the user's network raises
        alone = ""
        if len(inputs) > 1:
            try:
                run(model, inputs[:1])
            except Exception:  # noqa: BLE001 - it takes no sample at all
                alone = ""
            else:
                alone = " It does take one sample alone: a reshape with a fixed first size, perhaps; use -1 there."
        raise ConfigError(f"{where} does not take inputs {tuple(inputs.shape)}: {error}.{alone}") from error
    if len(outputs) != len(inputs):
        raise ConfigError(
            f"{where} gives outputs {tuple(outputs.shape)} for inputs {tuple(inputs.shape)}; there must be a row of "
            "outputs for every sample."
        )
    return outputs


def _distance(first: Tensor, second: Tensor) -> float:
    if first.shape != second.shape:
        return float("inf")
    return float((first - second).abs().max() / first.abs().max().clamp_min(1e-12)) if first.numel() else 0.0


def _mixing(model: nn.Module) -> str:
    """Say which layers look at the other samples of a batch, and what to do."""
    norms = [(name, module) for name, module in model.named_modules() if isinstance(module, _BatchNorm)]
    lacking = [name for name, module in norms if module.running_mean is None or not module.track_running_stats]
    if lacking:
        return (
            f"{_listed(lacking)} normalise by the batch, since they keep no running statistics. Make them with "
            "track_running_stats=True, pass some training batches through the model in train mode, and call eval()."
        )
    return (
        "something in forward goes over axis 0 (a mean, a norm, a reshape). An engine sees batches of other sizes, so "
        "what a sample gives must not depend on the others."
    )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"layers {', '.join(names[:_NAMED])}{more}"


def _where_random(model: nn.Module, inputs: Tensor) -> str:
    """Say in which layer two calls part."""
    first, second = (_traced(model, inputs, lambda output: float(output.double().abs().sum())) for _ in range(2))
    for (name, kind, value), (_, _, other) in zip(first, second, strict=False):
        if abs(value - other) > 1e-6 * max(abs(value), 1e-12):
            return f": they part at or just before layer {name} ({kind})"
    return ""


def first_nan(model: nn.Module, inputs: Tensor) -> str:
    """Return ``", first at layer …"`` for inputs that make a model give NaN, or nothing where no layer shows it."""
    for name, kind, finite in _traced(model, inputs, lambda output: float(torch.isfinite(output).all())):
        if not finite:
            return f", first at layer {name} ({kind})"
    return ""


def _traced(model: nn.Module, inputs: Tensor, measured: Callable[[Tensor], float]) -> list[tuple[str, str, float]]:
    """Return name, kind and a measure of the output of every innermost layer, in the order of the calls."""
    found: list[tuple[str, str, float]] = []

    def watch(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, _: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                found.append((name, type(module).__name__, measured(output)))

        return hook

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if name and not any(module.children()):
                hooks.callback(module.register_forward_hook(watch(name)).remove)
        run(model, inputs)
    return found
