"""`ClassificationTask`: a trained classifier, its data and top-1 accuracy."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from autocompress.errors import ConfigError
from autocompress.tasks.base import Task
from autocompress.tasks.split import Data, SplitTask


class ClassificationTask(SplitTask):
    """A classifier, ``(N, ...)`` to logits ``(N, classes)``, with training and test data.

    Arguments are those of `SplitTask`.

    Raises:
        ConfigError: Data cannot be used or split, the model does not take them, or they have more classes.
    """

    classes: int
    metric_name = "accuracy"
    metric_is_share = True

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        # A metric of the user's own is not called accuracy.
        if "metric" in vars(cls):
            cls.metric_name = vars(cls).get("metric_name", Task.metric_name)
            cls.metric_is_share = vars(cls).get("metric_is_share", Task.metric_is_share)

    def __init__(
        self,
        model: nn.Module,
        train: Data,
        test: Data,
        validation: Data | None = None,
        *,
        name: str = "classification",
        **options: Any,
    ) -> None:
        super().__init__(model, train, test, validation, name=name, **options)

    def metric(self, outputs: Tensor, targets: Tensor) -> float:
        """Return top-1 accuracy of logits ``(N, classes)`` for classes ``(N,)``."""
        return float((outputs.argmax(1) == targets).double().mean())

    def _check_outputs(self, outputs: object) -> None:
        if not isinstance(outputs, Tensor) or outputs.ndim != 2:
            found = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
            raise ConfigError(
                f"Task {self.name!r}: model {type(self._model).__name__} must return logits (N, classes), "
                f"found {found}."
            )
        classes = outputs.shape[1]
        largest = [s.largest_target() for s in (self._source, self._validation, self._test)]
        seen = 1 + max((target for target in largest if target is not None), default=0)
        known = [t for s in (self._source, self._validation, self._test) if (t := s.targets_known()) is not None]
        if seen == classes + 1 and known and min(int(targets.min()) for targets in known) == 1:
            raise ConfigError(
                f"Task {self.name!r}: labels run from 1 to {classes}, but the classes of model "
                f"{type(self._model).__name__} count from 0 to {classes - 1}. Subtract 1 from the labels."
            )
        if seen > classes:
            raise ConfigError(
                f"Task {self.name!r}: the data have {seen} classes but model {type(self._model).__name__} tells only "
                f"{classes} apart. Use weights trained on these classes."
            )
        self.classes = classes
