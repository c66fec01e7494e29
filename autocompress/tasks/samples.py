"""Where samples come from: tensors in memory, or a map-style dataset that is streamed. Owns batching and normalisation.

Both give the same batches for the same indices and seed; neither splits anything (see `classification`).
"""

from __future__ import annotations

import abc
import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from autocompress.errors import ConfigError
from autocompress.tasks.augmentation import Augmentation
from autocompress.tasks.base import Batch


def seeded(*parts: int) -> torch.Generator:
    """Return a generator that depends on these integers alone."""
    words = np.random.SeedSequence([part & 0xFFFFFFFF for part in parts]).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(words[0]) << 31 ^ int(words[1]))


@dataclass(frozen=True)
class Normalization:
    """Per-channel mean and standard deviation of inputs in 0..1; 8-bit images are divided by 255 first."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std) or not self.mean or min(self.std) <= 0:
            raise ConfigError(
                f"Normalisation with mean {self.mean} and std {self.std}: give one mean and one "
                "positive std per channel."
            )

    def __call__(self, inputs: Tensor) -> Tensor:
        """Return float inputs ``(N, C, ...)``."""
        if len(self.mean) != inputs.shape[1]:
            raise ConfigError(
                f"Normalisation has {len(self.mean)} channels but inputs are {tuple(inputs.shape)} (N, C, ...)."
            )
        shape = (1, -1) + (1,) * (inputs.ndim - 2)
        scale = 1 / torch.tensor(self.std)
        shift = -torch.tensor(self.mean) * scale
        if inputs.dtype == torch.uint8:
            scale = scale / 255
        return torch.addcmul(shift.view(shape), inputs.float(), scale.view(shape))


IMAGENET = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class Samples(abc.ABC):
    """An indexed source of ``(input, class)`` samples."""

    def __init__(self, normalization: Normalization | None) -> None:
        self._normalization = normalization

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def _raw(self, indices: Tensor, batch_size: int, seed: int) -> Iterator[Batch]:
        """Yield stored inputs and int64 targets in the order of `indices`; `seed` drives randomness of the source."""

    @abc.abstractmethod
    def largest_target(self) -> int | None:
        """Return the largest class number, or None where finding it means reading everything."""

    def batches(
        self,
        indices: Tensor,
        batch_size: int,
        *,
        augmentation: Augmentation | None = None,
        generator: torch.Generator | None = None,
    ) -> Iterator[Batch]:
        """Yield batches of float inputs ``(N, ...)`` and int64 targets ``(N,)`` in the order of `indices`."""
        generator = seeded(0) if generator is None else generator
        seed = int(torch.randint(2**31, (), generator=generator))
        for inputs, targets in self._raw(indices, batch_size, seed):
            chosen = inputs if augmentation is None else augmentation(inputs, generator)
            yield self._prepare(chosen), targets

    def digest(self) -> str:
        """Return a cheap hash of the data: its size and its first and last samples."""
        digest = hashlib.sha256(str(len(self)).encode())
        for inputs, targets in self._raw(torch.tensor([0, len(self) - 1]), 2, 0):
            digest.update(f"{inputs.dtype}{tuple(inputs.shape)}{targets.tolist()}".encode())
            digest.update(inputs.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def _prepare(self, inputs: Tensor) -> Tensor:
        if self._normalization is not None:
            return self._normalization(inputs)
        return inputs.float().div_(255) if inputs.dtype == torch.uint8 else inputs.float()


class TensorSamples(Samples):
    """Samples in memory, stored as given: 8-bit images stay 8-bit until their batch is made.

    Raises:
        ConfigError: There are no samples, or inputs and targets do not go together.
    """

    def __init__(self, inputs: Tensor, targets: Tensor, normalization: Normalization | None = None) -> None:
        super().__init__(normalization)
        if len(inputs) == 0 or targets.shape != (len(inputs),) or targets.is_floating_point():
            raise ConfigError(
                f"Data must be inputs (N, ...) with integer targets (N,), N > 0; found inputs {tuple(inputs.shape)} "
                f"and targets {tuple(targets.shape)} of {targets.dtype}."
            )
        self._inputs, self._targets = inputs, targets.long()

    def __len__(self) -> int:
        return len(self._inputs)

    def largest_target(self) -> int | None:
        """Return the largest class number."""
        return int(self._targets.max())

    def _raw(self, indices: Tensor, batch_size: int, seed: int) -> Iterator[Batch]:
        for chosen in torch.split(indices, batch_size):
            yield self._inputs[chosen], self._targets[chosen]


class DatasetSamples(Samples):
    """Samples of a map-style dataset of ``(input, class)``, read as needed by `workers` processes.

    Random transforms inside the dataset draw the same numbers for the same sample and epoch.

    Raises:
        ConfigError: The dataset has no length or is empty, or a sample is not ``(tensor, int)``.
    """

    def __init__(self, dataset: Dataset[Any], normalization: Normalization | None = None, *, workers: int = 0) -> None:
        super().__init__(normalization)
        try:
            self._length = len(cast(Sequence[Any], dataset))
        except TypeError as error:
            raise ConfigError(
                f"Dataset {type(dataset).__name__} has no length; give a map-style dataset (__len__ and __getitem__)."
            ) from error
        if self._length == 0:
            raise ConfigError(f"Dataset {type(dataset).__name__} is empty.")
        self._dataset, self._workers = dataset, workers
        _ = _Seeded(dataset, 0)[0]

    def __len__(self) -> int:
        return self._length

    def largest_target(self) -> int | None:
        """Return the largest class number where the dataset lists its `targets`, as torchvision's do."""
        targets = getattr(self._dataset, "targets", None)
        return None if targets is None or len(targets) == 0 else int(max(targets))

    def _raw(self, indices: Tensor, batch_size: int, seed: int) -> Iterator[Batch]:
        loader: DataLoader[Any] = DataLoader(
            _Seeded(self._dataset, seed),
            batch_sampler=[chosen.tolist() for chosen in torch.split(indices, batch_size)],
            collate_fn=_as_read,
            num_workers=self._workers,
            generator=torch.Generator().manual_seed(seed),  # keeps the loader off the global generator
        )
        for batch in loader:
            if isinstance(batch, ConfigError):
                raise batch
            yield batch


