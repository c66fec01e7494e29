"""An engine's inputs, and how one packed array becomes them. numpy only.

A network of one input takes it as it is. Those of several inputs travel through the package as one float array
``(N, total)``, each flattened, one behind the other in the engine's own order (`tasks.pack` makes it); here, right
before the runtime, each gets its own shape and dtype. Float32 holds every integer up to 2**24 exactly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from autocompress.errors import BuildError


@dataclass(frozen=True)
class Port:
    """One input of an opened engine.

    Attributes:
        name: As the graph calls it.
        shape: ``(batch_size, ...)``.
        dtype: What the engine reads.
    """

    name: str
    shape: tuple[int, ...]
    dtype: DTypeLike

    @property
    def size(self) -> int:
        """Numbers in one sample."""
        return math.prod(self.shape[1:])

    def __str__(self) -> str:
        return f"{self.name} {self.shape} of {np.dtype(self.dtype).name}"


def packed_shape(ports: Sequence[Port]) -> tuple[int, ...]:
    """Return the shape in which inputs travel: that of the one input, or ``(batch_size, total)`` of several."""
    return ports[0].shape if len(ports) == 1 else (ports[0].shape[0], sum(port.size for port in ports))


def unpacked(inputs: NDArray[Any], ports: Sequence[Port], path: Path) -> list[NDArray[Any]]:
    """Return an array for every port, in its shape and dtype; views of `inputs` where they may be.

    Raises:
        BuildError: `inputs` are of another shape than `packed_shape` and, of one input, than it is when flattened.
    """
    shape = tuple(inputs.shape)
    total = sum(port.size for port in ports)
    if shape not in (packed_shape(ports), (ports[0].shape[0], total)):
        if len(ports) == 1:
            raise BuildError(f"{path} takes inputs of shape {ports[0].shape}, not {shape}.")
        raise BuildError(f"{path} takes {', '.join(map(str, ports))}, packed as {packed_shape(ports)}, not {shape}.")
    if len(ports) == 1:
        return [np.asarray(inputs.reshape(ports[0].shape), dtype=ports[0].dtype, order="C")]
    parts = np.split(inputs, np.cumsum([port.size for port in ports])[:-1], axis=1)
    return [
        np.asarray(part.reshape(port.shape), dtype=port.dtype, order="C")
        for part, port in zip(parts, ports, strict=True)
    ]
