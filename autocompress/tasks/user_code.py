"""What ``module:factory`` names: the user's own function, imported and called. Owns every error on the way."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from autocompress.config import TaskConfig
from autocompress.errors import AutoCompressError, ConfigError


def from_user(where: str, name: str, config: TaskConfig, *, returns: str, given: Sequence[str] = ()) -> object:
    """Return what the user's factory gives.

    Args:
        where: Who asks, for messages: ``"Task 'my_task:make'"``.
        name: ``"module:factory"``; looked for in the working directory, too.
        config: The factory's one argument, if it takes one.
        returns: What it is to return, for messages.
        given: Keys of `config` that were set, which a factory without arguments cannot see.

    Raises:
        ConfigError: There is no such factory, it raised, or it cannot see what was given.
    """
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise ConfigError(f"{where} must be written module:factory, such as my_task:make.")
    factory = _imported(where, module_name, attribute)
    if not callable(factory):
        raise ConfigError(
            f"{where}: {attribute!r} in module {module_name!r} is a {type(factory).__name__}, not a callable that "
            f"returns a {returns}."
        )
    takes_config = _takes_argument(factory)
    if given and not takes_config:
        raise ConfigError(
            f"{where}: {', '.join(given)} given, but {attribute!r} in module {module_name!r} takes no argument. "
            "Remove them, or let it take one parameter, the TaskConfig."
        )
    try:
        return factory(config) if takes_config else factory()
    except AutoCompressError:
        raise
    except (Exception, SystemExit) as error:  # the user's code
        raise ConfigError(
            f"{where}: calling {attribute!r} of module {module_name!r} raised {type(error).__name__}: {error}"
        ) from error


def _imported(where: str, module_name: str, attribute: str) -> object:
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)  # as `python -m` does
    try:
        return getattr(importlib.import_module(module_name), attribute)
    except AutoCompressError:
        raise
    except ModuleNotFoundError as error:
        hint = f"; looked in {here} and the installed packages" if error.name == module_name else ""
        raise ConfigError(f"{where}: module {module_name!r} cannot be imported: {error}{hint}.") from error
    except AttributeError as error:
        raise ConfigError(f"{where}: module {module_name!r} has no attribute {attribute!r} ({error}).") from error
    except (Exception, SystemExit) as error:  # importing runs the user's code
        raise ConfigError(
            f"{where}: importing module {module_name!r} raised {type(error).__name__}: {error}"
        ) from error


def _takes_argument(factory: Callable[..., object]) -> bool:
    try:
        parameters = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError):
        return False
    return any(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.default is p.empty for p in parameters)
