"""Getting accuracy back: batch-norm recalibration after every change, distillation for the finalists."""

from autocompress.recovery.recalibration import recalibrate

__all__ = ["recalibrate"]
