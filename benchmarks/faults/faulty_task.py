"""A user's task of which one method goes wrong from one stage of a search on: what `user_tasks` searches with."""

from __future__ import annotations

import itertools
import os
import sys
import time
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from autocompress.measurement.protocol import Protocol
from autocompress.report.live import LiveObserver
from autocompress.tasks import Batch, Task

CLASSES, SIDE = 6, 8
# What goes wrong, in the environment: "<method>:<fault>:<beginning of a stage's name, empty for all>".
VARIABLE = "AUTOCOMPRESS_FAULT"


class _Stage:
    """The stage that the search has told of."""

    name = ""


def prepare() -> None:
    """Have this module know the search's stage, and cut timing short: what is searched for here is faults."""

    def brief(protocol: type[Protocol], **_: object) -> Protocol:
        return protocol(warm_up_s=0.01, min_iterations=20, min_seconds=0.05, max_seconds=0.1, rounds=5)

    for name in ("standard", "trial"):
        setattr(Protocol, name, classmethod(brief))
    own = LiveObserver.stage

    def stage(self: LiveObserver, text: str) -> None:
        _Stage.name = text
        own(self, text)

    LiveObserver.stage = stage  # type: ignore[method-assign]


def samples(count: int, seed: int) -> Batch:
    """Return noisy patterns ``(N, 1, 8, 8)``, one pattern a class."""
    patterns = torch.randn(CLASSES, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(count) % CLASSES
    return patterns[targets] + 1.2 * torch.randn(count, 1, SIDE, SIDE, generator=generator), targets


def network() -> nn.Sequential:
    """Return an untrained network."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(512, CLASSES),
    )  # fmt: skip


def trained() -> nn.Sequential:
    """Return a trained network: a second's work."""
    torch.manual_seed(0)
    model, (inputs, targets) = network(), samples(600, 1)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(40):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), targets).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return model.eval()


class FaultyTask(Task):
    """Blobs, one method of which does what `VARIABLE` says."""

    name, metric_name, metric_is_share = "faulty", "accuracy", True

    def __init__(self) -> None:
        self._method, self._fault, self._stage = os.environ.get(VARIABLE, "::").split(":")
        self._state = trained().state_dict()
        self._data = {"train": samples(600, 1), "validation": samples(300, 2), "test": samples(300, 3)}
        self._calls = itertools.count()

    def _wrong(self, method: str) -> str:
        """Return what goes wrong with this call; raise or hang where that is it."""
        if self._method != method or not _Stage.name.startswith(self._stage):
            return ""
        if self._fault == "raise":
            raise ValueError("the disk said no")
        if self._fault == "exit":
            sys.exit("no licence")
        if self._fault == "memory":
            raise MemoryError
        while self._fault == "hang":
            time.sleep(0.5)
        return self._fault

    def model(self) -> nn.Module:
        fault = self._wrong("model")
        model = network()
        if fault == "shape":
            return [model]  # type: ignore[return-value]
        if fault != "other":
            model.load_state_dict(self._state)
        if fault == "nan":
            nn.init.constant_(model[-1].bias, float("nan"))  # type: ignore[arg-type]
        return model.eval()

    def example_inputs(self, batch_size: int = 1) -> Tensor:
        fault, inputs = self._wrong("example_inputs"), self._data["validation"][0][:batch_size].clone()
        return self._inputs(fault, inputs)

    def _inputs(self, fault: str, inputs: Tensor) -> Tensor:
        if fault == "nan":
            inputs[min(3, len(inputs) - 1), 0, 2, 2] = float("nan")
        if fault == "shape":
            inputs = inputs[:, :, :5]
        if fault == "other":
            inputs = inputs + 0.5 * torch.randn(inputs.shape)
        return inputs

    def _batches(self, split: str, method: str, batch_size: int, epoch: int = -1) -> Iterator[Batch]:
        inputs, targets = self._data[split]
        if epoch >= 0:
            order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(epoch))
            inputs, targets = inputs[order], targets[order]
        for number, (x, y) in enumerate(zip(inputs.split(batch_size), targets.split(batch_size), strict=True)):
            # The first batch is read before it goes wrong, but for what every batch has.
            late = self._fault not in ("other", "nan") and number == 0 and len(inputs) > batch_size
            fault = "" if late else self._wrong(method)
            if fault == "shape" and method == "train_batches":
                # Any size of image is good for training; other numbers of inputs and targets are not.
                yield x, y[:-1]
            else:
                yield self._inputs(fault, x.clone()), y

    def calibration(self, batch_size: int) -> Iterator[Tensor]:
        for inputs, _ in self._batches("train", "calibration", min(batch_size, 128)):
            yield inputs

    def train_batches(self, batch_size: int, epoch: int) -> Iterator[Batch]:
        yield from self._batches("train", "train_batches", min(batch_size, 64), epoch)

    def train_size(self) -> int:
        fault = self._wrong("train_size")
        return -5 if fault == "shape" else 600

    def validation(self, batch_size: int) -> Iterator[Batch]:
        return self._batches("validation", "validation", min(batch_size, 64))

    def test(self, batch_size: int) -> Iterator[Batch]:
        return self._batches("test", "test", min(batch_size, 64))

    def metric(self, outputs: Tensor, targets: Tensor) -> float:
        fault = self._wrong("metric")
        right = (outputs.argmax(1) == targets).float()
        if fault == "nan":
            return float("nan")
        if fault == "shape":
            return right  # type: ignore[return-value]
        if fault == "percent":
            return float(100 * right.mean())
        if fault == "negative":
            return float(right.mean()) - 1.77
        if fault == "other":
            return float(torch.rand(()))
        return float(right.mean())

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        fault = self._wrong("loss")
        if fault == "shape":
            return nn.functional.cross_entropy(outputs, targets, reduction="none")
        found = nn.functional.cross_entropy(outputs, targets)
        return found * float("nan") if fault == "nan" else found.detach() if fault == "detached" else found

    def fingerprint(self) -> Mapping[str, str | int | float]:
        fault = self._wrong("fingerprint")
        if fault == "shape":
            return 3  # type: ignore[return-value]
        return {"task": "faulty", **({"call": next(self._calls)} if fault == "other" else {})}


class OwnDivergence(FaultyTask):
    """The same with a divergence of its own."""

    def divergence(self, outputs: Tensor, reference: Tensor) -> Tensor:
        fault = self._wrong("divergence")
        moved = (outputs - reference).square().mean(1)
        if fault == "shape":
            return moved
        return moved.mean() * float("nan") if fault == "nan" else moved.mean()


class _Tied(nn.Module):
    """A network of tokens' kind: what is embedded and what is scored share a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 64)
        self.second = nn.Linear(64, 64)
        self.second.weight = self.first.weight
        self.last = nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.second(torch.relu(self.first(x.flatten(1)))))
        out: Tensor = self.last(x)
        return out


class TiedTask(FaultyTask):
    """Two layers share one weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self._tied, (inputs, targets) = _Tied(), samples(600, 1)
        optimizer = torch.optim.Adam(self._tied.parameters(), 3e-3)
        for _ in range(60):
            optimizer.zero_grad()
            nn.functional.cross_entropy(self._tied(inputs), targets).backward()  # type: ignore[no-untyped-call]
            optimizer.step()

    def model(self) -> nn.Module:
        return self._tied.eval()


def make() -> Task:
    """Return the task that the environment asks for."""
    method = os.environ.get(VARIABLE, "::").split(":")[0]
    return TiedTask() if method == "tied" else OwnDivergence() if method == "divergence" else FaultyTask()
