"""Getting accuracy back: reconstruction and recalibration after every change, distillation for the finalists."""

from autocompress.recovery.recalibration import fast_dtype, recalibrate
from autocompress.recovery.training_free import TrainingFreeCompressor

__all__ = ["TrainingFreeCompressor", "fast_dtype", "recalibrate"]
