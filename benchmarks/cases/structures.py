"""Networks in whose forward pass channels go ways that are hard to follow."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autocompress import ClassificationTask
from benchmarks.cases.making import CLASSES, Data, fit, fitted, images_task, sizes


class PixelShuffle(nn.Module):
    """Slices images into four before the first layer (Focus), and shuffles channels into pixels before the last."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(12, 48, 3, padding=1), nn.BatchNorm2d(48)
        self.wide, self.narrow = nn.Conv2d(48, 64, 3, padding=1), nn.Conv2d(16, 48, 3, padding=1)
        self.fc = nn.Linear(48, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]], 1)
        x = F.pixel_shuffle(self.wide(F.relu(self.norm(self.stem(x)))), 2)
        scores: Tensor = self.fc(F.relu(self.narrow(F.relu(x))).mean((2, 3)))
        return scores


class DepthwiseMultiplier(nn.Module):
    """Depthwise convolutions that make two and three channels of each, as PNASNet and EEGNet have."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.n0 = nn.Conv2d(3, 24, 3, padding=1), nn.BatchNorm2d(24)
        self.dw, self.n1 = nn.Conv2d(24, 48, 3, padding=1, groups=24), nn.BatchNorm2d(48)
        self.pw, self.n2 = nn.Conv2d(48, 32, 1), nn.BatchNorm2d(32)
        self.dw3, self.n3 = nn.Conv2d(32, 96, 3, 2, 1, groups=32), nn.BatchNorm2d(96)
        self.pw2 = nn.Conv2d(96, 64, 1)
        self.fc = nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.n1(self.dw(F.relu(self.n0(self.stem(x))))))
        x = F.relu(self.n3(self.dw3(F.relu(self.n2(self.pw(x))))))
        scores: Tensor = self.fc(F.relu(self.pw2(x)).mean((2, 3)))
        return scores


class BroadcastMask(nn.Module):
    """A mask of one channel times a map of many, and scales of each channel from a linear layer (FiLM)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.na = nn.Conv2d(3, 48, 5, padding=2), nn.BatchNorm2d(48)
        self.mask = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 1, 1))
        self.b, self.nb = nn.Conv2d(48, 64, 3, 2, 1), nn.BatchNorm2d(64)
        self.cond = nn.Linear(3, 128)
        self.c = nn.Conv2d(64, 64, 3, padding=1)
        self.fc = nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.na(self.a(x))) * torch.sigmoid(self.mask(x))
        y = F.relu(self.nb(self.b(y)))
        gamma, beta = self.cond(x.std((2, 3))).chunk(2, 1)
        y = (1 + gamma[:, :, None, None]) * y + beta[:, :, None, None]
        scores: Tensor = self.fc(F.relu(self.c(y)).mean((2, 3)))
        return scores


class Deformable(nn.Module):
    """A deformable convolution of torchvision's."""

    def __init__(self) -> None:
        from torchvision.ops import DeformConv2d

        super().__init__()
        self.a, self.na = nn.Conv2d(3, 48, 5, 3, 2), nn.BatchNorm2d(48)
        self.offset, self.b = nn.Conv2d(48, 18, 3, padding=1), DeformConv2d(48, 64, 3, padding=1)
        self.c = nn.Conv2d(64, 64, 3, padding=1)
        self.fc = nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.na(self.a(x)))
        x = F.relu(self.b(x, self.offset(x)))
        scores: Tensor = self.fc(F.relu(self.c(x)).mean((2, 3)))
        return scores


