"""`SplitTask`: a trained model with its data. Owns the splits and the model's copies.

`opening` owns what data may be, `samples` batching, `sampling` which samples stand for all.
"""

from __future__ import annotations

import abc
import copy
import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from autocompress.errors import ConfigError
from autocompress.tasks.augmentation import Augmentation
from autocompress.tasks.base import Batch, Task
from autocompress.tasks.opening import open_data
from autocompress.tasks.plain_model import plain_copy
from autocompress.tasks.samples import Normalization, Samples, seeded
from autocompress.tasks.sampling import covering_prefix, stratified_order
from autocompress.tasks.sources import ToInput

# Whatever holds samples: see `SplitTask`.
Data = (
    Samples
    | Dataset[Any]
    | DataLoader[Any]
    | Iterable[Any]
    | Mapping[str, Any]
    | tuple[Tensor, Tensor]
    | tuple[npt.NDArray[Any], npt.NDArray[Any]]
)

# Share of the training data that stands in for validation data where there are too few test samples to divide.
_VALIDATION_FRACTION = 0.1
# Test samples are divided where each half has at least this many: fewer steer worse than training samples do.
_FEWEST_HELD_OUT = 100
# A last training batch smaller than this share of the others is dropped: batch-norm statistics of a few samples
# are noise, and of one sample an error.
_SMALLEST_LAST_BATCH = 0.5


