"""What int8 in each layer does to the outputs, at the price of one network: layers are switched on and off in it.

All layers are made int8 and calibrated once. One forward and one backward pass attribute what they do together to each
of them (`attributed`): the gradient of the divergence at a layer's output times what rounding changed there. Switching
single layers (`alone`), or all but some (`without`), costs a forward pass. Decides nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from autocompress.compress.quantization import QuantConv2d, QuantLinear, quantized_layers
from autocompress.recovery import fast_dtype

# Samples of one forward or backward pass: gradients keep every layer's outputs.
_ROWS = 16
# Of what all layers do together, the least that one of them is taken to do: roundings also cancel by chance.
_LEAST_SHARE = 0.05


class Int8Sensitivity:
    """One network with every int8 layer of a policy, compared with the uncompressed one.

    Args:
        model: With int8 layers, calibrated, in eval mode; not changed.
        layers: Names of the policy's layers; a factorized one owns those inside it.
        inputs: Samples ``(N, ...)`` that are compared.
        reference: What the uncompressed model gives for them ``(N, ...)``.
        divergence: Of outputs from a reference: scalar, 0 for equal ones, differentiable.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Collection[str],
        inputs: Tensor,
        reference: Tensor,
        divergence: Callable[[Tensor, Tensor], Tensor],
    ) -> None:
        self._model, self._inputs, self._reference, self._divergence = model, inputs, reference, divergence
        self._owned: dict[str, list[QuantConv2d | QuantLinear]] = {name: [] for name in layers}
        for name, module in quantized_layers(model):
            owner = next((own for own in (name, name.rpartition(".")[0]) if own in self._owned), None)
            if owner is not None:
                self._owned[owner].append(module)

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

        A first-order estimate: rounding errors that add up or cancel between layers are shared out evenly.
        """
        sums = dict.fromkeys(self.layers, 0.0)
        count = 0
        for inputs, reference in self._batches():
            changes: dict[str, Tensor] = {}
            with torch.enable_grad(), self._watched(changes) as outputs:
                given = inputs.clone()
                if given.is_floating_point():
                    given.requires_grad_()
                divergence = self._divergence(self._run(given), reference)
                wanted = [(name, output) for name, output in outputs if output.requires_grad]
                gradients = torch.autograd.grad(divergence, [o for _, o in wanted], allow_unused=True)
            for (name, output), gradient in zip(wanted, gradients, strict=True):
                if gradient is not None:
                    sums[name] += len(inputs) * float((gradient.float() * changes.pop(_key(name, output))).sum())
            count += len(inputs)
        whole = self.together()
        least = _LEAST_SHARE * whole / max(len(sums), 1)
        parts = {name: max(value / max(count, 1), least) for name, value in sums.items()}
        total = sum(parts.values())
        return {name: whole * part / total if total > 0 else 0.0 for name, part in parts.items()}

    # -- running ------------------------------------------------------------------------------------------------------

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield from zip(torch.split(self._inputs, _ROWS), torch.split(self._reference, _ROWS), strict=True)

    def _run(self, inputs: Tensor) -> Tensor:
        dtype = fast_dtype()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            return self._model(inputs).float()  # type: ignore[no-any-return]

    def _measured(self, on: Collection[str]) -> float:
        with torch.no_grad(), self._only(on):
            outputs = torch.cat([self._run(inputs) for inputs in torch.split(self._inputs, 4 * _ROWS)])
            return float(self._divergence(outputs, self._reference))

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
    def _watched(self, changes: dict[str, Tensor]) -> Iterator[list[tuple[str, Tensor]]]:
        """Collect every int8 layer's outputs in the block, and what rounding changed of them, by `_key`."""
        outputs: list[tuple[str, Tensor]] = []

        def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
            def hook(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
                assert isinstance(module, (QuantConv2d, QuantLinear))
                with torch.no_grad():
                    _switch(module, on=False)
                    # Without hooks, this one among them.
                    dense = module.forward(given[0])
                    _switch(module, on=True)
                    changes[_key(name, output)] = output.detach().float() - dense.float()
                outputs.append((name, output))

            return hook

        with ExitStack() as hooks:
            for name, modules in self._owned.items():
                for module in modules:
                    hooks.callback(module.register_forward_hook(watch(name)).remove)
            yield outputs


def _key(name: str, output: Tensor) -> str:
    """Return what tells the calls of a layer apart: it may work in several places."""
    return f"{name} {id(output)}"


def _switch(module: QuantConv2d | QuantLinear, *, on: bool) -> None:
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
