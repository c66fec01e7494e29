"""Pictures that a script draws: scikit-learn's handwritten digits and shapes, warped, on pieces of its photographs.

Every picture is drawn from a seed. Training, validation and test pictures come from disjoint digits and from disjoint
parts of the photographs, so that none of them is seen in two parts.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from sklearn.datasets import load_digits, load_sample_images
from torch import Tensor
from torch.nn import functional as F

# Of each part: the seed of its pictures, its digits (in a fixed random order), and its share of a photograph's width.
PARTS = {
    "train": (1, slice(0, 1100), (0.0, 0.6)),
    "validation": (2, slice(1100, 1350), (0.6, 0.75)),
    "test": (3, slice(1350, 1797), (0.75, 1.0)),
}
# Offset and contrast of photographs behind digits: as they are, they hide some of them.
_CALM = (0.05, 0.3)
# Pictures drawn at a time: what they need in memory stays below 200 MB.
_CHUNK = 500


def generator_of(part: str, seed: int) -> torch.Generator:
    """Return the generator of a data set's part."""
    return torch.Generator().manual_seed(1000 * seed + PARTS[part][0])


def uniform(generator: torch.Generator, n: int, low: float, high: float) -> Tensor:
    """Return `n` numbers between `low` and `high`."""
    return low + (high - low) * torch.rand(n, generator=generator)


@cache
def digits(part: str) -> tuple[Tensor, Tensor]:
    """Return the handwritten digits of a part: ``(N, 1, 8, 8)`` in 0..1, and their classes ``(N,)``."""
    found = load_digits()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(0))[PARTS[part][1]]
    images = torch.from_numpy(found.images).float()[order, None] / 16
    return images, torch.from_numpy(found.target).long()[order]


@cache
def _photographs(part: str) -> list[Tensor]:
    low, high = PARTS[part][2]
    photographs = [torch.from_numpy(np.array(image)) for image in load_sample_images().images]
    return [
        p.permute(2, 0, 1)[None].float()[..., int(low * p.shape[1]) : int(high * p.shape[1])] / 255 for p in photographs
    ]


def photograph_crops(n: int, size: int, part: str, generator: torch.Generator) -> Tensor:
    """Return `n` crops ``(n, 3, size, size)`` in 0..1 of scikit-learn's two photographs, of random place and scale."""
    crops = torch.empty(n, 3, size, size)
    scale = uniform(generator, n, 0.15, 0.6)
    x, y = (uniform(generator, n, -1, 1) * (1 - scale) for _ in range(2))
    which = torch.randint(2, (n,), generator=generator)
    flip = torch.where(torch.rand(n, generator=generator) < 0.5, -1.0, 1.0)
    for index, photograph in enumerate(_photographs(part)):
        # A square of the photograph's height, in its own coordinates of -1 to 1.
        aspect = photograph.shape[2] / photograph.shape[3]
        for chosen in torch.where(which == index)[0].split(_CHUNK):
            theta = torch.zeros(len(chosen), 2, 3)
            theta[:, 0, 0] = scale[chosen] * min(1.0, aspect) * flip[chosen]
            theta[:, 1, 1], theta[:, 0, 2], theta[:, 1, 2] = scale[chosen], x[chosen], y[chosen]
            grid = F.affine_grid(theta, [len(chosen), 3, size, size], align_corners=False)
            source = photograph.expand(len(chosen), -1, -1, -1)
            crops[chosen] = F.grid_sample(source, grid, padding_mode="reflection", align_corners=False)
    return crops


