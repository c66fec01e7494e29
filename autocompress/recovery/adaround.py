"""AdaRound: whether each int8 weight is rounded up or down, learned so that the layer gives what it gave in float.

Nearest rounding is the best for single weights, not for their sums. Per layer, a number per weight between down and up
is optimised by gradients, and pushed to one of the two in the course of it (Nagel et al., ICML 2020). The step of each
output channel stays what it is, since its largest weight is not moved: what exporters compute from the rounded weights
is the same grid. The layer's activation function is left out of the fit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from autocompress.catalogue import Method

METHOD = Method(
    "adaround",
    "quantization",
    "int8 weights rounded up or down by what the layer's outputs lose, learned",
    "Nagel et al., Up or down? Adaptive rounding, ICML 2020",
)
STEPS = 400
_RATE, _BATCH = 0.05, 256
# The penalty that drives numbers to 0 or 1: its weight, its exponent from first to last, and the share without it. The
# squared error counts relative to that of nearest rounding, the penalty per weight, so that no layer's scale matters.
_PENALTY, _BETAS, _FREE = 1.0, (20.0, 2.0), 0.2
# Stretch of the sigmoid, so that 0 and 1 are reached.
_LOW, _HIGH = -0.1, 1.1
# Weights this near to the largest code are the largest of their channel.
_EDGE = 127 - 1e-3


def adaptive_rounding(weight: Tensor, inputs: Tensor, wanted: Tensor, groups: int = 1, *, steps: int = STEPS) -> Tensor:
    """Return `weight` rounded to int8 steps per output channel so that `inputs` give what is `wanted`.

    Args:
        weight: ``(C, ...)`` of a layer, not rounded.
        inputs: Rows ``(R, K)`` that the quantized network multiplies it with; of a grouped layer those of all groups.
        wanted: Rows ``(R, C)`` of the float network's output, the bias left out.
        groups: Of the layer.
        steps: Of the optimisation.

    Returns:
        Weights ``(C, ...)`` on the grid of `compress.rounding.fake_quantize_weight`, which leaves them as they
        are. Zeros and the largest of each channel stay. Nearest rounding where that turned out to be better.
    """
    flat = weight.detach().float().flatten(1)
    step = flat.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / 127
    exact = flat / step
    nearest = exact.round().clamp(-127, 127)
    fixed = (exact.abs() >= _EDGE) | (flat == 0)
    down = exact.floor().clamp(-127, 126)

    # The mean of what is off is the bias's, or the batch-norm's after it.
    middle, level = inputs.mean(0), wanted.mean(0)
    rows, targets = _by_group(inputs - middle, groups), wanted - level

    def error(codes: Tensor, chosen: Tensor | slice) -> Tensor:
        found = torch.bmm(rows[:, chosen], (codes * step).view(groups, -1, codes.shape[1]).transpose(1, 2))
        return (found.permute(1, 0, 2).flatten(1) - targets[chosen]).square().mean()

    everything = slice(None)
    with torch.no_grad():
        scale = error(nearest, everything)
    if bool(fixed.all()) or not 0 < float(scale) < float("inf"):
        return (nearest * step).reshape(weight.shape).to(weight.dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.enable_grad():
        start = ((exact - down).clamp(0, 1) - _LOW) / (_HIGH - _LOW)
        numbers = torch.logit(start).detach().requires_grad_()
        optimizer = torch.optim.Adam([numbers], _RATE)
        for number in range(steps):
            share = number / steps
            chosen = torch.randint(len(targets), (_BATCH,), generator=generator)
            up = _stretched(numbers)
            loss = error(torch.where(fixed, nearest, down + up), chosen) / scale
            if share >= _FREE:
                beta = _BETAS[1] + (_BETAS[0] - _BETAS[1]) * (1 - (share - _FREE) / (1 - _FREE))
                loss = loss + _PENALTY * (1 - (2 * up - 1).abs().pow(beta)).mean()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    with torch.no_grad():
        found = torch.where(fixed, nearest, down + (_stretched(numbers) >= 0.5))
        if float(error(found, everything)) >= float(scale):
            found = nearest
    return (found * step).reshape(weight.shape).to(weight.dtype)


def _stretched(numbers: Tensor) -> Tensor:
    return (torch.sigmoid(numbers) * (_HIGH - _LOW) + _LOW).clamp(0, 1)


def _by_group(rows: Tensor, groups: int) -> Tensor:
    """Return rows ``(R, K)`` as ``(groups, R, K / groups)``."""
    return rows.view(len(rows), groups, -1).transpose(0, 1)
