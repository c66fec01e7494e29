"""The ``digits`` task: scikit-learn's 1,797 handwritten digits and a small network trained on this machine once.

It needs no download and no options, so that every part of the package can be tried and tested anywhere.
"""

from __future__ import annotations

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional

from autocompress._optional import optional
from autocompress.config import TaskConfig
from autocompress.environment import cache_directory
from autocompress.errors import ConfigError
from autocompress.tasks.augmentation import Augmentation
from autocompress.tasks.base import Task
from autocompress.tasks.cache import store
from autocompress.tasks.classification import ClassificationTask
from autocompress.tasks.progress import Bar
from autocompress.tasks.samples import Normalization, TensorSamples, seeded
from autocompress.tasks.weights import load_weights

_RECIPE = 1  # raised when data, network or training change; names the cached weights
_SIDE = 32  # pixels; the originals are 8x8
_HELD_OUT = 360  # samples each for validation and test, a fifth
_NORMALIZATION = Normalization((0.305,), (0.324,))
# No flip: a mirrored digit is another sign.
_AUGMENTATION = Augmentation(padding=3, flip=False)
_EPOCHS, _BATCH_SIZE, _LEARNING_RATE, _WEIGHT_DECAY = 4, 32, 0.1, 5e-4

Split = tuple[Tensor, Tensor]


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions and an identity shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(N, C, H, W)``."""
        out = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.bn2(self.conv2(out)) + x)


class DigitsNet(nn.Module):
    """Six 3x3 convolutions of 64, 128 and 256 channels: far wider than digits need, to leave room."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *_convolution(1, 64),
            nn.MaxPool2d(2),
            *_convolution(64, 128),
            ResidualBlock(128),
            nn.MaxPool2d(2),
            *_convolution(128, 256),
            *_convolution(256, 256),
            nn.AdaptiveAvgPool2d(1),
        )
        self.classifier = nn.Linear(256, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``(N, classes)`` of images ``(N, 1, 32, 32)``."""
        return self.classifier(self.features(x).flatten(1))  # type: ignore[no-any-return]


def digits(config: TaskConfig) -> Task:
    """Return the digits task; the first call trains the network and keeps it in the cache directory.

    Train, validation (360) and test (360) are fixed and stratified, and the network has seen only the first, so
    `TaskConfig.validation_fraction` is not used.

    Raises:
        ConfigError: Options that only other tasks have are set.
    """
    unused = [f"task.{key}" for key in ("model", "weights", "data") if getattr(config, key) is not None]
    if unused:
        raise ConfigError(
            f"Task digits has its own model, weights and data, but {', '.join(unused)} given. Remove them, or name "
            "another task."
        )
    train, validation, test = digits_data()
    return ClassificationTask(
        _trained(train, config.seed),
        train,
        test,
        validation,
        name="digits",
        normalization=_NORMALIZATION,
        augmentation=_AUGMENTATION,
        calibration_size=config.calibration_size,
        seed=config.seed,
    )


def digits_data() -> tuple[Split, Split, Split]:
    """Return train, validation and test ``(images uint8 (N, 1, 32, 32), classes (N,))``; always the same split."""
    datasets = optional("sklearn.datasets", "digits", "Task 'digits'")
    split = optional("sklearn.model_selection", "digits", "Task 'digits'").train_test_split

    stored = datasets.load_digits()
    targets = torch.tensor(stored.target)
    small = torch.tensor(stored.images / 16, dtype=torch.float32)[:, None]
    images = functional.interpolate(small, size=_SIDE, mode="bilinear", align_corners=False)
    images = (images * 255).round().to(torch.uint8)

    every = np.arange(len(targets))
    rest, test = split(every, test_size=_HELD_OUT, stratify=stored.target, random_state=0)
    train, validation = split(rest, test_size=_HELD_OUT, stratify=stored.target[rest], random_state=0)
    first, second, third = ((images[np.sort(part)], targets[np.sort(part)]) for part in (train, validation, test))
    return first, second, third


def train_digits(train: Split, seed: int) -> DigitsNet:
    """Train the network from scratch; the same seed gives the same weights on one machine and thread count."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DigitsNet()
    model.to(memory_format=torch.channels_last)
    samples = TensorSamples(*train, _NORMALIZATION)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=_LEARNING_RATE, momentum=0.9, weight_decay=_WEIGHT_DECAY, nesterov=True
    )
    steps = _EPOCHS * (len(samples) // _BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LEARNING_RATE, total_steps=steps)
    # bf16 trains three times faster where the CPU multiplies it in hardware, and slower elsewhere.
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()  # newer than our oldest torch
    half = bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))
    with Bar("training the digits network (once)", steps) as bar:
        for epoch in range(_EPOCHS):
            generator = seeded(seed, epoch)
            order = torch.randperm(len(samples), generator=generator)[: steps // _EPOCHS * _BATCH_SIZE]
            for inputs, targets in samples.batches(order, _BATCH_SIZE, augmentation=_AUGMENTATION, generator=generator):
                with torch.autocast("cpu", torch.bfloat16, enabled=half):
                    outputs = model(inputs.contiguous(memory_format=torch.channels_last))
                loss = functional.cross_entropy(outputs.float(), targets)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
                bar.advance(1)
    return model.to(memory_format=torch.contiguous_format).eval()


def _trained(train: Split, seed: int) -> DigitsNet:
    name = f"digits-v{_RECIPE}-seed{seed}.safetensors"
    model = DigitsNet().eval()
    try:
        load_weights(model, cache_directory() / name)
    except ConfigError:  # absent, damaged, or from another recipe
        model = train_digits(train, seed)
        store(name, save(model.state_dict()))
    return model


def _convolution(in_channels: int, out_channels: int) -> tuple[nn.Module, nn.Module, nn.Module]:
    convolution = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
    return convolution, nn.BatchNorm2d(out_channels), nn.ReLU()
