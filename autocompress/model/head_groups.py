"""Attention heads as groups, each tried out before it is believed.

The forms of attention (`attention`) say which channels are a head's. Here half of the heads are removed from a copy,
and the attention module must give what it gives with the same heads silenced; one that does not is left alone, and
named.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from autocompress.model.attention import HeadAxis, keep_heads
from autocompress.model.channel_groups import ChannelGroup, Layer

# Error (RMS) of a module's output that rounding explains: of the output, and of what silencing heads does to it.
_SAME, _SMALL = 1e-3, 2e-2


def head_groups(
    model: nn.Module,
    inputs: Tensor,
    axes: Mapping[str, HeadAxis],
    layers: Mapping[str, Layer],
    skipped: dict[str, str],
) -> dict[str, ChannelGroup]:
    """Return the attention heads of `model` (eval mode; not changed) whose pruning is known to work, by first layer.

    Args:
        model: Network.
        inputs: Its example inputs ``(N, ...)``.
        axes: Its heads, as `attention.head_axes` finds them.
        layers: What may be pruned.
        skipped: Takes what is left alone, with the reason.
    """
    able = {}
    for name, axis in axes.items():
        missing = next((layer for layer in (*axis.made, *axis.read) if layer not in layers), None)
        if axis.heads < 2:
            skipped[f"{name} (heads)"] = "it has one head"
        elif missing is not None:
            skipped[f"{name} (heads)"] = f"{missing} is left alone"
        else:
            able[name] = axis
    if not able:
        return {}
    trials = _Trials(model, inputs[:1], able.values())
    if trials.reason_against(able.values()) is not None:
        for name, axis in list(able.items()):
            reason = trials.reason_against([axis])
            if reason is not None:
                skipped[f"{name} (heads)"] = f"removing heads breaks the model ({reason})"
                del able[name]
    return {name: _group(axis) for name, axis in able.items()}


def _group(axis: HeadAxis) -> ChannelGroup:
    each = {layer: len(heads) // axis.heads for layer, heads in axis.read.items()}
    return ChannelGroup(
        axis.leader, axis.heads, tuple(axis.made), tuple(axis.read), each, heads={**axis.made, **axis.read}
    )


class _Trials:
    """Removes heads from copies of a model.

    Args:
        model: The model, in eval mode; not changed.
        inputs: Example input ``(1, ...)``.
        axes: All heads that may be tried.
    """

    def __init__(self, model: nn.Module, inputs: Tensor, axes: Collection[HeadAxis]) -> None:
        self._model, self._inputs = model, inputs
        self._modules = [axis.module for axis in axes]
        self._whole = self._outputs(model)

    def reason_against(self, axes: Collection[HeadAxis]) -> str | None:
        """Halve these heads in a copy; return why that does not work, or None."""
        pruned, silent = copy.deepcopy(self._model), copy.deepcopy(self._model)
        try:
            for axis in axes:
                kept = _half(axis.heads)
                keep_heads(pruned, axis, kept)
                for layer, heads in axis.read.items():
                    weight = silent.get_parameter(f"{layer}.weight")
                    with torch.no_grad():
                        weight[:, [column for column, head in enumerate(heads) if head not in kept]] = 0
            found, expected = self._outputs(pruned), self._outputs(silent)
        except Exception as error:  # noqa: BLE001 - any failure means that these heads are left alone
            return f"{type(error).__name__}: {str(error)[:120]}"
        for axis in axes:
            whole, wanted, given = self._whole[axis.module], expected[axis.module], found[axis.module]
            if given.shape != wanted.shape:
                return f"its output became {tuple(given.shape)}"
            wrong, effect = _rms(given - wanted), _rms(whole - wanted)
            # Where removing heads does little, a wrong removal does little, too: hence both.
            if not (wrong <= _SAME * _rms(wanted) and wrong <= max(_SMALL * effect, 1e-6 * _rms(wanted))):
                return "what is left does not compute what the heads that stay did"
        return None

    def _outputs(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the outputs of the attention modules."""
        outputs: dict[str, Tensor] = {}

        def keep(name: str, _module: nn.Module, _inputs: Any, output: Any) -> None:
            outputs[name] = output if isinstance(output, Tensor) else output[0]

        hooks = [model.get_submodule(name).register_forward_hook(partial(keep, name)) for name in self._modules]
        try:
            with torch.no_grad():
                model(self._inputs)
        finally:
            for hook in hooks:
                hook.remove()
        return outputs


def _half(heads: int) -> list[int]:
    """Return half of the heads, drawn at random: a regular half may fit a layout that no other half fits."""
    drawn = torch.randperm(heads, generator=torch.Generator().manual_seed(0))[: heads - max(1, heads // 2)]
    return sorted(drawn.tolist())


def _rms(values: Tensor) -> float:
    return float(values.float().square().mean().sqrt())
