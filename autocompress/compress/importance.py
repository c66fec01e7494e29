"""Importance of channels: which ones a group can best do without. Higher is more worth keeping.

Scores are of whole groups: every method says how it sums over the layers that a channel touches (after Fang et al.,
DepGraph, CVPR 2023); that of an attention head is the sum of its channels' scores. The methods are the files of
`importances`; a new file there is found by itself.
"""

from __future__ import annotations

import copy
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from importlib import import_module

import torch
from torch import Tensor, nn

from autocompress.compress import importances
from autocompress.compress.heads import scores_of_heads, traced_heads
from autocompress.compress.importances.base import Evidence, Importance, Subject, relative
from autocompress.errors import CompressionError, ConfigError, nearest
from autocompress.model.attention import head_axes
from autocompress.model.inventory import Inventory, dependency_graph, output_group


def _found() -> Iterator[tuple[str, Callable[[], Importance]]]:
    for info in pkgutil.iter_modules(importances.__path__, f"{importances.__name__}."):
        yield from getattr(import_module(info.name), "IMPORTANCES", {}).items()


DEFAULT_IMPORTANCE = "magnitude"
# Name of a method to what makes one.
IMPORTANCES: Mapping[str, Callable[[], Importance]] = dict(_found())


class ChannelScores(dict[str, Tensor]):
    """Group name to scores ``(C,)``.

    Attributes:
        notes: Group name to what was done instead, where the method says nothing of a group.
    """

    def __init__(self, scores: Mapping[str, Tensor], notes: Mapping[str, str] | None = None) -> None:
        super().__init__(scores)
        self.notes = dict(notes or {})


def check_importance(method: str) -> str:
    """Return `method`.

    Raises:
        ConfigError: It is no key of `IMPORTANCES`.
    """
    if method not in IMPORTANCES:
        raise ConfigError(f"Unknown importance {method!r}.{nearest(method, IMPORTANCES)}")
    return method


def score_channels(
    model: nn.Module, inputs: Tensor, inventory: Inventory, method: str, evidence: Evidence | None = None
) -> ChannelScores:
    """Score every channel of every group.

    Args:
        model: The uncompressed model in eval mode, not changed; what `evidence` runs.
        inputs: Example inputs ``(N, ...)``.
        inventory: Of this model.
        method: A key of `IMPORTANCES`.
        evidence: Losses and outputs of `model`, for methods that look at data.

    Returns:
        Scores that compare between groups: normalised to mean 1 for each, unless the method's own do.

    Raises:
        ConfigError: Unknown `method`.
        CompressionError: A weight is not finite, or the model or the evidence lacks what the method needs.
    """
    importance = IMPORTANCES[check_importance(method)]()
    _check_weights(model, inventory)
    scored = copy.deepcopy(model)
    scored.zero_grad(set_to_none=True)
    graph = dependency_graph(scored, inputs) if inventory.groups else None
    axes = head_axes(scored)
    groups = {
        name: traced_heads(graph, scored, axes[name])
        if g.heads
        else output_group(graph, scored, name, range(g.channels))
        for name, g in inventory.groups.items()
    }
    subject = Subject(method, model, scored, _by_channel(inventory), graph, groups, evidence or Evidence())
    scores = {}
    for name, found in importance.scores(subject).items() if groups else ():
        group = inventory.groups[name]
        raw = scores_of_heads(found, group) if group.heads else found
        if not bool(raw.isfinite().all()):
            raise CompressionError(
                f"Importance {method!r} of group {name!r} is not finite: its gradients or activations overflow. Use "
                "'magnitude', or check the model and the data."
            )
        scores[name] = raw if importance.compares else relative(raw)
    return ChannelScores(scores, subject.notes)


def _by_channel(inventory: Inventory) -> Inventory:
    """Return an inventory whose attention heads are groups of channels, those that the output projections read."""
    groups = {
        name: replace(g, channels=len(g.heads[g.consumers[0]]), multiples={}, heads={}) if g.heads else g
        for name, g in inventory.groups.items()
    }
    return replace(inventory, groups=groups)


def _check_weights(model: nn.Module, inventory: Inventory) -> None:
    members = {name for group in inventory.groups.values() for name in (*group.producers, *group.consumers)}
    for name, module in model.named_modules():
        if name in members and not all(bool(torch.isfinite(p).all()) for p in module.parameters()):
            raise CompressionError(
                f"The weights of layer {name!r} hold NaN or infinite values, so its channels cannot be compared. Check "
                "the weights that the task loads."
            )
