"""Tasks that are no classification of images: metrics and losses of the user's own, several inputs, tokens."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from autocompress import ClassificationTask
from autocompress.tasks import Adapter, InputSpec, pack
from benchmarks.cases.making import Data, Plain, TensorTask, fit, gratings, sizes

# Of pixels that nothing is told of.
_IGNORED = 255
_LENGTH = 24  # tokens of a text


class Regression(TensorTask):
    """Numbers, measured by R2, which is negative where a model is bad, and mean squared error."""

    name, outputs, metric_name = "regression", "values", "R2"

    def metric(self, outputs: Tensor, targets: Tensor) -> float:
        return float(1 - (outputs - targets).square().sum() / (targets - targets.mean(0)).square().sum())

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.mse_loss(outputs, targets)


class OneNumber(Plain):
    """One number a sample: outputs ``(N,)``."""

    def __init__(self) -> None:
        super().__init__(outputs=1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).squeeze(1)


def _tilted(count: int, seed: int) -> Data:
    images, angle = gratings(count, seed, classes=40, noise=0.7)
    return images, torch.sin(angle * math.pi / 40)


def one_number() -> Regression:
    """Regression of one number a sample."""
    data = {split: _tilted(count, seed) for seed, (split, count) in enumerate(sizes().items(), 1)}
    torch.manual_seed(0)
    return Regression(fit(OneNumber(), data["train"], "one-number", steps=120, loss=F.mse_loss), data)


def three_numbers() -> Regression:
    """Regression of three numbers by a perceptron, of a table with 20 columns."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(20, 3, generator=generator)
    data = {}
    for split, count in sizes(train=2500, validation=700, test=800).items():
        x = torch.randn(count, 20, generator=generator)
        y = torch.tanh(x @ mixing) + 0.5 * (x[:, :3] * x[:, 3:6])
        data[split] = x, y + 0.05 * torch.randn(count, 3, generator=generator)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 3))
    return Regression(fit(model, data["train"], "three-numbers", steps=1500, loss=F.mse_loss), data)


class MultiLabel(TensorTask):
    """Ten labels of which any may hold, measured by micro F1."""

    name, outputs, metric_name = "multi-label", "values", "micro F1"

    def metric(self, outputs: Tensor, targets: Tensor) -> float:
        found, true = outputs > 0, targets > 0.5
        return float(2 * (found & true).sum() / (found.sum() + true.sum()).clamp(min=1))

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(outputs, targets)


def multi_label() -> MultiLabel:
    """A classifier of ten labels that do not exclude each other."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randn(10, 256, generator=generator)
    data = {}
    for split, count in sizes(train=3500, validation=700, test=800).items():
        x = torch.randn(count, 1, 16, 16, generator=generator)
        scores = torch.relu(x.flatten(1)) @ patterns.T + 2 * torch.randn(count, 10, generator=generator)
        data[split] = x, (scores > 8).float()
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Conv2d(32, 64, 3, 2, 1), nn.BatchNorm2d(64), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(64 * 64, 128), nn.ReLU(), nn.Linear(128, 10)),
    )
    loss = F.binary_cross_entropy_with_logits
    return MultiLabel(fit(model, data["train"], "multi-label", steps=400, rate=1e-3, loss=loss), data)


class Segmentation(TensorTask):
    """Two classes of pixels with labels ``(N, H, W)``, 255 where nothing is told, measured by mean IoU."""

    name, outputs, metric_name = "segmentation", "classes", "mean IoU"

    def metric(self, outputs: Tensor, targets: Tensor) -> float:
        found, told = outputs.argmax(1), targets != _IGNORED
        shares = []
        for number in (0, 1):
            a, b = (found == number) & told, (targets == number) & told
            shares.append(float((a & b).sum()) / max(1, int((a | b).sum())))
        return sum(shares) / 2

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets, ignore_index=_IGNORED)


def _stage(ins: int, outs: int, stride: int = 1) -> nn.Module:
    return nn.Sequential(nn.Conv2d(ins, outs, 3, stride, 1, bias=False), nn.BatchNorm2d(outs), nn.ReLU())


class SmallUNet(nn.Module):
    """One step down and up again, with a shortcut by concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.d1, self.d2, self.m = _stage(1, 32), _stage(32, 48, 2), _stage(48, 48)
        self.u, self.out = _stage(48 + 32, 32), nn.Conv2d(32, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.d1(x)
        coarse = F.interpolate(self.m(self.d2(fine)), size=fine.shape[-2:], mode="nearest")
        scores: Tensor = self.out(self.u(torch.cat([coarse, fine], 1)))
        return scores


def _discs(count: int, seed: int, size: int = 24) -> Data:
    generator = torch.Generator().manual_seed(seed)
    centre = torch.rand(count, 2, 1, 1, generator=generator) * size
    radius = 3 + 5 * torch.rand(count, 1, 1, generator=generator)
    at = torch.arange(size).float()
    inside = ((at[None, :, None] - centre[:, 0]) ** 2 + (at[None, None, :] - centre[:, 1]) ** 2) < radius**2
    targets = inside.long()
    images = inside.float()[:, None] + 0.9 * torch.randn(count, 1, size, size, generator=generator)
    targets[:, 0] = _IGNORED
    return images, targets


def segmentation() -> Segmentation:
    """Segmentation with labels, ignored pixels and IoU."""
    full = sizes(train=800, validation=200, test=300)
    data = {split: _discs(count, seed) for seed, (split, count) in enumerate(full.items(), 1)}
    torch.manual_seed(0)

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets, ignore_index=_IGNORED)

    return Segmentation(fit(SmallUNet(), data["train"], "segmentation", steps=60, loss=loss), data)


