"""2:4 sparsity: of every four weights in a row along the input channels, the two smallest become zero.

GPUs from Ampere on skip such zeros (Mishra et al., "Accelerating sparse deep neural networks", 2021). Which channels
stand together in a four is free: before weights are zeroed, the channels of a group are put in an order in which more
of the magnitude is kept (Pool & Yu, "Channel permutations for N:M sparsity", NeurIPS 2021), in all layers that share
them, which leaves the network's outputs as they were.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from autocompress.catalogue import Method
from autocompress.compress.base import CompressionContext, Transform, check_names
from autocompress.errors import CompressionError
from autocompress.model.inventory import CONVOLUTIONS, NORMS, dependency_graph, output_group
from autocompress.policy import CompressionPolicy

METHOD = Method(
    "2:4",
    "pruning",
    "two of every four weights zero, channels permuted to keep more",
    "Mishra et al., 2021; Pool & Yu, NeurIPS 2021",
    ("tensorrt", "tensorrt-rtx"),
)
# Layers with fewer input channels gain nothing from it.
LEAST_CHANNELS = 16
_ROWS, _PAIRS = 512, 400
# A gain in kept magnitude below this is not worth reordering for.
_WORTH = 1e-3
# Reordered channels are summed in another order; more than rounding means that the order was not the network's.
_TOLERANCE = 1e-3


class SemiStructuredSparsity(Transform):
    """Make every layer whose `sparsity` is 2:4 so, factors of a factorized one included."""

    def apply(self, model: nn.Module, policy: CompressionPolicy, context: CompressionContext) -> nn.Module:
        """See `Transform.apply`."""
        check_names(policy.sparse_layers, model, policy)
        wanted = set(policy.sparse_layers)
        names = [
            name
            for name, module in model.named_modules()
            if isinstance(module, (nn.Conv2d, nn.Linear))
            and (name in wanted or name.rpartition(".")[0] in wanted)
            and module.weight.shape[1] >= LEAST_CHANNELS
        ]
        if not names:
            return model
        model = copy.deepcopy(model)
        _reorder(model, set(names), context.inputs)
        for name in names:
            layer = model.get_submodule(name)
            assert isinstance(layer, (nn.Conv2d, nn.Linear))
            with torch.no_grad():
                layer.weight.mul_(mask_2_4(layer.weight))
            layer.sparsity = "2:4"  # type: ignore[assignment]
        return model


def mask_2_4(weight: Tensor) -> Tensor:
    """Return which of `weight` ``(out, in, ...)`` stay, of its dtype: the larger two of every four input channels."""
    rows = weight.detach().abs().movedim(1, -1)
    channels = rows.shape[-1]
    fours = nn.functional.pad(rows, (0, -channels % 4), value=-1.0)
    fours = fours.reshape(*fours.shape[:-1], -1, 4)
    kept = torch.zeros_like(fours).scatter_(-1, fours.topk(2, dim=-1).indices, 1.0)
    return kept.flatten(-2)[..., :channels].movedim(-1, 1).contiguous()


def keep_zeros(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Have every step of `optimizer` leave the zeros of 2:4 layers where they are now."""
    zeros = []
    for module in model.modules():
        weight = module.weight if getattr(module, "sparsity", None) == "2:4" else None
        if isinstance(weight, Tensor):
            zeros.append((weight, weight.detach() == 0))

    def restore(*_: Any) -> None:
        with torch.no_grad():
            for weight, zero in zeros:
                weight.masked_fill_(zero, 0.0)

    if zeros:
        optimizer.register_step_post_hook(restore)


# -- the order of channels --------------------------------------------------------------------------------------------


def _reorder(model: nn.Module, sparse: set[str], inputs: Tensor) -> None:
    """Put the channels that feed sparse layers in a better order, in place; groups that resist are left alone."""
    try:
        graph = dependency_graph(model, inputs)
    except CompressionError:
        return
    names = {module: name for name, module in model.named_modules()}
    seen: set[nn.Module] = set()
    for module in list(names):
        if module in seen or not isinstance(module, (*CONVOLUTIONS, nn.Linear)):
            continue
        width = int(module.weight.shape[0])
        try:
            group = output_group(graph, model, names[module], range(width))
        except Exception:  # noqa: BLE001 - the library raises whatever it meets; this group keeps its order
            continue
        members = [(dependency, list(indices)) for dependency, indices in group]
        seen |= {d.target.module for d, _ in members if graph.is_out_channel_pruning_fn(d.handler)}
        readers = [
            d.target.module
            for d, indices in members
            if not graph.is_out_channel_pruning_fn(d.handler)
            and names.get(d.target.module) in sparse
            and len(indices) == width == d.target.module.weight.shape[1]
        ]
        if not readers:
            continue
        rows = torch.cat([reader.weight.detach().abs().movedim(1, -1).flatten(0, -2) for reader in readers])
        order = better_order(rows.numpy().astype(np.float64))
        if order is not None:
            _permute(graph, output_group(graph, model, names[module], order), model, inputs)


