"""Compressed models as good as they get without training: reconstructed, batch-norms moved, ranges calibrated."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from autocompress.compress import CompressionContext, apply_policy
from autocompress.compress.layout import layout_of
from autocompress.compress.quantization import calibrate, observing
from autocompress.config import QuantizationConfig
from autocompress.errors import AutoCompressError, CompressionError
from autocompress.model.inventory import Inventory
from autocompress.policy import CompressionPolicy
from autocompress.recovery.recalibration import batch_norms, fast_dtype, recalibrate
from autocompress.recovery.reconstruction import Reconstruction
from autocompress.runs.time_ledger import TimeLedger
from autocompress.tasks.reading import first_samples

_BATCH = 256
# Samples that must not all come out alike.
_CHECKED = 16
# Characters of what a network raises that are told.
_WORDS = 300


class TrainingFreeCompressor:
    """Makes the compressed forms of one network.

    Args:
        base: The uncompressed network, rewritten, in eval mode; not changed.
        inventory: Of this model.
        scores: Importance of channels, as `CompressionContext` takes it.
        inputs: Example inputs ``(N, ...)``.
        batches: Calibration inputs ``(N, ...)``; the first ones are kept.
        reconstruct: Whether to fit the weights that are left.
        quantization: How ranges of activations are set.

    Attributes:
        data: The calibration inputs that were kept ``(N, ...)``.
        dtype: What forward passes run in under autocast.

    Raises:
        ConfigError: There are no calibration inputs.
    """

    def __init__(
        self, base: nn.Module, inventory: Inventory, scores: Mapping[str, Tensor], inputs: Tensor,
        batches: Iterable[Tensor], *, reconstruct: bool = True,
        quantization: QuantizationConfig | None = None,
    ) -> None:  # fmt: skip
        self._base, self.data = base, first_samples(batches)
        self._context = CompressionContext(inputs, scores, quantization or QuantizationConfig())
        self.dtype = fast_dtype(base, inputs)
        # One sample has no statistics of a batch to normalise by.
        fits = reconstruct and len(self.data) > 1
        self._reconstruction = Reconstruction(base, inventory, self.data, self.dtype) if fits else None
        with torch.no_grad():
            whole = _rows(base(self.data[:_CHECKED]))
        self._tells_apart = not bool((whole == whole[:1]).all())

    def model(self, policy: CompressionPolicy, ledger: TimeLedger | None = None) -> nn.Module:
        """Return the model that `policy` makes, in eval mode.

        Raises:
            CompressionError: The policy does not fit the model, or what it makes does not run.
        """
        try:
            return self._model(policy, ledger or TimeLedger())
        except AutoCompressError:
            raise
        except Exception as error:  # whatever the user's forward raises for shapes that it was not written for
            raise CompressionError(
                f"The compressed network does not run: {type(error).__name__}: {str(error)[:_WORDS]}"
            ) from error

    def _model(self, policy: CompressionPolicy, ledger: TimeLedger) -> nn.Module:
        context, scores = self._context, self._context.channel_scores
        with ledger.charge("apply"):
            if self._reconstruction is not None:
                context = replace(context, layer_outputs=self._reconstruction.outputs(policy, scores))
            # What was cut or factorized has lost the layout that convolutions and pooling are fast in.
            model = apply_policy(self._base, policy, context).to(memory_format=layout_of(self._base))
        with ledger.charge("proxy"), torch.autocast("cpu", self.dtype, enabled=self.dtype != torch.float32):
            changed = not policy.is_structural_identity
            if changed and self._reconstruction is not None:
                # One pass serves all three.
                with observing(model):
                    self._reconstruction.apply(model, policy, scores)
            elif changed and batch_norms(model):
                with observing(model):
                    recalibrate(model, torch.split(self.data, _BATCH))
            else:
                calibrate(model, torch.split(self.data, _BATCH))
            self._check(model)
        return model

    def _check(self, model: nn.Module) -> None:
        """Refuse a network that tells its inputs apart no more.

        Raises:
            CompressionError: Its outputs are not finite, or the same for every sample.
        """
        with torch.no_grad():
            outputs = _rows(model(self.data[:_CHECKED]))
        if not bool(outputs.isfinite().all()):
            raise CompressionError("What is left of the network gives NaN or infinite outputs.")
        # Of one sample nothing can be told; a network that says one thing to everything has said so from the start.
        if len(outputs) > 1 and self._tells_apart and bool((outputs == outputs[:1]).all()):
            raise CompressionError(
                "What is left of the network gives the same outputs for every sample: its features have become zero."
            )

    def recalibrated(self) -> nn.Module:
        """Return the uncompressed model, its batch-norms as those of changed ones would be, in eval mode."""
        model = copy.deepcopy(self._base)
        # A reconstruction moves statistics by what was changed: here by nothing.
        if self._reconstruction is None and batch_norms(model):
            with torch.autocast("cpu", self.dtype, enabled=self.dtype != torch.float32):
                recalibrate(model, torch.split(self.data, _BATCH))
        return model


def _rows(outputs: Tensor) -> Tensor:
    """Return outputs ``(N, ...)``, of one number each ``(N,)`` too, as ``(N, numbers)``."""
    return outputs.float().reshape(len(outputs), -1)