def warped(images: Tensor, size: tuple[int, int], place: Tensor, generator: torch.Generator) -> Tensor:
    """Return small images as masks ``(N, 1, *size)`` in 0..1, scaled, turned a little and sheared.

    Args:
        images: ``(N, 1, h, w)`` in 0..1.
        size: Height and width of the masks in pixels.
        place: ``(N, 3)``: centre x, centre y and half of the images' extent, in pixels.
        generator: Draws the turns and shears.
    """
    n, (height, width) = len(images), size
    angle, shear = uniform(generator, n, -0.35, 0.35), uniform(generator, n, -0.25, 0.25)
    half = place[:, 2]
    # From the pixels of a mask, as -1..1, to those of the small image.
    theta = torch.empty(n, 2, 3)
    theta[:, 0, 0] = angle.cos() * width / 2 / half
    theta[:, 0, 1] = (angle.sin() + shear) * height / 2 / half
    theta[:, 1, 0] = -angle.sin() * width / 2 / half
    theta[:, 1, 1] = angle.cos() * height / 2 / half
    centre = torch.stack([2 * place[:, 0] / width - 1, 2 * place[:, 1] / height - 1], 1)
    theta[:, :, 2] = -(theta[:, :, :2] @ centre[..., None])[..., 0]
    parts = [
        F.grid_sample(image, F.affine_grid(to, [len(to), 1, height, width], align_corners=False), align_corners=False)
        for image, to in zip(images.split(_CHUNK), theta.split(_CHUNK), strict=True)
    ]
    # Digits of 8 × 8 pixels are soft when they are enlarged.
    return (1.5 * torch.cat(parts)).clamp_max(1)


def painted(background: Tensor, mask: Tensor, generator: torch.Generator, noise: float = 0.04) -> Tensor:
    """Paint masks ``(N, 1, H, W)`` over backgrounds ``(N, 3, H, W)`` in colours that stand out, and add noise."""
    mean = (background * mask).sum((2, 3), keepdim=True) / mask.sum((2, 3), keepdim=True).clamp_min(1e-6)
    colour = torch.rand(len(mask), 3, 1, 1, generator=generator) * 0.4
    bright = mean.mean(1, keepdim=True) < 0.5
    colour = torch.where(bright, 0.6 + colour, colour)
    found = background * (1 - mask) + colour * mask
    return found + noise * torch.randn(found.shape, generator=generator)


def stored(images: Tensor) -> Tensor:
    """Return images in 0..1 as 8-bit ones."""
    return (images.clamp(0, 1) * 255).round().to(torch.uint8)


def digit_pictures(n: int, size: int, part: str, seed: int) -> tuple[Tensor, Tensor]:
    """Return `n` pictures ``(n, 3, size, size)``, 8-bit, of one digit each, and their classes ``(n,)``."""
    generator = generator_of(part, seed)
    images, classes = digits(part)
    chosen = torch.randint(len(images), (n,), generator=generator)
    half = uniform(generator, n, 0.32, 0.42) * size
    room = size / 2 - 0.9 * half
    x, y = (size / 2 + uniform(generator, n, -1, 1) * room for _ in range(2))
    mask = warped(images[chosen], (size, size), torch.stack([x, y, half], 1), generator)
    background = _CALM[0] + _CALM[1] * photograph_crops(n, size, part, generator)
    return stored(painted(background, mask, generator)), classes[chosen]


