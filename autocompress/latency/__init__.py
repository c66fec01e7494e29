"""Measured latency: the one timing protocol, its statistics, and what a device is.

Importing this package loads no runtime and no torch. The protocol's function is `latency.measure.measure`; a name here
would hide its module.
"""

from __future__ import annotations

from autocompress.latency.fingerprint import device_fingerprint
from autocompress.latency.protocol import Protocol

__all__ = ["Protocol", "device_fingerprint"]
