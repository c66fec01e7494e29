"""From a run directory to a folder that ships: packaged, described by a manifest, and verified from disk."""

from __future__ import annotations

__all__: list[str] = []
