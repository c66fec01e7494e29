"""What int8 in each layer does to the outputs, at the price of one network: layers are switched on and off in it.

All layers are made int8 and calibrated once. One forward and one backward pass attribute what they do together to each
of them (`attributed`): what rounding changes of a layer's output, times the gradient of the outputs there. Switching
single layers (`alone`), or all but some (`without`), costs a forward pass. Decides nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from autocompress.compress.quantization import Int8Layer, quantized_layers
from autocompress.recovery import fast_dtype

# Samples of one forward or backward pass: gradients keep every layer's outputs.
_ROWS = 16
# The least that a layer is taken to do, in shares of the mean: the estimate is one of few samples.
_LEAST_SHARE = 0.05
# How far outputs are moved to feel the divergence, in standard deviations of theirs.
_STEP = 0.1


class Int8Sensitivity:
    """One network with every int8 layer of a policy, compared with the uncompressed one.

    Args:
        model: With int8 layers, calibrated, in eval mode; not changed.
        layers: Names of the policy's layers; a factorized one owns those inside it.
        inputs: Samples ``(N, ...)`` that are compared.
        divergence: Of outputs from a reference: scalar, 0 for equal ones, differentiable.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Collection[str],
        inputs: Tensor,
        divergence: Callable[[Tensor, Tensor], Tensor],
        dtype: torch.dtype | None = None,
    ) -> None:
        self._model, self._inputs, self._divergence = model, inputs, divergence
        self._dtype = fast_dtype() if dtype is None else dtype
        self._owned: dict[str, list[Int8Layer]] = {name: [] for name in layers}
        for name, module in quantized_layers(model):
            owner = next((own for own in (name, name.rpartition(".")[0]) if own in self._owned), None)
            if owner is not None:
                self._owned[owner].append(module)
        # In the same dtype as everything else: its rounding is not int8's.
        self._reference = self._outputs(())

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers that are int8."""
        return tuple(name for name, modules in self._owned.items() if modules)

    def together(self) -> float:
        """Return the divergence with every layer in int8."""
        return self._measured(self.layers)

    def alone(self, layer: str) -> float:
        """Return the divergence with one layer in int8."""
        return self._measured({layer})

    def without(self, layers: Collection[str]) -> float:
        """Return the divergence with every layer in int8 but these."""
        return self._measured({name for name in self.layers if name not in layers})

    def attributed(self) -> dict[str, float]:
        """Return each layer's part of the divergence of all together; they add up to it.

        An estimate to second order, of every layer alone: what rounding changes of its output is carried to the outputs
        by the gradient of a random direction of these, weighted by how much the divergence feels it, and squared.
        """
        sums = dict.fromkeys(self.layers, 0.0)
        generator = torch.Generator().manual_seed(0)
        weights = self._felt(generator)
        for inputs, reference in self._batches():
            seen: list[tuple[str, Tensor, Tensor]] = []
            with torch.enable_grad(), self._only(()), self._watched(seen):
                given = inputs.clone()
                if given.is_floating_point():
                    given.requires_grad_()
                outputs = self._run(given)
                direction = torch.randn(reference.shape, generator=generator) * weights
                wanted = [(name, output, change) for name, output, change in seen if output.requires_grad]
                gradients = torch.autograd.grad(
                    (outputs * direction).sum(), [o for _, o, _ in wanted], allow_unused=True
                )
            carried: dict[str, Tensor] = {}
            for (name, _, change), gradient in zip(wanted, gradients, strict=True):
                if gradient is not None:
                    found = (gradient.float() * change).reshape(len(change), -1).sum(1)
                    carried[name] = found if name not in carried else _added(carried[name], found)
            for name, found in carried.items():
                sums[name] += float(found.square().sum())
        whole, total = self.together(), sum(sums.values())
        if not total > 0:
            return dict.fromkeys(sums, whole / max(len(sums), 1))
        least = _LEAST_SHARE * total / len(sums)
        parts = {name: max(value, least) for name, value in sums.items()}
        total = sum(parts.values())
        return {name: whole * part / total for name, part in parts.items()}

    def _felt(self, generator: torch.Generator) -> Tensor:
        """Return the square root of how strongly the divergence curves along each number of the outputs ``(...)``."""
        reference = self._reference
        step = _STEP * float(reference.std()) or _STEP
        moved = torch.randn(reference.shape, generator=generator) * step
        with torch.enable_grad():
            outputs = (reference + moved).requires_grad_()
            (gradient,) = torch.autograd.grad(self._divergence(outputs, reference), outputs)
        return (gradient * moved).mean(0).clamp_min(0).sqrt()

    # -- running ------------------------------------------------------------------------------------------------------

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield from zip(torch.split(self._inputs, _ROWS), torch.split(self._reference, _ROWS), strict=True)

    def _run(self, inputs: Tensor) -> Tensor:
        dtype = self._dtype
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            return self._model(inputs).float()  # type: ignore[no-any-return]

    def _measured(self, on: Collection[str]) -> float:
        with torch.no_grad():
            return float(self._divergence(self._outputs(on), self._reference))

    def _outputs(self, on: Collection[str]) -> Tensor:
        """Return the outputs ``(N, ...)`` with rounding in these layers alone."""
        with torch.no_grad(), self._only(on):
            return torch.cat([self._run(inputs) for inputs in torch.split(self._inputs, 4 * _ROWS)])

    @contextmanager
    def _only(self, on: Collection[str]) -> Iterator[None]:
        """Round in these layers alone during the block."""
        for name, modules in self._owned.items():
            for module in modules:
                _switch(module, on=name in on)
        try:
            yield
        finally:
            for modules in self._owned.values():
                for module in modules:
                    _switch(module, on=True)

    @contextmanager
    def _watched(self, found: list[tuple[str, Tensor, Tensor]]) -> Iterator[None]:
        """Collect every int8 layer's outputs in the block, and what its rounding alone would change of them."""

        def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
            def hook(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
                assert isinstance(module, Int8Layer)
                with torch.no_grad():
                    _switch(module, on=True)
                    # Without hooks, this one among them.
                    change = module.forward(given[0]).float() - output.float()
                    _switch(module, on=False)
                found.append((name, output, change))

            return hook

        with ExitStack() as hooks:
            for name, modules in self._owned.items():
                for module in modules:
                    hooks.callback(module.register_forward_hook(watch(name)).remove)
            yield


def _added(one: Tensor, other: Tensor) -> Tensor:
    """Return what two calls of a layer come to, by sample where both have as many."""
    return one + other if one.shape == other.shape else torch.cat([one, other])


def _switch(module: Int8Layer, *, on: bool) -> None:
    module.simulate = on
    module.input_quantizer.mode = "quantize" if on else "off"


def harmful(found: Int8Sensitivity, parts: Mapping[str, float], target: float, *, most: float = 0.5) -> tuple[str, ...]:
    """Return the fewest layers to leave out so that the others together diverge by at most `target`.

    The most harmful go first; what is returned was measured, by bisection over how many go.

    Args:
        found: Of the network.
        parts: What each layer does, in any unit.
        target: Largest divergence that is left.
        most: Share of the layers that may be left out at most; returned where even that is too little.
    """
    order = sorted(parts, key=lambda name: -parts[name])
    low, high = 0, max(1, int(most * len(order)))
    if found.without(order[:high]) > target:
        return tuple(order[:high])
    while high - low > 1:
        middle = (low + high) // 2
        if found.without(order[:middle]) <= target:
            high = middle
        else:
            low = middle
    return tuple(order[:high])
