"""Attention maps: where in an image, or at which tokens, a network's features are large (Zagoruyko & Komodakis, 2017).

A map is the sum of squares over channels, so that networks of different widths compare without anything learned.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from autocompress.catalogue import Method
from autocompress.recovery.distillation_points import Place
from autocompress.recovery.distillations.base import Distillation

METHOD = Method(
    "attention",
    "distillation",
    "maps of where inner outputs are large matched; nothing is learned",
    "Zagoruyko & Komodakis, Paying more attention to attention, ICLR 2017",
)


def attention_map(rows: Tensor) -> Tensor:
    """Return the sum of squares over the channels of ``(N, positions, channels)``, of length 1: ``(N, positions)``."""
    return F.normalize(rows.square().sum(-1), dim=1)


class Attention(Distillation):
    """The squared distance of normalised maps, between 0 and 2 for every sample.

    The authors' own weight, 1000 times the mean over positions, is 16 times this for a map of 8 x 8 and as much as this
    for one of 32 x 32; the weight here lies between them.
    """

    weight = 10.0

    @staticmethod
    def suits(place: Place) -> bool:
        """Return whether there is more than one position: one alone is always 1."""
        return math.prod(place.positions) > 1

    def target(self, place: Place, teacher: Tensor) -> Tensor:
        """Return the map ``(N, positions)``, in half precision."""
        return attention_map(place.rows(teacher)).to(torch.bfloat16)

    def loss(self, place: Place, student: Tensor, target: Tensor) -> Tensor:
        """Return the squared distance of the maps, mean over samples."""
        return (attention_map(place.rows(student)) - target.float()).square().sum(1).mean()


DISTILLATIONS = {"attention": Attention}
