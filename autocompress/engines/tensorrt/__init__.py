"""TensorRT and TensorRT for RTX."""

from autocompress.engines.tensorrt.engine import ENGINE_CLASSES

__all__ = ["ENGINE_CLASSES"]
