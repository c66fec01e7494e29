"""Least-squares reconstruction: the weights that are left take over what removed channels, ranks and blocks did.

Every dense layer of a compressed network, from the first one whose input changed on, is fitted so that it gives what
it gave in the uncompressed network, from the inputs that it now gets (He et al., Channel Pruning for Accelerating Very
Deep Neural Networks, ICCV 2017; of a factorized layer, its last factor, after `outputs` have said along which
directions it is to be factorized). The fit is sequential, so that later layers
make up for what is left of the errors of earlier ones, and stays near the weights there are (ridge), since calibration
data are few. Biases are fitted too, which is bias correction (Nagel et al., ICCV 2019).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from autocompress.catalogue import Method
from autocompress.compress.base import LayerOutputs
from autocompress.compress.pruning import kept_indices
from autocompress.compress.quantization import Int8Layer
from autocompress.model.channel_tracing import CONVOLUTIONS
from autocompress.model.inventory import Inventory
from autocompress.policy import CompressionPolicy
from autocompress.recovery.batch_norm_transfer import BatchNormTransfer
from autocompress.recovery.fit_samples import VALUES, WeightLayer, patches, places

METHOD = Method(
    name="reconstruction",
    family="recovery",
    summary="Fits what is left of each layer by least squares to what the whole layer gave",
    source="He, Zhang & Sun, Channel pruning for accelerating very deep neural networks, ICCV 2017",
)
# Of the mean square of a layer's inputs, times weights per row: the fewer rows, the nearer to the weights there are.
_RIDGE = 1.0
# Share of the outputs' variance below which a layer is left as it is: bfloat16 alone makes a tenth of this.
_NEGLIGIBLE = 1e-3
# Rows that tell a layer whose inputs never changed, as they are this far below.
_GLANCE, _FAR_BELOW = 256, 0.5


@dataclass(frozen=True)
class _Target:
    """What one layer gave in the uncompressed network.

    Attributes:
        rows: ``(R, C)`` outputs of all its channels, in the dtype of the pass: bfloat16 takes half the memory.
        places: Indices ``(R,)`` of sample, and for convolutions row and column, of each.
        shift: Whether the mean may be off: a batch-norm follows, whose statistics take it away.
        bias: Whether the layer has a bias.
    """

    rows: Tensor
    places: tuple[Tensor, ...]
    shift: bool
    bias: bool


class Reconstruction:
    """Fits compressed forms of one network.

    Args:
        model: The uncompressed network, rewritten; not changed.
        inventory: Of this model.
        inputs: Calibration inputs ``(N, ...)``.
        dtype: What forward passes run in.
    """

    def __init__(self, model: nn.Module, inventory: Inventory, inputs: Tensor, dtype: torch.dtype) -> None:
        self._inputs, self._dtype = inputs, dtype
        self._group_of = {p: group for group in inventory.groups.values() for p in group.producers}
        self._targets: dict[str, _Target] = {}
        self._outputs: dict[str, LayerOutputs] = {}
        self._last: tuple[str, Tensor] | None = None
        self._statistics = BatchNormTransfer(model)
        generator = torch.Generator().manual_seed(0)

        # Weights that work in two places cannot be fitted to one of them.
        owners = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
        calls: Counter[str] = Counter()

        def keep(name: str, module: nn.Module, output: Tensor) -> None:
            self._last = (name, output)
            calls[name] += 1
            if calls[name] == 1:
                chosen, rows = places(module, output, generator)
                self._targets[name] = _Target(rows, chosen, shift=False, bias=module.bias is not None)

        def norm(inputs: tuple[Any, ...]) -> None:
            if self._last is not None and inputs and inputs[0] is self._last[1]:
                name = self._last[0]
                self._targets[name] = replace(self._targets[name], shift=True)

        with ExitStack() as hooks:
            for name, module in model.named_modules():
                if _fits(module) and owners[id(module.weight)] == 1:
                    handle = module.register_forward_hook(lambda m, _i, output, name=name: keep(name, m, output))
                elif isinstance(module, nn.modules.batchnorm._BatchNorm):
                    handle = module.register_forward_pre_hook(lambda _m, given: norm(given))
                else:
                    continue
                hooks.callback(handle.remove)
            hooks.enter_context(self._statistics.watching())
            self._run(model.eval())
        self._last = None
        self._targets = {name: target for name, target in self._targets.items() if calls[name] == 1}

    def outputs(self, policy: CompressionPolicy, scores: Mapping[str, Tensor]) -> dict[str, LayerOutputs]:
        """Return what the layers that `policy` factorizes gave in the uncompressed network, of the channels it keeps.

        For `CompressionContext.layer_outputs`; `scores` as `apply` takes them.
        """
        found = {}
        for name, layer in policy.layers.items():
            if layer.rank_ratio < 1 and name in self._targets:
                mean, covariance = self._whole_outputs(name)
                kept = self._kept(name, policy, scores)
                found[name] = LayerOutputs(mean[kept], covariance[kept][:, kept])
        return found

    def _whole_outputs(self, name: str) -> LayerOutputs:
        """Return what a layer gave, of all its channels; computed once."""
        if name not in self._outputs:
            target = self._targets[name]
            rows = target.rows.double()
            mean = rows.mean(0)
            if target.bias or target.shift:
                rows = rows - mean
            self._outputs[name] = LayerOutputs(mean, rows.T @ rows / len(rows))
        return self._outputs[name]

    def _kept(self, name: str, policy: CompressionPolicy, scores: Mapping[str, Tensor]) -> list[int] | slice:
        """Return which of a layer's channels pruning leaves."""
        group = self._group_of.get(name)
        if group is None or group.name not in policy.pruning:
            return slice(None)
        kept = kept_indices(group.channels, policy.pruning[group.name], scores.get(group.name), group.parts)
        return group.outputs_of(name, kept.tolist())

    def apply(self, model: nn.Module, policy: CompressionPolicy, scores: Mapping[str, Tensor]) -> int:
        """Fit the layers of `model`, which `apply_policy` made by `policy` and these channel `scores`, in place.

        Quantizers are to observe, or to be off. Statistics of batch-norms are moved in the same pass, each by what the
        fitted layers before it give.

        Returns:
            How many layers were fitted.
        """
        if policy.is_structural_identity:
            return 0
        fitted = 0
        seen: set[str] = set()

        def fit(name: str, layer: nn.Module, given: Tensor) -> None:
            nonlocal fitted
            if name not in seen:
                seen.add(name)
                fitted += self._fit(name, layer, given, policy, scores)

        with ExitStack() as hooks:
            for name in self._targets:
                layer = _last_factor(model, name)
                # What is sparse must stay so.
                if layer is not None and policy.layer(name).sparsity == "none":
                    handle = layer.register_forward_pre_hook(
                        lambda module, given, name=name: fit(name, module, given[0])
                    )
                    hooks.callback(handle.remove)
            hooks.enter_context(self._statistics.moving(model.eval()))
            self._run(model)
        return fitted

    def _run(self, model: nn.Module) -> None:
        with torch.no_grad(), torch.autocast("cpu", self._dtype, enabled=self._dtype != torch.float32):
            model(self._inputs)

    def _fit(
        self, name: str, layer: nn.Module, given: Tensor, policy: CompressionPolicy, scores: Mapping[str, Tensor]
    ) -> int:
        assert isinstance(layer, (*CONVOLUTIONS, nn.Linear))
        target = self._targets[name]
        wanted = target.rows.float()
        if layer.weight.shape[0] != wanted.shape[1]:
            kept = self._kept(name, policy, scores)
            # Of what such a layer gives, the network may cut off a part: its channels are not the group's.
            if isinstance(kept, list) and max(kept, default=0) >= wanted.shape[1]:
                return 0
            wanted = wanted[:, kept]
        if wanted.shape[1] != layer.weight.shape[0]:
            return 0
        with torch.autocast("cpu", enabled=False), _products(self._dtype):
            rows = min(len(wanted), max(1, VALUES // layer.weight[0].numel()))
            if self._residual(layer, given, target, wanted[:_GLANCE], _FAR_BELOW * _NEGLIGIBLE) is None:
                return 0
            found = self._residual(layer, given, target, wanted[:rows], _NEGLIGIBLE)
            if found is None:
                return 0
            inputs, residual, middle, off = found
            change = _ridge(inputs, residual)
            if not bool(torch.isfinite(change).all()):
                return 0
            layer.weight += change.T.reshape(layer.weight.shape).to(layer.weight.dtype)
            if layer.bias is not None:
                layer.bias += (off - middle @ change).to(layer.bias.dtype)
        return 1

    def _residual(
        self, layer: WeightLayer, given: Tensor, target: _Target, wanted: Tensor, least: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
        """Return what a layer gets ``(R, K)`` and what it falls short by ``(R, C)``, both about their means, and these.

        None where that is at most the share `least` of the variance, or the input has another shape than it had.
        """
        inputs = patches(layer, given, tuple(index[: len(wanted)] for index in target.places))
        if inputs is None:
            return None
        bias = layer.bias.float() if layer.bias is not None else None
        residual = wanted - functional.linear(inputs, layer.weight.flatten(1).float(), bias)
        spread = (wanted - wanted.mean(0)).square().mean()
        middle, off = torch.zeros(inputs.shape[1]), torch.zeros(wanted.shape[1])
        if bias is not None or target.shift:
            # The bias, or the batch-norm after it, takes the means.
            middle, off = inputs.mean(0), residual.mean(0)
            inputs, residual = inputs - middle, residual - off
        left = residual.square().mean() + (off.square().mean() if bias is not None else 0)
        return None if left <= least * spread else (inputs, residual, middle, off)


def _fits(module: nn.Module) -> bool:
    # One with a forward of its own may pad what it reads, or scale its weights.
    if type(module) not in (*CONVOLUTIONS, nn.Linear) and not isinstance(module, Int8Layer):
        return False
    return not isinstance(module, CONVOLUTIONS) or (module.groups == 1 and module.padding_mode == "zeros")


def _last_factor(model: nn.Module, name: str) -> nn.Module | None:
    """Return the layer of this name, the last factor where it was factorized, or None where it is gone."""
    try:
        module = model.get_submodule(name)
    except AttributeError:
        return None
    if isinstance(module, nn.Sequential) and len(module):
        module = module[-1]
    return module if _fits(module) else None


@contextmanager
def _products(dtype: torch.dtype) -> Iterator[None]:
    """Let products of float32 matrices round their factors to bfloat16 where the pass that gave them did.

    That takes half the time. Sums stay float32, so a Gram matrix stays one: that of the rounded rows.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if dtype == torch.bfloat16 else before)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _ridge(inputs: Tensor, residual: Tensor) -> Tensor:
    """Return the change ``(K, C)`` of the weights that takes most of `residual` ``(R, C)``, and is small."""
    rows, size = inputs.shape
    ridge = _RIDGE * inputs.square().sum() / rows
    if rows < size:
        gram = inputs @ inputs.T
        gram.diagonal().add_(ridge)
        return inputs.T @ _solve(gram, residual)
    gram = inputs.T @ inputs
    gram.diagonal().add_(ridge)
    return _solve(gram, inputs.T @ residual)


def _solve(gram: Tensor, right: Tensor) -> Tensor:
    factor, failed = torch.linalg.cholesky_ex(gram)
    # Without a solution the weights stay.
    return torch.cholesky_solve(right, factor) if not bool(failed) else torch.zeros_like(right)
