"""Where samples come from: tensors in memory, or a map-style dataset that is streamed. Owns batching and normalisation.

Both give the same batches for the same indices and seed; neither splits anything (see `classification`).
"""

from __future__ import annotations

import abc
import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from autocompress.errors import ConfigError
from autocompress.tasks.augmentation import Augmentation
from autocompress.tasks.base import Batch
from autocompress.tasks.sampling import changes_labels, listed_labels

_LABEL_KEYS = ("label", "labels", "target", "targets", "class", "y", "fine_label")


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
        if isinstance(dataset, DataLoader):
            raise ConfigError(
                "a DataLoader cannot be split or sampled; give the dataset behind it (loader.dataset). Batches, "
                "shuffling and reading processes are chosen here (workers=...)."
            )
        try:
            self._length = len(cast(Sequence[Any], dataset))
        except TypeError as error:
            raise ConfigError(
                f"Dataset {type(dataset).__name__} has no length; give a map-style dataset (__len__ and __getitem__). "
                + (
                    "Of a data module, give the datasets: module.train_dataloader().dataset."
                    if hasattr(dataset, "train_dataloader")
                    else "What can only be iterated becomes one by list(...)."
                )
            ) from error
        if self._length == 0:
            raise ConfigError(f"Dataset {type(dataset).__name__} is empty.")
        self._dataset, self._workers, self._source = dataset, workers, source
        _ = _Seeded(dataset, 0)[0]

    def __len__(self) -> int:
        return self._length

    def largest_target(self) -> int | None:
        """Return the largest class number where the dataset lists its labels, as torchvision's do."""
        targets = self.targets_known()
        return None if targets is None or len(targets) == 0 else int(targets.max())

    def labels(self) -> Tensor | None:
        """Return the class numbers where the dataset lists them; see `sampling.listed_labels`."""
        return listed_labels(self._dataset)

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
        kept, kept_python = torch.default_generator.get_state(), random.getstate()
        torch.default_generator.manual_seed(self._seed * 2**24 + index)
        random.seed(self._seed * 2**24 + index)
        try:
            sample = self._dataset[index]
        except ConfigError:
            raise
        except Exception as error:  # the user's code, or a damaged file
            raise ConfigError(
                f"{self._sample(index)} cannot be read: {type(error).__name__}: {error}. Repair it, or leave it out "
                "(torch.utils.data.Subset)."
            ) from error
        finally:
            torch.default_generator.set_state(kept)
            random.setstate(kept_python)
        if not (isinstance(sample, (tuple, list)) and len(sample) == 2):
            raise ConfigError(
                f"{self._sample(index)} must be (input tensor, class number), found {_described(sample)}."
            )
        inputs = torch.from_numpy(sample[0]) if isinstance(sample[0], np.ndarray) else sample[0]
        if not isinstance(inputs, Tensor):
            raise ConfigError(
                f"{self._sample(index)} must be (input tensor, class number), found {type(sample).__name__} with "
                f"a {type(inputs).__name__} for input. Add a transform that makes tensors."
            )
        return inputs.as_subclass(Tensor), self._class(sample[1], index)

    def _class(self, label: object, index: int) -> int:
        """Return the class number that a label is."""
        size = label.numel() if isinstance(label, Tensor) else label.size if isinstance(label, np.ndarray) else 1
        where = f"{self._sample(index)}: the label must be a class number, found"
        if size != 1:
            raise ConfigError(
                f"{where} {size} values. If it is one-hot, give the position of the one: int(label.argmax())."
            )
        try:
            number = float(label.item() if isinstance(label, (Tensor, np.ndarray)) else label)  # type: ignore[arg-type]
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{where} {label!r}. Number the classes from 0 on.") from error
        if not number.is_integer():
            raise ConfigError(
                f"{where} {number:.6g}. For values instead of classes, write a Task of your own (docs/tasks.md)."
            )
        return int(number)

    def _sample(self, index: int) -> str:
        return f"{self._source}Dataset {type(self._dataset).__name__}: sample {index}"


def _described(sample: object) -> str:
    """Return what a sample is that is no pair, and how to make it one."""
    wrap = "Wrap the dataset in one whose __getitem__ returns"
    if isinstance(sample, Mapping):
        found = f"a {type(sample).__name__} with keys {', '.join(map(repr, sample))}"
        label = next((key for key in sample if str(key).lower() in _LABEL_KEYS), None)
        inputs = [key for key in sample if key != label]
        if label is None or len(inputs) != 1:
            return f"{found}. {wrap} two of them; several inputs become one by autocompress.tasks.pack (docs/tasks.md)"
        return f"{found}. {wrap} (sample[{inputs[0]!r}], sample[{label!r}])"
    if isinstance(sample, (tuple, list)):
        kinds = ", ".join(type(part).__name__ for part in sample)
        return f"{type(sample).__name__} of {len(sample)}: {kinds}. {wrap} the two of them"
    return f"{type(sample).__name__}. {wrap} both"


def _tensor(values: object, what: str) -> Tensor:
    """Return a tensor of plain class, sharing the memory where it can."""
    if isinstance(values, Tensor):
        return values.as_subclass(Tensor)
    try:
        return torch.from_numpy(np.asarray(values))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"Data must be tensors or numeric arrays; {what} are {type(values).__name__}.") from error