def digit_scenes(n: int, size: int, part: str, seed: int, *, cells: int, share: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return pictures of several digits, one at most in each of ``cells × cells`` squares, some of them empty.

    Args:
        n: Pictures.
        size: Pixels of a side.
        part: See `PARTS`.
        seed: Of the pictures.
        cells: Squares of a side.
        share: Of the squares that hold a digit.

    Returns:
        Pictures ``(n, 3, size, size)``, 8-bit; classes ``(n, cells²)``, -1 for none; boxes ``(n, cells², 4)``
        around what is drawn, as left, top, right, bottom in pixels.
    """
    generator = generator_of(part, seed)
    images, classes = digits(part)
    scene = _CALM[0] + _CALM[1] * photograph_crops(n, size, part, generator)
    found, boxes = torch.full((n, cells**2), -1), torch.zeros(n, cells**2, 4)
    step = size // cells
    for cell in range(cells**2):
        left, top = cell % cells * step, cell // cells * step
        filled = torch.where(torch.rand(n, generator=generator) < share)[0]
        chosen = torch.randint(len(images), (len(filled),), generator=generator)
        half = uniform(generator, len(filled), 0.38, 0.5) * step
        x, y = ((0.5 + uniform(generator, len(filled), -0.08, 0.08)) * step for _ in range(2))
        mask = warped(images[chosen], (step, step), torch.stack([x, y, half], 1), generator)
        square = scene[filled, :, top : top + step, left : left + step]
        scene[filled, :, top : top + step, left : left + step] = painted(square, mask, generator, noise=0.0)
        found[filled, cell] = classes[chosen]
        boxes[filled, cell] = boxes_around(mask[:, 0] > 0.3) + torch.tensor([left, top, left, top])
    scene += 0.03 * torch.randn(scene.shape, generator=generator)
    return stored(scene), found, boxes


def boxes_around(masks: Tensor) -> Tensor:
    """Return the boxes ``(N, 4)`` around what is true in masks ``(N, H, W)``: left, top, right, bottom in pixels."""
    rows, columns = masks.any(2).float(), masks.any(1).float()
    left, top = columns.argmax(1), rows.argmax(1)
    right = columns.shape[1] - columns.flip(1).argmax(1)
    bottom = rows.shape[1] - rows.flip(1).argmax(1)
    return torch.stack([left, top, right, bottom], 1).float()


SHAPES = ("ellipse", "rectangle", "triangle", "ring")


def shape_masks(kind: Tensor, size: int, pose: Tensor) -> Tensor:
    """Return masks ``(N, size, size)`` of `SHAPES`, 0 outside and 1 inside, with an edge of a pixel.

    Args:
        kind: ``(N,)`` indices into `SHAPES`.
        size: Pixels of a side.
        pose: ``(N, 5)``: centre x and y, half width and half height in pixels, and the angle in radians.
    """
    line = torch.arange(size) + 0.5
    x, y, a, b, angle = (pose[:, i, None, None] for i in range(5))
    dx, dy = line[None, None] - x, line[None, :, None] - y
    u, v = (dx * angle.cos() + dy * angle.sin()) / a, (dy * angle.cos() - dx * angle.sin()) / b
    radius = (u**2 + v**2).sqrt()
    # Of each shape how far inside a pixel is, as a share of its half extent.
    inside = torch.stack(
        [
            1 - radius,
            1 - torch.maximum(u.abs(), v.abs()),
            torch.minimum((1 - v) / 2, (1 + v) / 2 - u.abs()) * 1.2,
            0.28 - (radius - 0.72).abs(),
        ],
        1,
    )
    chosen = inside[torch.arange(len(kind)), kind]
    return (chosen * torch.minimum(a, b) + 0.5).clamp(0, 1)


def shape_scenes(n: int, size: int, part: str, seed: int, *, shapes: int) -> tuple[Tensor, Tensor]:
    """Return pictures of shapes filled with pieces of photographs, and what each pixel belongs to.

    Returns:
        Pictures ``(n, 3, size, size)``, 8-bit; classes ``(n, size, size)``: 0 is background, i + 1 is ``SHAPES[i]``.
    """
    generator = generator_of(part, seed)
    scene = 0.15 + 0.5 * photograph_crops(n, size, part, generator)
    classes = torch.zeros(n, size, size, dtype=torch.int64)
    for _ in range(shapes):
        kind = torch.randint(len(SHAPES), (n,), generator=generator)
        x, y = (uniform(generator, n, 0.15, 0.85) * size for _ in range(2))
        a, b = (uniform(generator, n, 0.13, 0.22) * size for _ in range(2))
        pose = torch.stack([x, y, a, b, uniform(generator, n, 0, 2 * torch.pi)], 1)
        mask = torch.cat([shape_masks(k, size, p) for k, p in zip(kind.split(_CHUNK), pose.split(_CHUNK), strict=True)])
        mask = mask[:, None]
        filling = 0.3 * photograph_crops(n, size, part, generator)
        filling += torch.rand(n, 3, 1, 1, generator=generator) * 0.7
        scene = scene * (1 - mask) + filling * mask
        classes = torch.where(mask[:, 0] > 0.5, kind[:, None, None] + 1, classes)
    return stored(scene + 0.03 * torch.randn(scene.shape, generator=generator)), classes
