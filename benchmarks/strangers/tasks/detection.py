"""A detector in the manner of SSDLite: inverted residuals, anchors on two maps, separable heads; mAP as its metric."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.mobilenetv2 import InvertedResidual
from torchvision.ops import batched_nms, box_iou

from autocompress import Task
from autocompress.config import TaskConfig
from benchmarks.strangers.tasks import drawing
from benchmarks.strangers.tasks.arrays import ArrayTask, drawn
from benchmarks.strangers.tasks.trained import Recipe, trained

SIZE, CLASSES = 96, 10
# Of each map: cells of a side, and the anchors' widths and heights in pixels.
MAPS = ((12, ((20, 28), (26, 32))), (6, ((24, 30), (14, 26))))
# Anchors that overlap an object by this are positive; box offsets are in these units (SSD's).
_POSITIVE, _VARIANCES = 0.5, (0.1, 0.2)
# Negatives a positive one, the hardest first.
_NEGATIVES = 3
# Detections that are kept, and the overlap above which the weaker of two is dropped.
_SCORE, _NMS, _KEPT = 0.05, 0.45, 50


def anchors() -> Tensor:
    """Return all anchors ``(A, 4)``: centre x and y, width and height in pixels, as the detector lists them."""
    found = []
    for cells, sizes in MAPS:
        line = (torch.arange(cells) + 0.5) * SIZE / cells
        y, x = torch.meshgrid(line, line, indexing="ij")
        for width, height in sizes:
            found.append(torch.stack([x, y, torch.full_like(x, width), torch.full_like(x, height)], -1).view(-1, 4))
    return torch.cat(found)


class SSDLite(nn.Module):
    """Pictures to scores and box offsets of all anchors."""

    def __init__(self) -> None:
        super().__init__()
        norm = nn.BatchNorm2d
        block = partial(InvertedResidual, norm_layer=norm)
        self.fine = nn.Sequential(
            nn.Conv2d(3, 16, 3, 2, 1, bias=False), norm(16), nn.ReLU6(),
            block(16, 24, 2, 3), block(24, 24, 1, 3), block(24, 48, 2, 4), block(48, 48, 1, 4), block(48, 48, 1, 4),
        )  # fmt: skip
        self.coarse = nn.Sequential(block(48, 96, 2, 4), block(96, 96, 1, 4))
        values = CLASSES + 1 + 4
        self.heads = nn.ModuleList(
            [
                nn.Sequential(
                    nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False), norm(width), nn.ReLU6(),
                    nn.Conv2d(width, values * len(sizes), 1),
                )
                for width, (_, sizes) in zip((48, 96), MAPS, strict=True)
            ]
        )  # fmt: skip

    def forward(self, picture: Tensor) -> Tensor:
        """Map pictures ``(N, 3, 96, 96)`` to ``(N, anchors, 11 + 4)``: scores, of the background first, and offsets."""
        fine = self.fine(picture)
        parts = []
        for head, features in zip(self.heads, (fine, self.coarse(fine)), strict=True):
            found = head(features)
            parts.append(found.view(found.shape[0], -1, CLASSES + 5, found.shape[2] * found.shape[3]))
        return torch.cat([part.transpose(2, 3).flatten(1, 2) for part in parts], 1)


def detection_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return SSD's loss: cross-entropy with the hardest negatives, and smooth L1 of the positive anchors' boxes.

    Args:
        outputs: ``(N, anchors, 11 + 4)``.
        targets: ``(N, objects, 5)``: class (-1 for none), left, top, right, bottom.
    """
    own = anchors()
    classes, boxes = targets[..., 0], targets[..., 1:]
    overlap = box_iou(_corners(own), boxes.reshape(-1, 4)).view(len(own), *classes.shape).transpose(0, 1)
    overlap = torch.where(classes[:, None] >= 0, overlap, -1.0)
    # Every object has the anchor that overlaps it most, whatever the others do.
    best = overlap.argmax(1)
    forced = F.one_hot(best, len(own)).transpose(1, 2).bool() & (classes[:, None] >= 0)
    value, index = torch.where(forced, 2.0, overlap).max(2)
    positive = value > _POSITIVE
    wanted = torch.where(positive, classes.gather(1, index).long() + 1, 0)
    of = boxes.gather(1, index[..., None].expand(-1, -1, 4))
    centre, extent = (of[..., :2] + of[..., 2:]) / 2, (of[..., 2:] - of[..., :2]).clamp_min(1)
    offsets = torch.cat(
        [(centre - own[:, :2]) / own[:, 2:] / _VARIANCES[0], (extent / own[:, 2:]).log() / _VARIANCES[1]], -1
    )
    scores = F.cross_entropy(outputs[..., : CLASSES + 1].transpose(1, 2), wanted, reduction="none")
    negative = torch.where(positive, -1.0, scores.detach())
    rank = negative.argsort(1, descending=True).argsort(1)
    counted = positive | (rank < _NEGATIVES * positive.sum(1, keepdim=True))
    count = positive.sum().clamp_min(1)
    moved = F.smooth_l1_loss(outputs[..., CLASSES + 1 :][positive], offsets[positive], reduction="sum")
    return (scores[counted].sum() + moved) / count


