"""Importance of channels: which ones a group can best do without. Higher is more worth keeping.

Scores are summed over all layers that a channel touches, producers and consumers (Fang et al., DepGraph, CVPR 2023).
``magnitude``: L2 norm (Li et al., 2017). ``taylor``: ``|weight x gradient|`` of the loss (Molchanov et al., 2019).
``random``: the control.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from autocompress.errors import CompressionError, ConfigError, nearest
from autocompress.inventory import Inventory, dependency_graph, output_group

IMPORTANCES: dict[str, Callable[[], Any]] = {
    "magnitude": lambda: tp.importance.GroupMagnitudeImportance(p=2, normalizer=None),
    "taylor": lambda: tp.importance.GroupTaylorImportance(normalizer=None),
    "random": tp.importance.RandomImportance,
}


def score_channels(
    model: nn.Module, inputs: Tensor, inventory: Inventory, method: str, losses: Iterable[Tensor] = ()
) -> dict[str, Tensor]:
    """Score every channel of every group.

    Args:
        model: The uncompressed model, not changed. Its own gradients are used by ``taylor``: see `losses`.
        inputs: Example inputs ``(N, ...)``.
        inventory: Of this model.
        method: A key of `IMPORTANCES`.
        losses: Scalar losses of `model` over a few batches, made lazily; each is backpropagated by ``taylor``.

    Returns:
        Group name to scores ``(C,)``, normalised to mean 1 so that groups compare.

    Raises:
        ConfigError: Unknown `method`.
        CompressionError: ``taylor`` got no gradient of some layer.
    """
    if method not in IMPORTANCES:
        raise ConfigError(f"Unknown importance {method!r}.{nearest(method, IMPORTANCES)}")
    if not inventory.groups:
        # The model may be one whose coupling cannot be traced at all.
        return {}
    if method == "taylor":
        model.zero_grad(set_to_none=True)
        for loss in losses:
            loss.backward()  # type: ignore[no-untyped-call]
    gradients = {name: p.grad for name, p in model.named_parameters()}
    scored = copy.deepcopy(model)
    model.zero_grad(set_to_none=True)
    if method == "taylor":
        _check_gradients(inventory, gradients)
    graph = dependency_graph(scored, inputs)
    for name, parameter in scored.named_parameters():
        parameter.grad = gradients[name]
    importance = IMPORTANCES[method]()
    scores: dict[str, Tensor] = {}
    for name, group in inventory.groups.items():
        raw = importance(output_group(graph, scored, name, range(group.channels))).detach().float()
        scores[name] = raw / raw.mean().clamp_min(torch.finfo(torch.float32).tiny)
    return scores


def _check_gradients(inventory: Inventory, gradients: Mapping[str, Tensor | None]) -> None:
    for group in inventory.groups.values():
        for name in (*group.producers, *group.consumers):
            if gradients.get(f"{name}.weight") is None:
                raise CompressionError(
                    f"Importance 'taylor' needs the gradient of {name!r}, which the losses do not give: there were no "
                    "training batches, or its weight is frozen. Use 'magnitude'."
                )