def _as_read(batch: Any) -> Any:
    return batch


class _Seeded(Dataset[tuple[Tensor, int]]):
    """Read each sample under a random state of its own, and leave the caller's untouched."""

    def __init__(self, dataset: Dataset[Any], seed: int) -> None:
        self._dataset, self._seed = dataset, seed

    def __getitems__(self, indices: Sequence[int]) -> Batch | ConfigError:
        """Return one batch, or what is wrong with it: raised in a worker, it would arrive as a traceback's text."""
        try:
            samples = [self[index] for index in indices]
        except ConfigError as error:
            return ConfigError(str(error))
        shapes = sorted({tuple(inputs.shape) for inputs, _ in samples})
        if len(shapes) > 1:
            return ConfigError(
                f"Samples of one dataset have different shapes, {shapes[0]} and {shapes[1]}. Resize them."
            )
        return torch.stack([inputs for inputs, _ in samples]), torch.tensor([target for _, target in samples])

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        kept, kept_python = torch.default_generator.get_state(), random.getstate()
        torch.default_generator.manual_seed(self._seed * 2**24 + index)
        random.seed(self._seed * 2**24 + index)
        try:
            sample = self._dataset[index]
        finally:
            torch.default_generator.set_state(kept)
            random.setstate(kept_python)
        if not (isinstance(sample, (tuple, list)) and len(sample) == 2 and isinstance(sample[0], Tensor)):
            raise ConfigError(
                f"Dataset {type(self._dataset).__name__}: sample {index} must be (input tensor, class number), found "
                f"{type(sample).__name__}. Add a transform that makes tensors."
            )
        return sample[0], int(sample[1])
