"""The ``torchvision:<model>`` tasks: any torchvision classifier, segmentation network or one-stage detector."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torchvision
from PIL import Image
from torch import nn

from autocompress.config import TaskConfig
from autocompress.errors import ConfigError, nearest
from autocompress.tasks.adapters import Adapter, DetectorNetwork
from autocompress.tasks.base import Task
from autocompress.tasks.image_task import RANDOM, ImageModel, image_task, load_file
from autocompress.tasks.images import Preprocess
from autocompress.tasks.samples import IMAGENET, Normalization
from autocompress.tasks.weights import apply_weights, read_weights

# Their builders warn about slow initialisation and return auxiliary outputs in training unless told otherwise.
_WITHOUT_AUXILIARY = {
    "googlenet": {"init_weights": False, "aux_logits": False},
    "inception_v3": {"init_weights": False, "aux_logits": False},
}
_NO_AUXILIARY = {"aux_logits": False, "aux1": None, "aux2": None, "AuxLogits": None}
_AUXILIARY_KEYS = ("aux1.", "aux2.", "AuxLogits.", "aux_classifier.")
_SEGMENTED = "out"  # what torchvision calls the main output


def torchvision_task(config: TaskConfig, name: str) -> Task:
    """Return a torchvision model with its data.

    Segmentation networks give ``(N, classes, H, W)`` and one-stage detectors ``(N, anchors, ...)``, before boxes are
    chosen; there are no labels for either here, and `TaskConfig.metric` measures them.

    Raises:
        ConfigError: The model is unknown, weights or data are missing or cannot be used, or their classes differ.
    """
    models = torchvision.models
    known = models.list_models(module=models)
    others = {
        **dict.fromkeys(models.list_models(module=models.segmentation), _segmenter),
        **dict.fromkeys(models.list_models(module=models.detection), _detector),
    }
    if name in others:
        return image_task(config, others[name](name))
    if name not in known:
        raise ConfigError(
            f"Task {config.name!r}: unknown torchvision model {name!r}.{nearest(name, (*known, *others))}"
        )
    preprocess, normalization = _transforms(name, config.weights or RANDOM)
    return image_task(
        config,
        ImageModel(
            f"torchvision-{name}", preprocess, normalization, partial(build_model, name), partial(_with_weights, name),
            tuple(_published(name).__members__),
        ),
    )  # fmt: skip


def _published(name: str) -> Any:
    return torchvision.models.get_model_weights(name)


def _transforms(name: str, weights: str) -> tuple[Preprocess, Normalization]:
    """Return the preprocessing of the named weights; of the model's first ones where weights are the user's."""
    published = _published(name).__members__
    chosen = published.get(weights) or next(iter(published.values()), None)
    if chosen is None:
        return Preprocess(crop=224, resize=256), IMAGENET
    transforms = chosen.transforms()
    resample = Image.Resampling[transforms.interpolation.name]
    preprocess = Preprocess(int(transforms.crop_size[0]), int(transforms.resize_size[0]), int(resample))
    return preprocess, Normalization(tuple(transforms.mean), tuple(transforms.std))


def build_model(name: str, classes: int) -> nn.Module:
    """Return a torchvision classifier with random weights.

    Raises:
        ConfigError: There is no such classifier.
    """
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise ConfigError(f"Unknown torchvision classifier {name!r}.{nearest(name, known)}")
    model: nn.Module = torchvision.models.get_model(
        name, weights=None, num_classes=classes, **_WITHOUT_AUXILIARY.get(name, {})
    )
    return model


def _with_weights(name: str, weights: str) -> nn.Module:
    published = _published(name).__members__
    if weights in published:
        try:
            model: nn.Module = torchvision.models.get_model(name, weights=published[weights])
        except (OSError, RuntimeError) as error:
            raise ConfigError(
                f"torchvision cannot fetch the weights {weights!r} of {name}: {error}. Fetch them on a machine with a "
                "network, save them with safetensors.torch.save_file, and pass that file as task.weights."
            ) from error
        for attribute, value in _NO_AUXILIARY.items():
            if hasattr(model, attribute):
                setattr(model, attribute, value)
        return model
    if not Path(weights).expanduser().exists():
        raise ConfigError(
            f"task.weights {weights!r} is neither a file nor weights of {name}.{nearest(weights, (*published, RANDOM))}"
        )
    return load_file(partial(build_model, name), weights, _AUXILIARY_KEYS)


# -- segmentation and detection ---------------------------------------------------------------------------------------


def _segmenter(name: str) -> ImageModel:
    transforms = next(iter(_published(name))).transforms()
    side = int(transforms.resize_size[0])

    def build(_: int = 0) -> nn.Module:
        network = torchvision.models.get_model(name, weights=None, weights_backbone=None, aux_loss=False)
        return Adapter(network, keep=(_SEGMENTED,))

    normalization = Normalization(tuple(transforms.mean), tuple(transforms.std))
    return ImageModel(
        f"torchvision-{name}", Preprocess(side, side), normalization, build, partial(_into, build), outputs="classes"
    )


def _detector(name: str) -> ImageModel:
    def make() -> nn.Module:
        network: nn.Module = torchvision.models.get_model(name, weights=None, weights_backbone=None)
        return network

    def build(_: int = 0) -> nn.Module:
        return DetectorNetwork(make())

    transform: Any = make().get_submodule("transform")
    side = int(transform.min_size[-1])
    normalization = Normalization(tuple(transform.image_mean), tuple(transform.image_std))
    return ImageModel(
        f"torchvision-{name}", Preprocess(side, side), normalization, build, partial(_into, build), outputs="values"
    )


def _into(build: Any, weights: str) -> nn.Module:
    """Return an adapted network with a safetensors file of the whole torchvision model's weights."""
    network: nn.Module = build()
    own = {key.removeprefix("model."): key for key in network.state_dict()}
    state = read_weights(weights)
    apply_weights(network, {own.get(k, k): v for k, v in state.items() if not k.startswith(_AUXILIARY_KEYS)}, weights)
    return network
