"""Weight quantizers for storage: one file each, behind `StorageQuantizer`.

What they give is kept in the container as levels and indices and comes back as plain weights. No engine here computes
with these codes, so they make a file smaller and a network no faster; int8 that runs is `compress.quantization`.
"""

from autocompress.errors import ConfigError, nearest
from autocompress.storage.quantizers.asymmetric import Asymmetric
from autocompress.storage.quantizers.base import MAX_BITS, Shared, StorageQuantizer
from autocompress.storage.quantizers.binary import Binary
from autocompress.storage.quantizers.codebook import Codebook
from autocompress.storage.quantizers.fixed_point import FixedPoint
from autocompress.storage.quantizers.power_of_two import PowerOfTwo
from autocompress.storage.quantizers.ternary import Ternary
from autocompress.storage.quantizers.uniform import Uniform

QUANTIZERS: dict[str, type[StorageQuantizer]] = {
    kind.method.name: kind for kind in (Codebook, Uniform, Asymmetric, FixedPoint, Binary, Ternary, PowerOfTwo)
}


def quantizer(name: str) -> StorageQuantizer:
    """Return the quantizer of that name.

    Raises:
        ConfigError: There is none.
    """
    if name not in QUANTIZERS:
        raise ConfigError(f"Unknown quantizer {name!r} for storage.{nearest(name, QUANTIZERS)}")
    return QUANTIZERS[name]()


__all__ = ["MAX_BITS", "QUANTIZERS", "Shared", "StorageQuantizer", "quantizer"]