class RootMeanSquareNorm(nn.Module):
    """RMSNorm as language models write it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class GroupedQueryAttention(nn.Module):
    """Four query heads on two heads of keys and values, with rotary positions and a causal mask."""

    def __init__(self, width: int = 64, heads: int = 4, shared: int = 2) -> None:
        super().__init__()
        self.heads, self.shared, self.dim = heads, shared, width // heads
        self.q_proj = nn.Linear(width, heads * self.dim, bias=False)
        self.k_proj = nn.Linear(width, shared * self.dim, bias=False)
        self.v_proj = nn.Linear(width, shared * self.dim, bias=False)
        self.o_proj = nn.Linear(heads * self.dim, width, bias=False)
        angle = torch.arange(32)[:, None] * 10000 ** (-torch.arange(0, self.dim, 2) / self.dim)[None]
        self.register_buffer("cos", torch.cat([angle.cos(), angle.cos()], 1), persistent=False)
        self.register_buffer("sin", torch.cat([angle.sin(), angle.sin()], 1), persistent=False)

    def _turn(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return x * self.cos + torch.cat([-b, a], -1) * self.sin

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q = self._turn(self.q_proj(x).view(b, t, self.heads, self.dim).transpose(1, 2))
        k = self._turn(self.k_proj(x).view(b, t, self.shared, self.dim).transpose(1, 2))
        v = self.v_proj(x).view(b, t, self.shared, self.dim).transpose(1, 2)
        k, v = (y.repeat_interleave(self.heads // self.shared, 1) for y in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        mixed: Tensor = self.o_proj(y.transpose(1, 2).reshape(b, t, -1))
        return mixed


class DecoderLayer(nn.Module):
    """Attention, then a gated MLP."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.n1, self.n2 = RootMeanSquareNorm(width), RootMeanSquareNorm(width)
        self.attn = GroupedQueryAttention(width)
        self.gate_proj, self.up_proj = nn.Linear(width, 192, bias=False), nn.Linear(width, 192, bias=False)
        self.down_proj = nn.Linear(192, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.n1(x))
        h = self.n2(x)
        added: Tensor = x + self.down_proj(F.silu(self.gate_proj(h)) * self.up_proj(h))
        return added


class Decoder(nn.Module):
    """A decoder-only transformer that takes token numbers as floats."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layers = nn.Embedding(40, 64), nn.ModuleList([DecoderLayer() for _ in range(2)])
        self.norm, self.head = RootMeanSquareNorm(64), nn.Linear(64, 4)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids.long())
        for layer in self.layers:
            x = layer(x)
        scores: Tensor = self.head(self.norm(x)[:, -1])
        return scores


def motifs(count: int, seed: int) -> Data:
    """Return texts ``(N, 32)`` of token numbers, and which of four pairs of tokens is in each ``(N,)``."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(0, 4, (count,), generator=generator)
    ids = torch.randint(8, 40, (count, 32), generator=generator)
    at = torch.randint(0, 15, (count, 3), generator=generator) * 2
    for column in at.unbind(1):
        ids[torch.arange(count), column] = 2 * targets
        ids[torch.arange(count), column + 1] = 2 * ((targets + 1) % 4) + 1
    return ids.float(), targets


def pixel_shuffle() -> ClassificationTask:
    """PixelShuffle between two layers, Focus slicing before the first."""
    return images_task(fitted(PixelShuffle, "pixel-shuffle"), "pixel-shuffle")


def depthwise_multiplier() -> ClassificationTask:
    """Depthwise convolutions with a channel multiplier."""
    return images_task(fitted(DepthwiseMultiplier, "depthwise-multiplier"), "depthwise-multiplier")


def broadcast_mask() -> ClassificationTask:
    """A product with a broadcast mask of one channel, and FiLM."""
    return images_task(fitted(BroadcastMask, "broadcast-mask"), "broadcast-mask")


def deformable() -> ClassificationTask:
    """A deformable convolution."""
    return images_task(fitted(Deformable, "deformable"), "deformable")


def grouped_query_attention() -> ClassificationTask:
    """Grouped-query attention, rotary positions, RMSNorm and a gated MLP."""
    torch.manual_seed(0)
    model = fit(Decoder(), motifs(sizes()["train"], seed=1), "decoder", steps=120)
    return images_task(model, "decoder", motifs)
