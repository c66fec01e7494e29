"""Where samples come from: tensors in memory, or a map-style dataset that is streamed. Owns batching and normalisation.

Both give the same batches for the same indices and seed; neither splits anything (see `classification`).
"""

from __future__ import annotations

import abc
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from autocompress.errors import ConfigError
from autocompress.tasks.augmentation import Augmentation
from autocompress.tasks.base import Batch
from autocompress.tasks.sample_forms import SampleError, read_pair
from autocompress.tasks.sampling import changes_labels, listed_labels
from autocompress.tasks.sources import dataset_name, length_of, own_random_state

# Labels that a dataset does not list are read where all its inputs take no more than this, and it has as few samples:
# a second or two, and the split is that of the same data in memory.
_READ_BYTES, _READ_SAMPLES = 64 * 2**20, 65536


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

    def labels(self) -> Tensor | None:
        """Return the class of every sample ``(len(self),)`` to stratify by, or None where that means reading them."""
        return None

    def targets_known(self) -> Tensor | None:
        """Return `labels` if they are what batches hold as targets, else None."""
        return self.labels()

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

    def __init__(
        self,
        inputs: Tensor | npt.NDArray[Any],
        targets: Tensor | npt.NDArray[Any],
        normalization: Normalization | None = None,
    ) -> None:
        super().__init__(normalization)
        inputs, targets = _tensor(inputs, "inputs"), _tensor(targets, "targets")
        if len(inputs) == 0 or targets.shape != (len(inputs),) or targets.is_floating_point():
            one_hot = targets.ndim == 2 and targets.shape[1] > 1 and len(targets) == len(inputs)
            hint = " One-hot targets become class numbers by targets.argmax(1)." if one_hot else ""
            raise ConfigError(
                f"Data must be inputs (N, ...) with integer targets (N,), N > 0; found inputs {tuple(inputs.shape)} "
                f"and targets {tuple(targets.shape)} of {targets.dtype}.{hint}"
            )
        self._inputs, self._targets = inputs, targets.long()

    def __len__(self) -> int:
        return len(self._inputs)

    def largest_target(self) -> int | None:
        """Return the largest class number."""
        return int(self._targets.max())

    def labels(self) -> Tensor | None:
        """Return the targets."""
        return self._targets

    def _raw(self, indices: Tensor, batch_size: int, seed: int) -> Iterator[Batch]:
        for chosen in torch.split(indices, batch_size):
            yield self._inputs[chosen], self._targets[chosen]


class DatasetSamples(Samples):
    """Samples of a map-style dataset of ``(input, class)``, read as needed by `workers` processes.

    Random transforms inside the dataset draw the same numbers for the same sample and epoch.

    Args:
        dataset: Has a length.
        normalization: Mean and std per channel.
        workers: Processes that read.
        source: What it is called in errors met later: ``"train data: "``.

    Raises:
        ConfigError: The dataset has no length or is empty, or a sample is not ``(tensor, int)``.
    """

    def __init__(
        self, dataset: Dataset[Any], normalization: Normalization | None = None, *, workers: int = 0, source: str = ""
    ) -> None:
        super().__init__(normalization)
        length = length_of(dataset)
        if length is None:
            raise ConfigError(
                f"Dataset {dataset_name(dataset)} has no length and cannot be iterated; give a map-style dataset "
                "(__len__ and __getitem__), a DataLoader, or an iterable of samples."
            )
        self._length = length
        if self._length == 0:
            raise ConfigError(f"Dataset {dataset_name(dataset)} is empty.")
        self._dataset, self._workers, self._source = dataset, workers, source
        self._sample_bytes = _Seeded(dataset, 0)[0][0].nbytes
        self._labels: Tensor | None = None
        self._labels_sought = False

    def __len__(self) -> int:
        return self._length

    def largest_target(self) -> int | None:
        """Return the largest class number where the dataset lists its labels, as torchvision's do."""
        targets = self.targets_known()
        return None if targets is None or len(targets) == 0 else int(targets.max())

    def labels(self) -> Tensor | None:
        """Return the class numbers where the dataset lists them (`sampling.listed_labels`) or is small, else None."""
        if not self._labels_sought:
            listed = listed_labels(self._dataset)
            self._labels = self._read_labels() if listed is None else listed
            self._labels_sought = True
        return self._labels

    def _read_labels(self) -> Tensor | None:
        """Return the class of every sample read, or None where that is much to read, or one has none."""
        if self._length > _READ_SAMPLES or self._length * self._sample_bytes > _READ_BYTES:
            return None
        samples = _Seeded(self._dataset, 0)
        try:
            return torch.tensor([samples[index][1] for index in range(self._length)])
        except ConfigError:  # said, with its name, when the sample is due
            return None

    def targets_known(self) -> Tensor | None:
        """Return the class numbers where the dataset lists them and does not change them when read."""
        return None if changes_labels(self._dataset) else self.labels()

    def _raw(self, indices: Tensor, batch_size: int, seed: int) -> Iterator[Batch]:
        loader: DataLoader[Any] = DataLoader(
            _Seeded(self._dataset, seed, self._source),
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

    def __init__(self, dataset: Dataset[Any], seed: int, source: str = "") -> None:
        self._dataset, self._seed, self._source = dataset, seed, source

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
        sample = read_raw(self._dataset, index, self._seed, self._source)
        try:
            return read_pair(sample)
        except SampleError as error:
            raise ConfigError(f"{_sample_name(self._dataset, index, self._source)}{error}") from error


def read_raw(dataset: Any, index: int, seed: int = 0, source: str = "") -> Any:
    """Return a sample as a dataset gives it, read under a random state of its own; the caller's is left untouched.

    Raises:
        ConfigError: It cannot be read; names dataset and sample.
    """
    try:
        with own_random_state(seed * 2**24 + index):
            return dataset[index]
    except ConfigError:
        raise
    except SampleError as error:
        raise ConfigError(f"{_sample_name(dataset, index, source)}{error}") from error
    except Exception as error:  # the user's code, or a damaged file
        raise ConfigError(
            f"{_sample_name(dataset, index, source)} cannot be read: {type(error).__name__}: {error}. Repair it, or "
            "leave it out (torch.utils.data.Subset)."
        ) from error


def _sample_name(dataset: object, index: int, source: str) -> str:
    return f"{source}Dataset {dataset_name(dataset)}: sample {index}"


def _tensor(values: object, what: str) -> Tensor:
    """Return a tensor of plain class, sharing the memory where it can."""
    if isinstance(values, Tensor):
        return values.as_subclass(Tensor)
    try:
        return torch.from_numpy(np.asarray(values))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"Data must be tensors or numeric arrays; {what} are {type(values).__name__}.") from error
