"""Objects with `train_dataloader`, as Lightning's data modules are; Lightning itself is not needed."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from autocompress.errors import ConfigError

_STAGES = {"train": "fit", "validation": "fit", "test": "test"}
_LOADERS = {
    "train": ("train_dataloader",),
    "validation": ("val_dataloader",),
    "test": ("test_dataloader", "val_dataloader"),
}
# Packages whose base classes have all these methods, which raise or return None unless overridden.
_BASES = ("lightning", "pytorch_lightning", "lightning_fabric")


def is_data_module(data: object) -> bool:
    """Return whether data are a module that gives loaders."""
    return callable(getattr(data, "train_dataloader", None))


class DataModule:
    """Loaders of a user's data module, prepared once and set up once per stage.

    Args:
        module: Has `train_dataloader`; `prepare_data` and `setup` are called where they exist.
    """

    def __init__(self, module: Any) -> None:
        self._module = module
        self._done: set[str] = set()
        self._loaders: dict[str, tuple[str, Any]] = {}

    @property
    def name(self) -> str:
        """Class of the user's module."""
        return type(self._module).__name__

    def has(self, method: str) -> bool:
        """Return whether the module has a method of its own by this name."""
        if not callable(getattr(self._module, method, None)):
            return False
        if method in getattr(self._module, "__dict__", {}):  # as LightningDataModule.from_datasets sets them
            return True
        place = getattr(getattr(type(self._module), method, None), "__module__", "") or ""
        return place.partition(".")[0] not in _BASES

    def loader(self, split: str) -> tuple[str, Any]:
        """Return the loader of a data set and the name of the method that gave it.

        Args:
            split: ``"train"``, ``"validation"`` or ``"test"``; without `test_dataloader` the last is validation's.

        Raises:
            ConfigError: The module has no loader for it, several, or raises.
        """
        if split not in self._loaders:
            self._loaders[split] = self._load(split)
        return self._loaders[split]

    def _load(self, split: str) -> tuple[str, Any]:
        if "prepare" not in self._done and self.has("prepare_data"):
            self._call("prepare_data", self._module.prepare_data)
        self._done.add("prepare")
        for method in _LOADERS[split]:
            if not self.has(method):
                continue
            self._set_up(_STAGES[split] if method == _LOADERS[split][0] else "fit")
            try:
                loader = self._call(method, getattr(self._module, method))
            except NotImplementedError:
                continue
            if isinstance(loader, (list, tuple)) and len(loader) > 1:
                raise ConfigError(
                    f"{self.name}.{method}() gives {len(loader)} loaders. Give the one that counts: "
                    f"module.{method}()[0]."
                )
            loader = loader[0] if isinstance(loader, (list, tuple)) and loader else loader
            if loader is not None and not isinstance(loader, (list, tuple)):
                return method, loader
        wanted = " nor ".join(_LOADERS[split])
        raise ConfigError(
            f"data module {self.name} has {'neither ' if len(_LOADERS[split]) > 1 else 'no '}{wanted} that gives a "
            f"loader. Write one, or give {split}= as a dataset."
        )

    def _set_up(self, stage: str) -> None:
        if stage in self._done or not self.has("setup"):
            return
        self._done.add(stage)
        setup = self._module.setup
        takes = inspect.signature(setup).parameters
        self._call(f"setup({stage!r})", (lambda: setup(stage)) if takes else setup)

    def _call(self, what: str, method: Callable[[], Any]) -> Any:
        try:
            return method()
        except (ConfigError, NotImplementedError):
            raise
        except Exception as error:  # the user's code
            raise ConfigError(f"data module {self.name}: {what} raised {type(error).__name__}: {error}.") from error