def _corners(boxes: Tensor) -> Tensor:
    return torch.cat([boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2], -1)


def detections(outputs: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return each picture's boxes ``(K, 4)``, scores ``(K,)`` and classes ``(K,)`` after non-maximum suppression."""
    own = anchors()
    scores = outputs[..., : CLASSES + 1].softmax(-1)[..., 1:]
    offsets = outputs[..., CLASSES + 1 :]
    centre = own[:, :2] + offsets[..., :2] * _VARIANCES[0] * own[:, 2:]
    boxes = _corners(torch.cat([centre, (offsets[..., 2:] * _VARIANCES[1]).clamp(-4, 4).exp() * own[:, 2:]], -1))
    found = []
    for all_scores, all_boxes in zip(scores, boxes, strict=True):
        anchor, kind = torch.where(all_scores > _SCORE)
        score, box = all_scores[anchor, kind], all_boxes[anchor]
        kept = batched_nms(box, score, kind, _NMS)[:_KEPT]
        found.append((box[kept], score[kept], kind[kept]))
    return found


def mean_average_precision(outputs: Tensor, targets: Tensor) -> float:
    """Return the mean over classes of the area under precision and recall, an overlap of 0.5 being a hit."""
    hits: list[list[tuple[float, bool]]] = [[] for _ in range(CLASSES)]
    objects = [0] * CLASSES
    for (boxes, scores, kinds), wanted in zip(detections(outputs.float()), targets, strict=True):
        there = wanted[wanted[:, 0] >= 0]
        for kind in there[:, 0].long().tolist():
            objects[kind] += 1
        overlap = box_iou(boxes, there[:, 1:]) if len(there) else torch.zeros(len(boxes), 0)
        overlap = torch.where(kinds[:, None] == there[:, 0], overlap, -1.0)
        taken: set[int] = set()
        for row, score, kind in zip(overlap.tolist(), scores.tolist(), kinds.tolist(), strict=True):
            free = [i for i, value in enumerate(row) if value >= 0.5 and i not in taken]
            best = max(free, key=row.__getitem__, default=None)
            if best is not None:
                taken.add(best)
            hits[kind].append((score, best is not None))
    return sum(_area(found, count) for found, count in zip(hits, objects, strict=True) if count) / CLASSES


def _area(found: list[tuple[float, bool]], objects: int) -> float:
    if not found:
        return 0.0
    hit = torch.tensor([one for _, one in sorted(found, key=lambda pair: -pair[0])]).double()
    recall, precision = hit.cumsum(0) / objects, hit.cumsum(0) / torch.arange(1, len(hit) + 1)
    # Precision at a recall is the best at that recall or above.
    precision = precision.flip(0).cummax(0).values.flip(0)
    steps = torch.cat([recall[:1], recall.diff()])
    return float((steps * precision).sum())


def _scenes(part: str, n: int) -> tuple[Tensor, Tensor]:
    pictures, classes, boxes = drawing.digit_scenes(n, SIZE, part, seed=1, cells=3, share=0.45)
    return pictures, torch.cat([classes[..., None].float(), boxes], -1)


def detector(config: TaskConfig) -> Task:
    """Digits found in pictures of several."""
    data = drawn("scenes-1", config, _scenes, (4000, 400, 800))
    recipe = Recipe(epochs=8, learning_rate=4e-3, batch_size=32)
    model = trained("detector", config, SSDLite, data["train"], loss=detection_loss, recipe=recipe)
    # Scores and offsets of all anchors side by side, on axis 2.
    return ArrayTask("detector", model, data, mean_average_precision, detection_loss, outputs="values")
