"""Compressed models as good as they get without training: reconstructed, batch-norm recalibrated, ranges calibrated."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from autocompress.compress import CompressionContext, apply_policy
from autocompress.compress.quantization import calibrate, quantization_mode
from autocompress.inventory import Inventory
from autocompress.ledger import Ledger
from autocompress.policy import CompressionPolicy
from autocompress.recovery.recalibration import fast_dtype, recalibrate
from autocompress.recovery.reconstruction import Reconstruction

# What reconstruction is fitted to; images of high resolution have many positions each.
_SAMPLES, _BYTES = 512, 2**26


class OneShot:
    """Makes the compressed forms of one network.

    Args:
        base: The uncompressed network, rewritten, in eval mode; not changed.
        inventory: Of this model.
        scores: Importance of channels, as `CompressionContext` takes it.
        inputs: Example inputs ``(N, ...)``.
        batches: Gives calibration inputs ``(N, ...)``, the same at every call.
        reconstruct: Whether to fit the weights that are left.
    """

    def __init__(
        self, base: nn.Module, inventory: Inventory, scores: Mapping[str, Tensor], inputs: Tensor,
        batches: Callable[[], Iterable[Tensor]], *, reconstruct: bool = True,
    ) -> None:  # fmt: skip
        self._base, self._batches = base, batches
        self._context = CompressionContext(inputs, scores)
        self._dtype = fast_dtype()
        self._reconstruction = Reconstruction(base, inventory, _first(batches()), self._dtype) if reconstruct else None

    def model(self, policy: CompressionPolicy, ledger: Ledger | None = None) -> nn.Module:
        """Return the model that `policy` makes, in eval mode.

        Raises:
            CompressionError: The policy does not fit the model.
        """
        ledger = ledger or Ledger()
        with ledger.spend("apply"):
            model = apply_policy(self._base, policy, self._context)
        with ledger.spend("proxy"), torch.autocast("cpu", self._dtype, enabled=self._dtype != torch.float32):
            if not policy.is_structural_identity:
                with quantization_mode(model, "off"):
                    if self._reconstruction is not None:
                        self._reconstruction.apply(model, policy, self._context.channel_scores)
                    recalibrate(model, self._batches())
            calibrate(model, self._batches())
        return model


def _first(batches: Iterable[Tensor]) -> Tensor:
    """Return the first samples of `batches`, as many as a fit takes."""
    taken: list[Tensor] = []
    count = 0
    for batch in batches:
        most = min(_SAMPLES, max(2, _BYTES // max(1, batch[0].nbytes)))
        taken.append(batch[: most - count])
        count += len(taken[-1])
        if count >= most:
            break
    return torch.cat(taken)
