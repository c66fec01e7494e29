"""What is compressed and how good it is: model, data and metric, by name or from the user's own module."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from autocompress._optional import optional
from autocompress.config import TaskConfig
from autocompress.errors import ConfigError, nearest
from autocompress.tasks.adapters import Adapter, InputSpec, pack
from autocompress.tasks.augmentation import Augmentation
from autocompress.tasks.base import Batch, Task
from autocompress.tasks.checks import check_task
from autocompress.tasks.cifar_models import OptionAShortcut
from autocompress.tasks.classification import ClassificationTask
from autocompress.tasks.divergence import check_kind
from autocompress.tasks.guard import guarded
from autocompress.tasks.label_free import LabelFreeTask, UnlabelledTask
from autocompress.tasks.samples import DatasetSamples, Normalization, Samples, TensorSamples
from autocompress.tasks.user_code import from_user
from autocompress.tasks.weights import load_weights

__all__ = [
    "Adapter",
    "Augmentation",
    "Batch",
    "ClassificationTask",
    "DatasetSamples",
    "InputSpec",
    "LabelFreeTask",
    "Normalization",
    "OptionAShortcut",
    "Samples",
    "Task",
    "TensorSamples",
    "UnlabelledTask",
    "check_task",
    "load_task",
    "load_weights",
    "measured_by",
    "pack",
]

# Name to "module:factory"; a factory takes the TaskConfig.
_TASKS = {"cifar10": "autocompress.tasks.cifar:cifar10", "digits": "autocompress.tasks.digits:digits"}
# What is before the colon to the package, its extra and "module:factory"; a factory takes the TaskConfig and the rest.
_LIBRARIES = {
    "torchvision": ("torchvision", "vision", "autocompress.tasks.vision:torchvision_task"),
    "timm": ("timm", "timm", "autocompress.tasks.timm_models:timm_task"),
    "transformers": ("transformers", "transformers", "autocompress.tasks.text:transformers_task"),
}
_FORMS = ("torchvision:<model>", "timm:<model>", "transformers:<folder>", "<module>:<factory>")


def load_task(config: TaskConfig) -> Task:
    """Return the task a run file names.

    ``digits`` and ``cifar10`` are built in, ``torchvision:<model>``, ``timm:<model>`` and ``transformers:<folder>``
    take the models of these libraries, and ``package.module:factory`` calls the user's own factory, with the
    `TaskConfig` if it takes an argument. `TaskConfig.outputs` stands in for the task's own `Task.outputs`. With
    `TaskConfig.metric`, labels are not looked at: see `LabelFreeTask`.

    Raises:
        ConfigError: The name is unknown, or model, weights or data cannot be used.
    """
    task = _named(config)
    if config.outputs is not None:
        for kind in (config.outputs,) if isinstance(config.outputs, str) else config.outputs.values():
            check_kind(kind, "task.outputs")
        task.outputs = config.outputs
    return measured_by(config.metric, task)


def measured_by(metric: str | None, task: Task) -> Task:
    """Return `task` measured by a metric of `label_free`; itself for None, or when it is so already."""
    # The metric asks the user's model from the start.
    return task if metric is None or isinstance(task, LabelFreeTask) else LabelFreeTask(guarded(task), metric)


def _named(config: TaskConfig) -> Task:
    prefix, separator, rest = config.name.partition(":")
    if prefix in _LIBRARIES and separator:
        package, extra, place = _LIBRARIES[prefix]
        optional(package, extra, f"Task {config.name!r}")
        module, _, name = place.partition(":")
        make: Callable[[TaskConfig, str], Task] = getattr(importlib.import_module(module), name)
        return make(config, rest)
    if separator:
        return _user_task(config, config.name)
    if config.name not in _TASKS:
        raise ConfigError(f"Unknown task {config.name!r}.{nearest(config.name, (*_TASKS, *_FORMS))}")
    module, _, name = _TASKS[config.name].partition(":")
    factory: Callable[[TaskConfig], Task] = getattr(importlib.import_module(module), name)
    return factory(config)


def _user_task(config: TaskConfig, name: str) -> Task:
    where = f"Task {name!r}"
    given = [f"task.{key}" for key in ("model", "weights", "data") if getattr(config, key) is not None]
    task = from_user(where, name, config, given=given, returns="Task")
    if not isinstance(task, Task):
        raise ConfigError(
            f"{where}: {name.partition(':')[2]!r} in module {name.partition(':')[0]!r} returned a "
            f"{type(task).__name__}, not a Task. Return a ClassificationTask or your own subclass of Task."
        )
    return task