class SplitTask(Task):
    """A model with training and test data; subclasses say what a good output is.

    Data are taken as people have them:

    - a pair of tensors or arrays ``(inputs (N, ...), targets (N,))``, held as given;
    - a map-style dataset, or a list, of samples, streamed;
    - a `DataLoader`: its dataset (of a subset sampler, that subset); a `collate_fn` of the user's own is applied to one
      sample at a time;
    - an `IterableDataset` or any other iterable of samples: read once, in order, into memory, 2 GiB at most;
    - a mapping of columns ``(N, ...)``, with the labels among them or as ``(columns, labels)``;
    - a data module (``train_dataloader``, as Lightning's): `train` takes its training data, `validation` its
      ``val_dataloader`` and `test` its ``test_dataloader``, or ``val_dataloader`` where there is none.

    A sample is ``(input tensor, class number)``, a dict with the class under ``label``, ``labels`` or another usual
    name, or a pair of a dict and a class. Several inputs of a dict go to the parameters of the model's ``forward`` of
    the same names, through an `Adapter` made here. `to_input` makes a sample of anything else.

    Validation and calibration are stratified random samples by class where the labels are listed (see
    `sampling.listed_labels`) or the inputs take 64 MiB at most, else random ones. 8-bit inputs are divided by 255;
    `normalization` is applied to every batch. Datasets that normalise by themselves leave it None.

    Args:
        model: Trained network, one tensor ``(N, ...)`` to one tensor ``(N, ...)``, or called with the inputs of dict
            samples; kept, never changed.
        train: Training data; validation and calibration are taken from it.
        test: Test data.
        validation: Validation data, which the network was not trained on; None takes ``val_dataloader`` of a module
            given as `train`, unless that is the test data, else a stratified half of `test`, which is then tested on
            the other half: a trained network has most often seen all of `train`, and loses more there than elsewhere.
        name: Short name for tables and folders.
        normalization: Mean and std per channel.
        augmentation: Augmentation of training images; None for none.
        validation_fraction: Share of `train`, in (0, 1), that is for validation in place of half of `test`: for a
            network that has not seen it. None takes a tenth where `test` has fewer than 200 samples.
        calibration_size: Samples of the rest of `train` used for calibration; at most all of them.
        workers: Processes that read a streamed dataset.
        seed: Seed of the splits, the order and the augmentation.
        to_input: Function from one sample, whatever it is, to ``(input tensor or dict of tensors, class number)``;
            applied before anything else.
        length: Of token numbers and masks ``(n,)`` of dict samples, which are padded with 0 or cut at the end; None
            takes the 95th percentile of up to 1,000 training samples where they differ, rounded up to a multiple of 8,
            at most the longest.

    Attributes:
        data_notes: Sentences about what of the data was wrapped, left out, padded or chosen.

    Raises:
        ConfigError: Data cannot be used or split, or the model does not take them.
    """

    data_notes: tuple[str, ...] = ()

    def __init__(
        self,
        model: nn.Module,
        train: Data,
        test: Data,
        validation: Data | None = None,
        *,
        name: str = "task",
        normalization: Normalization | None = None,
        augmentation: Augmentation | None = None,
        validation_fraction: float | None = None,
        calibration_size: int = 1024,
        workers: int = 0,
        seed: int = 0,
        to_input: ToInput | None = None,
        length: int | None = None,
    ) -> None:
        if validation_fraction is not None and not 0 < validation_fraction < 1:
            raise ConfigError(f"validation_fraction {validation_fraction} must be between 0 and 1.")
        if calibration_size < 1:
            raise ConfigError(f"calibration_size {calibration_size} must be at least 1.")
        self.name = name
        plain, self.model_notes = plain_copy(model, f"Task {name!r}")
        opened = open_data(
            plain, train, test, validation, normalization=normalization, workers=workers, to_input=to_input,
            length=length, labelled=self.labelled,
        )  # fmt: skip
        self._model, self._source, self._test = opened.model.eval(), opened.train, opened.test
        self.data_notes = opened.notes
        self._augmentation, self._seed = augmentation, seed
        labels = self._source.labels()
        order = stratified_order(len(self._source), labels, seeded(seed))
        self._test_indices = torch.arange(len(self._test))
        self._validation = self._test if opened.validation is None else opened.validation
        self._train_indices = order
        if opened.validation is not None:
            self._validation_indices = self._held_out_order(self._validation)
        elif validation_fraction is None and len(self._test) >= 2 * _FEWEST_HELD_OUT:
            shuffled = self._held_out_order(self._test)
            self._validation_indices = shuffled[: len(shuffled) // 2]
            self._test_indices = shuffled[len(shuffled) // 2 :].sort().values
            self.data_notes += (_halves(self._validation_indices, self._test_indices),)
        else:
            held = max(1, round((validation_fraction or _VALIDATION_FRACTION) * len(order)))
            self._validation = self._source
            self._validation_indices, self._train_indices = order[:held], order[held:]
            if validation_fraction is None:
                self.data_notes += (_SEEN.format(held=held),)
        if len(self._train_indices) < 2:
            raise ConfigError(f"Task {name!r}: {len(order)} training samples are too few to split.")
        self._calibration_indices = covering_prefix(self._train_indices, labels, calibration_size)
        self._check_outputs(self._run_model())

    def model(self) -> nn.Module:
        """Return a fresh copy of the trained, uncompressed model in eval mode; the caller owns it."""
        return copy.deepcopy(self._model)

    def example_inputs(self, batch_size: int = 1) -> Tensor:
        """Return the first `batch_size` calibration samples, repeated where there are fewer."""
        indices = self._calibration_indices.repeat(math.ceil(batch_size / len(self._calibration_indices)))
        return next(self._source.batches(indices[:batch_size], batch_size))[0]

    def calibration(self, batch_size: int) -> Iterator[Tensor]:
        """Yield inputs ``(N, ...)`` of the calibration samples, without augmentation."""
        for inputs, _ in self._source.batches(self._calibration_indices, batch_size):
            yield inputs

    def train_batches(self, batch_size: int, epoch: int) -> Iterator[Batch]:
        """Yield shuffled, augmented training batches; a short last batch is dropped.

        Raises:
            ConfigError: `batch_size` is below 2.
        """
        if batch_size < 2:
            raise ConfigError(f"Training needs batches of at least 2 samples (batch-norm), found {batch_size}.")
        generator = seeded(self._seed, 1, epoch)
        indices = self._train_indices[torch.randperm(len(self._train_indices), generator=generator)]
        last = len(indices) % batch_size
        if len(indices) > batch_size and last < max(2, _SMALLEST_LAST_BATCH * batch_size):
            indices = indices[: len(indices) - last]
        return self._source.batches(indices, batch_size, augmentation=self._augmentation, generator=generator)

    def train_size(self) -> int:
        """Return the number of training samples in one epoch, before a short last batch is dropped."""
        return len(self._train_indices)

    def validation(self, batch_size: int) -> Iterator[Batch]:
        """Yield the validation data in a stratified random order: any first part of them stands for all."""
        return self._validation.batches(self._validation_indices, batch_size)

    def validation_size(self) -> int:
        """Return the number of validation samples."""
        return len(self._validation_indices)

    def test(self, batch_size: int) -> Iterator[Batch]:
        """Yield the test data in order. Read once per run, after every choice has been made."""
        return self._test.batches(self._test_indices, batch_size)

    def test_size(self) -> int | None:
        """Return the number of test samples."""
        return len(self._test_indices)

    def known_targets(self) -> dict[str, Tensor]:
        """Return the targets ``(n,)`` by data set (train, validation, calibration, test) that no reading is needed for.

        They are in the order in which `calibration`, `validation` and `test` yield their samples.
        """
        found = {}
        for split, samples, indices in self._parts():
            targets = samples.targets_known()
            if targets is not None:
                found[split] = targets[indices]
        return found

    def sample_name(self, split: str, position: int) -> str:
        """Return what the user knows a sample by: ``"calibration sample 3 (number 1041 of the training data)"``.

        Args:
            split: ``"calibration"``, ``"validation"`` or ``"test"``.
            position: Where this split yields it.
        """
        index = next(int(indices[position]) for name, _, indices in self._parts() if name == split)
        source = next(samples for name, samples, _ in self._parts() if name == split)
        data = "training" if source is self._source else "test" if source is self._test else split
        return f"{split} sample {position} (number {index} of the {data} data)"

    def _held_out_order(self, samples: Samples) -> Tensor:
        return stratified_order(len(samples), samples.labels(), seeded(self._seed, 2))

    def _parts(self) -> tuple[tuple[str, Samples, Tensor], ...]:
        return (
            ("train", self._source, self._train_indices),
            ("calibration", self._source, self._calibration_indices),
            ("validation", self._validation, self._validation_indices),
            ("test", self._test, self._test_indices),
        )

    def fingerprint(self) -> Mapping[str, str | int | float]:
        """Return what identifies model, weights, data and split."""
        return {
            "task": self.name,
            "model": type(self._model).__name__,
            "weights_sha256": _digest(self._model),
            "train": len(self._train_indices),
            "calibration": len(self._calibration_indices),
            "validation": len(self._validation_indices),
            "test": len(self._test_indices),
            "data_sha256": hashlib.sha256(
                "".join(s.digest() for s in (self._source, self._validation, self._test)).encode()
            ).hexdigest(),
            "seed": self._seed,
            "split": "stratified",
        }

    def _run_model(self) -> object:
        """Return what the model gives for one sample."""
        inputs = self.example_inputs()
        try:
            with torch.inference_mode():
                return self._model(inputs)
        except Exception as error:  # whatever the user's network raises
            raise ConfigError(
                f"Task {self.name!r}: model {type(self._model).__name__} does not take inputs {tuple(inputs.shape)}: "
                f"{error}"
            ) from error

    @abc.abstractmethod
    def _check_outputs(self, outputs: object) -> None:
        """Check what the model gives for one sample.

        Raises:
            ConfigError: The metric has no use for it.
        """


_SEEN = (
    "{held:,} of the training samples are for validation: where the weights were trained on them, candidates lose more "
    "there than elsewhere (give validation data that they have not seen)"
)


def _halves(validation: Tensor, test: Tensor) -> str:
    return (
        f"{len(validation):,} of the {len(validation) + len(test):,} test samples are for validation, the other "
        f"{len(test):,} are tested on (validation data of your own, or task.validation_fraction of the training data, "
        "leave them whole)"
    )


def _digest(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
