"""Optional dependencies, imported when first used, with an error that names the extra to install."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from autocompress.errors import MissingDependencyError


def optional(module: str, extra: str, what: str) -> ModuleType:
    """Import `module`.

    Raises:
        MissingDependencyError: It is not installed; the message names the extra.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise MissingDependencyError(
            f"{what} needs the package {module.partition('.')[0]!r}, which cannot be imported ({error}). "
            f"Install it with: pip install 'autocompress[{extra}]'"
        ) from error
