"""A task of tensors in memory with a metric and a loss of its own, and the cache of what a script has drawn."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from autocompress import Task
from autocompress.config import TaskConfig
from autocompress.tasks import Batch
from benchmarks.strangers.networks import CACHE
from benchmarks.strangers.tasks.trained import as_float

Arrays = dict[str, tuple[Tensor, Tensor]]
# Training samples that set ranges and statistics.
_CALIBRATION = 512


def drawn(
    name: str, config: TaskConfig, make: Callable[[str, int], tuple[Tensor, Tensor]], sizes: tuple[int, int, int]
) -> Arrays:
    """Return the inputs and targets of train, validation and test, read from the cache or drawn now.

    Args:
        name: Of the data, with their version.
        config: Its `weights` is the cache's folder.
        make: Draws a part: of its name and number of samples.
        sizes: Samples of train, validation and test.
    """
    file = Path(config.weights or CACHE) / f"{name}-{'-'.join(map(str, sizes))}.data.safetensors"
    names = ("train", "validation", "test")
    if not file.exists():
        arrays = {}
        for part, n in zip(names, sizes, strict=True):
            inputs, targets = make(part, n)
            arrays |= {f"{part}.inputs": inputs.contiguous(), f"{part}.targets": targets.contiguous()}
        file.parent.mkdir(parents=True, exist_ok=True)
        fresh = file.with_suffix(".new")
        save_file(arrays, fresh)
        fresh.replace(file)
    arrays = load_file(file)
    return {part: (arrays[f"{part}.inputs"], arrays[f"{part}.targets"]) for part in names}


class ArrayTask(Task):
    """A trained network with tensors, a metric and a loss.

    Args:
        name: For tables.
        model: Trained, in eval mode; kept, never changed.
        arrays: ``train``, ``validation`` and ``test``: inputs ``(N, ...)``, 8-bit ones are read as 0..1, and targets.
        metric: Of all outputs and targets, in [0, 1]; higher is better.
        loss: Of a batch's outputs and targets.
        outputs: What kind the outputs are; see `Task.outputs`.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        arrays: Arrays,
        metric: Callable[[Tensor, Tensor], float],
        loss: Callable[[Tensor, Tensor], Tensor],
        *,
        outputs: str,
    ) -> None:
        self.name, self.outputs = name, outputs
        self._model, self._arrays = copy.deepcopy(model).eval(), arrays
        self._metric, self._loss = metric, loss

    def model(self) -> nn.Module:
        """See `Task.model`."""
        return copy.deepcopy(self._model)

    def example_inputs(self, batch_size: int = 1) -> Tensor:
        """See `Task.example_inputs`."""
        return as_float(self._arrays["train"][0][:batch_size])

    def calibration(self, batch_size: int) -> Iterator[Tensor]:
        """See `Task.calibration`."""
        for inputs in self._arrays["train"][0][:_CALIBRATION].split(batch_size):
            yield as_float(inputs)

    def train_batches(self, batch_size: int, epoch: int) -> Iterator[Batch]:
        """See `Task.train_batches`; a short last batch is left out."""
        inputs, targets = self._arrays["train"]
        order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(epoch))
        for chosen in order.split(batch_size):
            if len(chosen) == min(batch_size, len(inputs)):
                yield as_float(inputs[chosen]), targets[chosen]

    def train_size(self) -> int:
        """See `Task.train_size`."""
        return len(self._arrays["train"][0])

    def validation(self, batch_size: int) -> Iterator[Batch]:
        """See `Task.validation`."""
        return self._in_order("validation", batch_size)

    def test(self, batch_size: int) -> Iterator[Batch]:
        """See `Task.test`."""
        return self._in_order("test", batch_size)

    def metric(self, outputs: Tensor, targets: Tensor) -> float:
        """See `Task.metric`."""
        return self._metric(outputs, targets)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """See `Task.loss`."""
        return self._loss(outputs, targets)

    def fingerprint(self) -> Mapping[str, str | int | float]:
        """See `Task.fingerprint`."""
        digest = hashlib.sha256()
        for key, value in sorted(self._model.state_dict().items()):
            digest.update(key.encode() + value.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return {"task": self.name, "weights_sha256": digest.hexdigest(), "train": self.train_size()}

    def _in_order(self, part: str, batch_size: int) -> Iterator[Batch]:
        inputs, targets = self._arrays[part]
        for one, other in zip(inputs.split(batch_size), targets.split(batch_size), strict=True):
            yield as_float(one), other
