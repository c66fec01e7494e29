"""Getting accuracy back: batch-norm recalibration after every change, distillation for the finalists."""

from autocompress.recovery.recalibration import fast_dtype, recalibrate

__all__ = ["fast_dtype", "recalibrate"]