def better_order(rows: NDArray[np.float64], *, seed: int = 0) -> list[int] | None:
    """Return an order of the columns of `rows` ``(n, channels)`` in which 2:4 keeps more; None where it hardly would.

    Two fours at a time are redistributed in the best of all 35 ways, until none gains or enough have been tried.
    """
    channels = rows.shape[1]
    if channels < 8 or channels % 4:
        return None
    rng = np.random.default_rng(seed)
    if len(rows) > _ROWS:
        rows = rows[rng.choice(len(rows), _ROWS, replace=False)]
    order = np.arange(channels).reshape(-1, 4)
    before = _kept(rows[:, order]).sum()
    pairs = list(itertools.combinations(range(len(order)), 2))
    tried, gained = 0, True
    while gained and tried < _PAIRS:
        gained = False
        for index in rng.permutation(len(pairs)):
            if tried >= _PAIRS:
                break
            tried += 1
            first, second = pairs[index]
            eight = np.concatenate([order[first], order[second]])
            kept = _kept(rows[:, eight[_SPLITS]]).sum((0, 2))
            best = int(kept.argmax())
            if kept[best] > kept[0] * (1 + 1e-9):
                order[first], order[second] = eight[_SPLITS[best]]
                gained = True
    after = _kept(rows[:, order]).sum()
    return [int(i) for i in order.ravel()] if after > before * (1 + _WORTH) else None


def _splits() -> NDArray[np.int64]:
    """Return all ways to make two fours of eight ``(35, 2, 4)``, the given one first."""
    found = []
    for chosen in itertools.combinations(range(1, 8), 3):
        first = (0, *chosen)
        found.append((first, tuple(i for i in range(8) if i not in first)))
    return np.array(found, np.int64)


_SPLITS = _splits()


def _kept(fours: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the sum of the two largest of each four ``(..., 4)``."""
    a, b, c, d = (fours[..., i] for i in range(4))
    found: NDArray[np.float64] = np.maximum(np.maximum(a + b, c + d), np.maximum(a, b) + np.maximum(c, d))
    return found


def _permute(graph: Any, group: Any, model: nn.Module, inputs: Tensor) -> None:
    """Reorder the channels of a group as its indices are ordered, if that leaves the outputs as they are."""
    changes: list[tuple[Tensor, int, list[int]]] = []
    for dependency, indices in group:
        found = _axes(graph, dependency, list(indices))
        if found is None:
            return
        changes += found
    with torch.no_grad():
        expected = model(inputs)
        saved = [(tensor, tensor.detach().clone()) for tensor, _, _ in changes]
        for tensor, axis, indices in changes:
            tensor.copy_(tensor.index_select(axis, torch.tensor(indices)))
        off = (model(inputs) - expected).abs().max()
        if off > _TOLERANCE * expected.abs().max().clamp_min(1e-6):
            for tensor, before in saved:
                tensor.copy_(before)


def _axes(graph: Any, dependency: Any, indices: Sequence[int]) -> list[tuple[Tensor, int, list[int]]] | None:
    """Return the tensors of one member of a group with the axis that its channels are on; None where that is unclear.

    A depthwise convolution's channels are on its output axis alone.
    """
    module, order = dependency.target.module, list(indices)
    if isinstance(module, (*CONVOLUTIONS, nn.Linear)):
        out = graph.is_out_channel_pruning_fn(dependency.handler)
        axis = 0 if out or getattr(module, "groups", 1) > 1 else 1
        tensors = [module.weight] + ([module.bias] if axis == 0 and module.bias is not None else [])
    elif isinstance(module, NORMS):
        axis = 0
        tensors = [t for t in (*module.parameters(), *module.buffers()) if t.ndim == 1]
    elif isinstance(module, nn.Module) and not any(True for _ in module.parameters(recurse=False)):
        return []
    else:
        return None
    if any(t.shape[axis] != len(order) or sorted(order) != list(range(len(order))) for t in tensors):
        return None
    return [(tensor, axis, order) for tensor in tensors]
