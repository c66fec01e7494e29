"""The networks, and the limits that all of them are asked to meet. Nothing here was chosen for one of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

TARGET_LATENCY, MAX_DROP, MINUTES = "0.6x", "2pp", 10.0
# Where trained weights and drawn data are kept, unless `--cache` says otherwise.
CACHE = Path.home() / ".cache" / "autocompress-strangers"
_TASKS = "benchmarks.strangers.tasks"


@dataclass(frozen=True)
class Network:
    """One network with its task.

    Attributes:
        factory: What ``--task`` names.
        what: In a few words.
        measured: What the drop is of.
        metric: What ``--metric`` names, for networks without labels; None where the task has its own.
        transformer: Whether NNCF's ``model_type`` is to say so.
        images: Whether the task reads ``--images``.
        trained: Whether weights come from the cache, where they are trained by the benchmark.
    """

    factory: str
    what: str
    measured: str
    metric: str | None = None
    transformer: bool = False
    images: bool = False
    trained: bool = True

    @property
    def task(self) -> str:
        """The whole name of the factory."""
        return f"{_TASKS}.{self.factory}"


NETWORKS = {
    "mobilenetv2": Network("published:mobilenetv2", "MobileNetV2, ImageNet, 224²", "top-1", images=True, trained=False),
    "minilm": Network(
        "published:minilm", "MiniLM sentence encoder", "cosine", "cosine", transformer=True, trained=False
    ),
    "crepe-tiny": Network(
        "published:crepe_tiny", "crepe tiny, pitch of sound", "same pitch", "agreement", trained=False
    ),
    "pnet": Network("published:pnet", "MTCNN PNet, two outputs", "cosine", "cosine", trained=False),
    "rnet": Network("published:rnet", "MTCNN RNet, two outputs", "cosine", "cosine", trained=False),
    "onet": Network("published:onet", "MTCNN ONet, three outputs", "cosine", "cosine", trained=False),
    "vit": Network("classifiers:vit", "ViT (timm)", "top-1", transformer=True),
    "crnn": Network("sequences:crnn", "CRNN, lines of digits", "accuracy per position"),
    "unet": Network("pictures:unet", "U-Net, masks", "mean IoU"),
    "detector": Network("detection:detector", "SSDLite-like detector", "mAP at 0.5"),
    "regression": Network("pictures:regression", "regression of a pose", "R²"),
    "multilabel": Network("pictures:multilabel", "DenseNet, multi-label", "micro F1"),
    "two-inputs": Network("classifiers:two_inputs", "picture and vector", "top-1"),
    "groupnorm-resnet": Network("classifiers:groupnorm_resnet", "ResNet with GroupNorm (timm)", "top-1"),
    "mobilenetv3": Network("classifiers:mobilenetv3", "MobileNetV3-Small, SE", "top-1"),
    "convnext": Network("classifiers:convnext", "ConvNeXt (timm)", "top-1"),
    "tcn": Network("sequences:tcn", "temporal convolutional network", "accuracy per position"),
}
