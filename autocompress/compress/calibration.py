"""Calibration methods by name. Those of `calibrations` are found by themselves."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module

from autocompress.compress import calibrations
from autocompress.compress.calibrations.base import Calibration
from autocompress.config import QuantizationConfig
from autocompress.errors import ConfigError, nearest


def _found() -> Iterator[tuple[str, Callable[[QuantizationConfig], Calibration]]]:
    for info in pkgutil.iter_modules(calibrations.__path__, f"{calibrations.__name__}."):
        yield from getattr(import_module(info.name), "CALIBRATIONS", {}).items()


# Name of a method to what makes one.
CALIBRATIONS: Mapping[str, Callable[[QuantizationConfig], Calibration]] = dict(_found())


def calibration(config: QuantizationConfig) -> Calibration:
    """Return the method that a run file asks for.

    Raises:
        ConfigError: It is no key of `CALIBRATIONS`.
    """
    if config.calibration not in CALIBRATIONS:
        raise ConfigError(f"Unknown calibration {config.calibration!r}.{nearest(config.calibration, CALIBRATIONS)}")
    return CALIBRATIONS[config.calibration](config)
