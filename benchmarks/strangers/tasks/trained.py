"""Networks that have no published weights: trained once by a fixed recipe, and kept.

A weight file is named after its network and the recipe's version; another recipe needs another version.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from autocompress.config import TaskConfig
from benchmarks.strangers.networks import CACHE


@dataclass(frozen=True)
class Recipe:
    """How a network is trained: AdamW, warm-up over a tenth of the steps, then a cosine down to nothing.

    Attributes:
        epochs: Passes over the training data.
        learning_rate: The highest.
        weight_decay: Of AdamW.
        batch_size: Samples of a step.
        seed: Of initial weights and order.
        version: Of this recipe, its data and its network.
    """

    epochs: int
    learning_rate: float = 2e-3
    weight_decay: float = 0.02
    batch_size: int = 64
    seed: int = 0
    version: int = 1


def as_float(inputs: Tensor) -> Tensor:
    """Return inputs as float; 8-bit ones as 0..1."""
    return inputs.float() / 255 if inputs.dtype == torch.uint8 else inputs


def trained(
    name: str,
    config: TaskConfig,
    build: Callable[[], nn.Module],
    data: tuple[Tensor, Tensor],
    *,
    loss: Callable[[Tensor, Tensor], Tensor],
    recipe: Recipe,
) -> nn.Module:
    """Return a trained network in eval mode: read from the cache, or trained now and kept there.

    Args:
        name: Of the network.
        config: Its `weights` is the cache's folder; None is `CACHE`.
        build: Makes the network.
        data: Training inputs ``(N, ...)`` and targets ``(N, ...)``.
        loss: Of outputs and targets.
        recipe: How it is trained.
    """
    torch.manual_seed(recipe.seed)
    model = build()
    file = Path(config.weights or CACHE) / f"{name}-{recipe.version}.safetensors"
    if file.exists():
        model.load_state_dict(load_file(file))
        return model.eval()
    started = time.monotonic()
    _fit(model, data, loss, recipe)
    file.parent.mkdir(parents=True, exist_ok=True)
    fresh = file.with_suffix(".new")
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, fresh)
    fresh.replace(file)
    print(f"{name}: trained in {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    return model.eval()


def _fit(
    model: nn.Module, data: tuple[Tensor, Tensor], loss: Callable[[Tensor, Tensor], Tensor], recipe: Recipe
) -> None:
    inputs, targets = data
    # Convolutions of few channels train almost twice as fast in this layout.
    layout = torch.channels_last if inputs.ndim == 4 else torch.contiguous_format
    model.to(memory_format=layout)
    generator = torch.Generator().manual_seed(recipe.seed)
    optimizer = torch.optim.AdamW(model.parameters(), recipe.learning_rate, weight_decay=recipe.weight_decay)
    steps = recipe.epochs * (len(inputs) // recipe.batch_size)

    def rate(step: int) -> float:
        warm_up = (step + 1) / (0.1 * steps)
        return min(warm_up, 0.5 * (1 + math.cos(math.pi * step / steps)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    model.train()
    for epoch in range(recipe.epochs):
        total = 0.0
        order = torch.randperm(len(inputs), generator=generator)
        batches = [chosen for chosen in order.split(recipe.batch_size) if len(chosen) == recipe.batch_size]
        for chosen in batches:
            optimizer.zero_grad(set_to_none=True)
            batch = as_float(inputs[chosen]).contiguous(memory_format=layout)
            value = loss(model(batch), targets[chosen])
            value.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            total += float(value.detach())
        print(f"  epoch {epoch + 1} of {recipe.epochs}: loss {total / len(batches):.4f}", file=sys.stderr, flush=True)
    model.to(memory_format=torch.contiguous_format)
