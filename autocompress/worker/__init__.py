"""The child process in which every engine is built, run and measured, and its client.

Importing this package loads no runtime and no torch.
"""

from __future__ import annotations

from autocompress.worker.client import EngineWorker

__all__ = ["EngineWorker"]
