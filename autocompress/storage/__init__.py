"""Deep Compression storage: weights pruned, shared and coded into one small file (Han, Mao & Dally, ICLR 2016).

A room of its own beside `compress`, which makes what an engine executes, from a policy: here nothing is executed, and
what comes back from a file are plain weights.
"""

from autocompress.storage.container import TensorSize, read_container, write_container
from autocompress.storage.packing import Packed, pack, unpack

__all__ = ["Packed", "TensorSize", "pack", "read_container", "unpack", "write_container"]
