"""Turns what holds a user's samples into a map-style dataset: loaders, iterables, columns, data modules.

Owns the container; `sample_forms` and `named_samples` own what is in it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    TensorDataset,
    default_collate,
    default_convert,
)

from autocompress.errors import ConfigError
from autocompress.tasks.data_module import DataModule, is_data_module
from autocompress.tasks.sample_forms import SampleError, bytes_of, label_key, owned

_SPLITS = {"train", "test", "validation", "val", "dev", "eval"}
MEMORY_LIMIT = 2 * 2**30  # bytes of what can only be iterated, all of which is held

ToInput = Callable[[Any], Any]


@contextmanager
def own_random_state(seed: int) -> Iterator[None]:
    """Have what the user's code draws in the block depend on `seed` alone, and leave the caller's state untouched."""
    kept, kept_python = torch.default_generator.get_state(), random.getstate()
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    try:
        yield
    finally:
        torch.default_generator.set_state(kept)
        random.setstate(kept_python)


def dataset_name(dataset: object) -> str:
    """Return what the user knows a dataset by, however it is wrapped here."""
    return str(getattr(dataset, "given_name", type(dataset).__name__))


def length_of(data: Any) -> int | None:
    """Return how many samples data say they have, or None where they do not."""
    try:
        return len(data)
    except (TypeError, NotImplementedError):
        return None


class ReadOnce(list[Any]):
    """Samples read from an iterable, in its order."""

    def __init__(self, samples: Iterable[Any], name: str) -> None:
        super().__init__(samples)
        self.given_name = name


class Converted(Dataset[Any]):
    """Samples of a dataset, each through a function.

    Args:
        dataset: Map-style.
        function: From one sample to another.
        what: What the function is called where it raises.
    """

    def __init__(self, dataset: Any, function: ToInput, what: str) -> None:
        self.dataset, self._function, self._what = dataset, function, what
        self.given_name = dataset_name(dataset)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        sample = self.dataset[index]
        try:
            return self._function(sample)
        except (ConfigError, SampleError):
            raise
        except Exception as error:  # the user's code
            raise SampleError(
                f": {self._what} raised {type(error).__name__}: {error}. It gets one {type(sample).__name__}."
            ) from error


class SingleCollate:
    """A loader's `collate_fn` for one sample alone, the batch axis taken off again."""

    def __init__(self, collate: ToInput) -> None:
        self._collate = collate

    def __call__(self, sample: Any) -> Any:
        """Return what the batch of this sample alone holds."""
        return self._first(self._collate([sample]))

    def _first(self, batch: Any) -> Any:
        if isinstance(batch, (Tensor, np.ndarray)):
            if batch.ndim == 0 or len(batch) != 1:
                raise SampleError(
                    f": {collate_name(self._collate)} makes {tuple(batch.shape)} of one sample, where the first axis "
                    "must be the batch's, of 1. Give to_input=, a function of one sample."
                )
            return batch[0]
        if isinstance(batch, Mapping):
            return {key: self._first(value) for key, value in batch.items()}
        if isinstance(batch, (tuple, list)):
            alone = len(batch) == 1 and not isinstance(batch[0], (Tensor, np.ndarray, Mapping))
            return batch[0] if alone else tuple(self._first(value) for value in batch)
        return batch


def collate_name(collate: object) -> str:
    """Return what a collate function is called."""
    return f"collate_fn {getattr(collate, '__name__', type(collate).__name__)}"


class Columns(Dataset[dict[str, Any]]):
    """A mapping of columns ``(N, ...)``, as a tokenizer gives for many texts, as dict samples.

    Raises:
        ConfigError: The columns are of different lengths.
    """

    def __init__(self, columns: Mapping[Any, Any]) -> None:
        self.given_name = type(columns).__name__
        sizes = {key: len(value) if hasattr(value, "__len__") else 0 for key, value in columns.items()}
        if not sizes:
            raise ConfigError(f"{self.given_name} is empty.")
        if len(set(sizes.values())) != 1 or {str(key).lower() for key in sizes} <= _SPLITS:
            raise ConfigError(
                f"{self.given_name} with keys {', '.join(f'{key!r} of {size}' for key, size in sizes.items())}: as "
                "columns of one table they must have one length. If they are data sets, give them one by one: "
                "train=data['train'], test=data['test']."
            )
        self.columns = dict(columns)
        self._length = next(iter(sizes.values()))

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {key: value[index] for key, value in self.columns.items()}


