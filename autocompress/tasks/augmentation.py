"""Augmentation of a whole batch at once, as index arithmetic: no loop over samples, no padded copy."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from autocompress.errors import ConfigError


@dataclass(frozen=True)
class Augmentation:
    """Random shift and mirror of every training image.

    Attributes:
        padding: Largest shift in pixels; the border is filled by reflection. 0 turns it off.
        flip: Whether half of the images are mirrored left to right. Off where the sides carry meaning (digits, text).
    """

    padding: int = 4
    flip: bool = True

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Return augmented images ``(N, C, H, W)`` of the same dtype; the input is left alone.

        Raises:
            ConfigError: `images` are not ``(N, C, H, W)``, or not larger than the padding.
        """
        if images.ndim != 4 or min(images.shape[2:]) <= self.padding:
            raise ConfigError(
                f"Augmentation with padding {self.padding} needs images (N, C, H, W) with H, W > {self.padding}, "
                f"found {tuple(images.shape)}. Pass augmentation=None."
            )
        n, channels, height, width = images.shape
        rows = self._shifted(height, n, generator)
        columns = self._shifted(width, n, generator)
        if self.flip:
            mirrored = torch.rand(n, 1, generator=generator) < 0.5
            columns = torch.where(mirrored, columns.flip(1), columns)
        pixels = (rows[:, :, None] * width + columns[:, None, :]).view(n, 1, -1).expand(n, channels, -1)
        return images.flatten(2).gather(2, pixels).view(images.shape)

    def _shifted(self, size: int, n: int, generator: torch.Generator) -> Tensor:
        """Return source positions ``(n, size)`` of a random shift, reflected at both borders."""
        shift = torch.randint(-self.padding, self.padding + 1, (n, 1), generator=generator)
        position = (torch.arange(size) + shift).abs()
        return (size - 1) - ((size - 1) - position).abs()
