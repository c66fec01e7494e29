"""The search: what may be chosen, which choices to try, which results count.

The package is called as the function of the same name: ``autocompress.search(...)`` finds `api.search` until something
imports this package, from then on Python puts the package in that place.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any


class _Search(ModuleType):
    def __call__(self, *args: Any, **options: Any) -> Any:
        """See `autocompress.api.search`."""
        return import_module("autocompress.api").search(*args, **options)


sys.modules[__name__].__class__ = _Search
