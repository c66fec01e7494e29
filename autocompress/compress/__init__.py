"""Policy x model to smaller model: depth, channels, rank, int8. Adding a method is one new file with a `Transform`."""

from autocompress.compress.apply import apply_policy
from autocompress.compress.base import CompressionContext, Transform
from autocompress.compress.importance import IMPORTANCES, ChannelScores, check_importance, score_channels
from autocompress.compress.importances.base import Evidence
from autocompress.compress.rewrite import rewrite

__all__ = [
    "IMPORTANCES",
    "ChannelScores",
    "CompressionContext",
    "Evidence",
    "Transform",
    "apply_policy",
    "check_importance",
    "rewrite",
    "score_channels",
]
