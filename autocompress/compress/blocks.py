"""Depth: residual blocks replaced by their identity shortcut."""

from __future__ import annotations

import copy

from torch import nn

from autocompress.catalogue import Method
from autocompress.compress.base import CompressionContext, Transform
from autocompress.errors import CompressionError
from autocompress.policy import CompressionPolicy

METHOD = Method(
    "blocks",
    "pruning",
    "residual blocks with an identity shortcut removed whole",
    "Veit et al., Residual networks behave like ensembles, NeurIPS 2016",
    ("openvino", "onnxruntime", "tensorrt", "tensorrt-rtx"),
)


class BlockRemoval(Transform):
    """Replace every block in `policy.removed_blocks` by `nn.Identity`."""

    def apply(self, model: nn.Module, policy: CompressionPolicy, context: CompressionContext) -> nn.Module:
        """See `Transform.apply`."""
        if not policy.removed_blocks:
            return model
        model = copy.deepcopy(model)
        for name in policy.removed_blocks:
            parent, _, child = name.rpartition(".")
            try:
                model.get_submodule(name)
            except AttributeError as error:
                raise CompressionError(f"The policy removes block {name!r}, which the model does not have.") from error
            setattr(model.get_submodule(parent), child, nn.Identity())
        return model
