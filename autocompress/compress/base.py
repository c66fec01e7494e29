"""The `Transform` interface: one kind of compression applied to a model as a policy says."""

from __future__ import annotations

import abc
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor, nn

from autocompress.config import QuantizationConfig
from autocompress.errors import CompressionError
from autocompress.policy import CompressionPolicy


class LayerOutputs(NamedTuple):
    """What a layer gives on calibration data, of the channels that pruning leaves.

    Attributes:
        mean: ``(C,)``.
        covariance: ``(C, C)``; of a layer without a bias and without a batch-norm after it, second moments around zero.
    """

    mean: Tensor
    covariance: Tensor


@dataclass(frozen=True)
class CompressionContext:
    """What transforms may look at besides the model and the policy.

    Attributes:
        inputs: Example inputs ``(N, ...)``.
        channel_scores: Group name to importance of each of its channels ``(C,)`` in the uncompressed model; higher is
            more worth keeping. A group that is missing is pruned from its last channel on, which is enough to rebuild
            shapes before stored weights are loaded.
        quantization: How ranges of activations are set.
        layer_outputs: Layer name to what the layer gives in the uncompressed model. One that is missing is factorized
            by its weights alone.
        weights: Whether weights are wanted. Where only shapes are, those of factorized layers are not computed.
    """

    inputs: Tensor
    channel_scores: Mapping[str, Tensor] = field(default_factory=dict)
    quantization: QuantizationConfig = field(default_factory=QuantizationConfig)
    layer_outputs: Mapping[str, LayerOutputs] = field(default_factory=dict)
    weights: bool = True


def check_names(names: Iterable[str], model: nn.Module, policy: CompressionPolicy) -> None:
    """Check that the model has every module named, those inside removed blocks excepted.

    Raises:
        CompressionError: It has not; names the first.
    """
    present = {name for name, _ in model.named_modules()}
    for name in names:
        if name not in present and not any(name.startswith(f"{block}.") for block in policy.removed_blocks):
            raise CompressionError(f"The policy names {name!r}, which the model does not have.")


class Transform(abc.ABC):
    """One kind of compression."""

    @abc.abstractmethod
    def apply(self, model: nn.Module, policy: CompressionPolicy, context: CompressionContext) -> nn.Module:
        """Return a compressed copy of `model`, or `model` itself when the policy asks nothing of this transform.

        The input model is never changed.

        Raises:
            CompressionError: The policy cannot be applied; names the layer or group.
        """