class Sources:
    """Opens the data sets of one task; what is passed twice is read and set up once.

    Args:
        to_input: See `SplitTask`.
        labelled: Whether samples have labels.
        notes: Gets sentences for the user.
    """

    def __init__(self, to_input: ToInput | None, labelled: bool, notes: list[str]) -> None:
        self._to_input, self._labelled, self._notes = to_input, labelled, notes
        self._modules: dict[int, DataModule] = {}
        self._read: dict[int, tuple[Any, ReadOnce]] = {}

    def validation_of(self, train: Any, test: Any) -> Any:
        """Return the module that `train` is where it has validation data that are not taken for testing, else None."""
        if not is_data_module(train) or not self._module(train).has("val_dataloader"):
            return None
        try:
            self._module(train).loader("validation")
        except ConfigError:
            return None
        if test is train and self._module(test).loader("test")[0] == "val_dataloader":
            self._notes.append(
                f"{self._module(train).name} has no test_dataloader: val_dataloader is the test data, and validation "
                "data are split off the training data, so that none serve twice."
            )
            return None
        return train

    def open(self, data: Any, split: str) -> Any:
        """Return a pair of tensors or arrays, or a map-style dataset of samples.

        Args:
            data: See `SplitTask`.
            split: ``"train"``, ``"validation"`` or ``"test"``.

        Raises:
            ConfigError: Data have no samples that could be read by number or in order.
        """
        convert, what = self._to_input, "to_input"
        if is_data_module(data):
            module = self._module(data)
            method, data = module.loader(split)
            self._notes.append(f"{split} data: {module.name}.{method}().")
        if isinstance(data, DataLoader):
            collate = data.collate_fn
            batched = data.batch_sampler is not None  # else the function gets samples, not lists of them
            data = self._of_loader(data, split)
            if collate not in (default_collate, default_convert):
                what = collate_name(collate) if convert is None else what
                self._notes.append(
                    f"{split} data: {collate_name(collate)} is "
                    + ("applied to one sample at a time." if convert is None else "left out: to_input stands for it.")
                )
                convert = convert or (SingleCollate(collate) if batched else collate)
        if isinstance(data, (str, bytes)):
            raise ConfigError(f"found {data[:60]!r}, a {type(data).__name__}. Give samples: see docs/tasks.md.")
        if self._is_arrays(data):
            if convert is None:
                return tuple(data)
            data = _Named(TensorDataset(*(torch.as_tensor(part) for part in data)), type(data).__name__)
        if _is_labelled_columns(data):
            data = {**data[0], "label": data[1]}
        if isinstance(data, Mapping):
            data = Columns(data)
        data = self._indexed(data, split)
        return data if convert is None else Converted(data, convert, what)

    def _is_arrays(self, data: Any) -> bool:
        """Return whether data are inputs and targets, not a sequence of two samples."""
        if not isinstance(data, (tuple, list)) or len(data) != 2 or not isinstance(data[0], (Tensor, np.ndarray)):
            return False
        return isinstance(data, tuple) or (self._labelled and isinstance(data[1], (Tensor, np.ndarray)))

    def _module(self, module: Any) -> DataModule:
        return self._modules.setdefault(id(module), DataModule(module))

    def _of_loader(self, loader: DataLoader[Any], split: str) -> Any:
        """Return the dataset behind a loader, or the part of it that its sampler draws from."""
        dataset = loader.dataset
        if isinstance(dataset, IterableDataset) or self._is_arrays(dataset):
            return dataset
        sampler: Any = getattr(loader, "sampler", None)
        own_batches = getattr(loader, "batch_sampler", None)
        sampler = getattr(own_batches, "sampler", sampler) if own_batches is not None else sampler
        if isinstance(sampler, (SequentialSampler, DistributedSampler)) or sampler is None:
            return dataset
        if isinstance(sampler, RandomSampler) and not sampler.replacement:
            return dataset
        indices = getattr(sampler, "indices", None)
        if isinstance(indices, (Sequence, Tensor, np.ndarray)) and len(indices):
            self._notes.append(
                f"{split} data: the {len(indices):,} of {len(cast(Any, dataset)):,} samples that the loader's "
                f"{type(sampler).__name__} names."
            )
            return Subset(dataset, [int(index) for index in indices])
        self._notes.append(
            f"{split} data: all {len(cast(Any, dataset)):,} samples of the loader's dataset, each once; its "
            f"{type(sampler).__name__} is left out."
        )
        return dataset

    def _indexed(self, data: Any, split: str) -> Any:
        """Return data as they are where they have a length and samples by number; what can be iterated is read."""
        by_number = (
            length_of(data) is not None and hasattr(data, "__getitem__") and not isinstance(data, IterableDataset)
        )
        if by_number or not hasattr(data, "__iter__"):
            return data
        if id(data) not in self._read:
            # The iterable is kept, too: another one could get its id.
            self._read[id(data)] = data, self._read_all(data, split)
        return self._read[id(data)][1]

    def _read_all(self, data: Iterable[Any], split: str) -> ReadOnce:
        name, size = type(data).__name__, 0
        samples: list[Any] = []
        try:
            with own_random_state(0):
                for sample in data:
                    size += bytes_of(sample)
                    if size > MEMORY_LIMIT:
                        raise ConfigError(
                            f"{name} can only be iterated and holds more than {MEMORY_LIMIT / 2**30:.3g} GiB: "
                            f"{len(samples):,} samples were read. Give a dataset that reads samples by number (__len__ "
                            "and __getitem__), or a first part: itertools.islice(data, 10_000)."
                        )
                    samples.append(owned(sample))
        except ConfigError:
            raise
        except Exception as error:  # the user's code, or a damaged file
            raise ConfigError(
                f"{name}: reading on after {len(samples):,} samples raised {type(error).__name__}: {error}. Repair "
                "what comes there, or leave it out."
            ) from error
        self._notes.append(
            f"{split} data: {name} can only be iterated; its {len(samples):,} samples were read once, in order, and "
            f"are held in memory ({size / 2**20:,.0f} MiB)."
        )
        return ReadOnce(samples, name)


def _is_labelled_columns(data: Any) -> bool:
    """Return whether data are columns with the labels beside them, not a sequence of two dict samples."""
    pair = isinstance(data, tuple) and len(data) == 2 and isinstance(data[0], Mapping)
    return pair and not isinstance(data[1], Mapping) and label_key(data[0]) is None


class _Named(Dataset[Any]):
    """A dataset under the name of what it was made of."""

    def __init__(self, dataset: Any, name: str) -> None:
        self.dataset, self.given_name = dataset, name

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        return self.dataset[index]
