"""What a person reads of a run: terminal tables and one self-contained HTML page. Reads run directories only."""

from __future__ import annotations

__all__: list[str] = []
