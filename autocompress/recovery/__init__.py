"""Getting accuracy back: reconstruction and recalibration after every change, distillation for the finalists."""

from autocompress.recovery.oneshot import OneShot
from autocompress.recovery.recalibration import fast_dtype, recalibrate

__all__ = ["OneShot", "fast_dtype", "recalibrate"]