class TwoInputs(nn.Module):
    """An image and a vector of what else is known."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(
            *(nn.Conv2d(1, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU()),
            *(nn.Conv2d(32, 64, 3, 2, 1), nn.BatchNorm2d(64), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(4), nn.Flatten()),
        )
        self.meta = nn.Sequential(nn.Linear(8, 128), nn.ReLU())
        self.head = nn.Sequential(nn.Linear(1024 + 128, 256), nn.ReLU(), nn.Linear(256, 4))

    def forward(self, image: Tensor, meta: Tensor) -> Tensor:
        scores: Tensor = self.head(torch.cat([self.image(image), self.meta(meta)], 1))
        return scores


def two_inputs() -> ClassificationTask:
    """Two inputs, by `Adapter` and `pack`."""
    specs = (InputSpec("image", (1, 32, 32)), InputSpec("meta", (8,)))
    generator = torch.Generator().manual_seed(0)
    data = {}
    for split, count in sizes(train=3000, test=1000).items():
        y = torch.randint(4, (count,), generator=generator)
        image = torch.randn(count, 1, 32, 32, generator=generator) + (y % 2)[:, None, None, None] * 0.15
        meta = torch.randn(count, 8, generator=generator) + (y // 2)[:, None] * 0.8
        data[split] = pack({"image": image, "meta": meta}, specs), y
    torch.manual_seed(0)
    model = fit(Adapter(TwoInputs(), specs), data["train"], "two-inputs", steps=90, rate=1e-3)
    return ClassificationTask(model, **data, name="two-inputs")


class Rows(Dataset[Any]):
    """Texts as a dataset of Hugging Face's gives them: dicts of token numbers, mask and label."""

    def __init__(self, count: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._rows = []
        for _ in range(count):
            label, length = (int(torch.randint(*span, (), generator=generator)) for span in ((0, 2), (8, _LENGTH + 1)))
            ids = torch.randint(10, 500, (_LENGTH,), generator=generator)
            ids[: length // 2][torch.rand(length // 2, generator=generator) < 0.4] = 1 + label
            mask = (torch.arange(_LENGTH) < length).long()
            self._rows.append({"input_ids": ids * mask, "attention_mask": mask, "labels": label})

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._rows[index]


def dicts_of_tokens() -> ClassificationTask:
    """BERT of transformers, and the dicts that its Trainer takes, without anything written around them."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=500, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=256,
        max_position_embeddings=_LENGTH, num_labels=2,
    )  # fmt: skip
    bert, train = BertForSequenceClassification(config), Rows(sizes()["train"], 0)
    specs = tuple(InputSpec(name, (_LENGTH,), "int64") for name in ("input_ids", "attention_mask"))
    packed = pack({spec.name: torch.stack([row[spec.name] for row in train]) for spec in specs}, specs)
    labels = torch.tensor([row["labels"] for row in train])
    fit(Adapter(bert, specs, keep=("logits",)), (packed, labels), "tokens", steps=90, rate=1e-3)
    return ClassificationTask(bert.eval(), train=train, test=Rows(sizes(test=500)["test"], 1), name="tokens")
