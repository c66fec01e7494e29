from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from autocompress.errors import ConfigError
from autocompress.tasks import Augmentation

IMAGES = torch.arange(64 * 3 * 8 * 10).view(64, 3, 8, 10).float()


def augment(augmentation: Augmentation, seed: int = 0) -> torch.Tensor:
    return augmentation(IMAGES, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("flip", [True, False])
def test_every_image_is_a_crop_of_its_reflected_self(flip: bool) -> None:
    padding = 3
    padded = functional.pad(IMAGES, (padding,) * 4, mode="reflect")
    seen = set()
    for image, wide in zip(augment(Augmentation(padding, flip)), padded, strict=True):
        matches = [
            (mirrored, top, left)
            for mirrored in (False, True)
            for top in range(2 * padding + 1)
            for left in range(2 * padding + 1)
            for crop in [wide[:, top : top + 8, left : left + 10]]
            if torch.equal(image, crop.flip(2) if mirrored else crop)
        ]
        assert len(matches) == 1
        seen.add(matches[0])
    assert {mirrored for mirrored, _, _ in seen} == ({False, True} if flip else {False})
    assert {top for _, top, _ in seen} == {left for _, _, left in seen} == set(range(2 * padding + 1))


def test_nothing_to_do_changes_nothing_and_the_input_is_left_alone() -> None:
    before = IMAGES.clone()
    assert torch.equal(augment(Augmentation(0, flip=False)), before)
    augment(Augmentation())
    assert torch.equal(IMAGES, before)


def test_only_the_generator_decides() -> None:
    assert torch.equal(augment(Augmentation()), augment(Augmentation()))
    assert not torch.equal(augment(Augmentation(), 0), augment(Augmentation(), 1))


@pytest.mark.parametrize("shape", [(4, 7), (4, 3, 4, 9)])
def test_what_cannot_be_cropped_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="padding 4 needs images"):
        Augmentation(4)(torch.zeros(shape), torch.Generator())
