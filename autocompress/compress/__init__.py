"""Policy x model to smaller model: depth, channels, rank, int8. Adding a method is one new file with a `Transform`."""

from autocompress.compress.apply import apply_policy
from autocompress.compress.base import CompressionContext, Transform
from autocompress.compress.importance import IMPORTANCES, score_channels
from autocompress.compress.rewrite import rewrite

__all__ = ["IMPORTANCES", "CompressionContext", "Transform", "apply_policy", "rewrite", "score_channels"]
