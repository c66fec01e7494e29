"""What NVIDIA GPUs of each compute capability can run, by TensorRT flavour, with the reason when they cannot.

Sources: NVIDIA's support matrices, "GPU architecture and precision", of TensorRT 10.x and 11.x and of TensorRT-RTX 1.x
(docs.nvidia.com/deeplearning/tensorrt and …/tensorrt-rtx), and the compute capability list
(developer.nvidia.com/cuda-gpus). The table says what is supported; whether it pays is for measurement. Imports no
runtime and touches no device.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Self

from autocompress.errors import ConfigError, UnsupportedDtypeError

_FORM = re.compile(r"(?:sm_?)?(\d{1,2})\.?(\d)", re.IGNORECASE)


@dataclass(frozen=True, order=True)
class ComputeCapability:
    """The generation of a GPU, such as 8.9; `str()` gives that form."""

    major: int
    minor: int

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}"

    @property
    def sm(self) -> str:
        """As compilers and TensorRT write it, ``"SM89"``."""
        return f"SM{self.major}{self.minor}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``"8.9"``, ``"89"``, ``"sm_89"`` or ``"SM89"``.

        Raises:
            ConfigError: It is none of these.
        """
        found = _FORM.fullmatch(str(text).strip())
        if found is None:
            raise ConfigError(f"{text!r} is no compute capability. Write it as 8.9, or list several: 8.6,8.9.")
        return cls(int(found[1]), int(found[2]))


@dataclass(frozen=True)
class _Need:
    """A dtype's least compute capability per flavour, and the hardware it takes; None where no GPU has it."""

    tensorrt: ComputeCapability | None
    rtx: ComputeCapability | None
    hardware: str


def _cc(major: int, minor: int) -> ComputeCapability:
    return ComputeCapability(major, minor)


TENSORRT, TENSORRT_RTX = "tensorrt", "tensorrt-rtx"
# Dense dtypes first, as `Engine.capabilities` lists them.
DTYPES: Mapping[str, _Need] = {
    # TensorRT-RTX 1.7 compiles fp32 convolutions for Turing, but says "FP32 GEMM is not supported" of matrix products.
    "fp32": _Need(_cc(7, 5), _cc(8, 0), "fp32 matrix products, which TensorRT-RTX does not compile for Turing"),
    "bf16": _Need(_cc(8, 0), _cc(8, 0), "bf16 Tensor Cores (Ampere and later)"),
    "fp16": _Need(_cc(7, 5), _cc(7, 5), "fp16 Tensor Cores"),
    "int8": _Need(_cc(7, 5), _cc(8, 0), "int8 Tensor Cores"),
    "fp8_e4m3": _Need(_cc(8, 9), _cc(8, 9), "fp8 Tensor Cores (Ada, Hopper and later)"),
    "int4": _Need(_cc(8, 0), _cc(8, 0), "int4 weights dequantized on the fly (Ampere and later)"),
    "fp4_e2m1": _Need(_cc(10, 0), _cc(12, 0), "fp4 Tensor Cores (Blackwell and later)"),
}
# dtypes that exist for weights alone: activations stay in a dense dtype.
WEIGHT_ONLY = frozenset({"int4"})
TF32 = _cc(8, 0)
SPARSE_2_4 = _cc(8, 0)
# What TensorRT-RTX can be told to build for. It runs on no data centre GPU after Ampere (8.0).
RTX_TARGETS = (_cc(7, 5), _cc(8, 0), _cc(8, 6), _cc(8, 9), _cc(12, 0), _cc(12, 1))
# Supported, and yet not a promise of speed; shown by `devices` and `doctor`.
CAVEATS: Mapping[tuple[str, str], str] = {
    (TENSORRT_RTX, "int8"): (
        "NVIDIA's matrix for TensorRT-RTX lists int8 for matrix products' weights only: an int8 convolution builds, "
        "and may run in the dense dtype. Measure it."
    ),
    (TENSORRT_RTX, "fp8_e4m3"): "For matrix products; convolutions in fp8 are not listed for TensorRT-RTX.",
    (TENSORRT_RTX, "fp4_e2m1"): "For matrix products only.",
    (TENSORRT, "fp4_e2m1"): "For matrix products only.",
}


@dataclass(frozen=True)
class Support:
    """Whether one dtype is offered.

    Attributes:
        dtype: As in `DTYPES`.
        offered: Whether the GPU runs it.
        reason: Why not, or what to know although it is; empty when there is nothing to say.
    """

    dtype: str
    offered: bool
    reason: str = ""


def support(flavour: str, targets: Iterable[ComputeCapability]) -> list[Support]:
    """Return every dtype with whether all of `targets` run it in this flavour, dense dtypes first."""
    listed = sorted(targets)
    return [_support(flavour, dtype, listed) for dtype in DTYPES]


def _support(flavour: str, dtype: str, targets: list[ComputeCapability]) -> Support:
    need = DTYPES[dtype]
    least = need.rtx if flavour == TENSORRT_RTX else need.tensorrt
    if least is None:
        return Support(dtype, False, f"{flavour} has no {dtype}.")
    below = [target for target in targets if target < least]
    if below:
        have = ", ".join(map(str, below))
        return Support(
            dtype,
            False,
            f"{dtype} in {flavour} needs compute capability {least} or later: {need.hardware}; not {have}.",
        )
    return Support(dtype, True, CAVEATS.get((flavour, dtype), ""))


def offered(flavour: str, targets: Iterable[ComputeCapability]) -> tuple[str, ...]:
    """Return the dtypes that all of `targets` run, dense dtypes first."""
    return tuple(s.dtype for s in support(flavour, targets) if s.offered)


def capabilities(flavour: str, targets: Iterable[ComputeCapability]) -> tuple[str, ...]:
    """Return what `offered` does, and ``"2:4"`` where all of `targets` have Sparse Tensor Cores."""
    listed = list(targets)
    return (*offered(flavour, listed), *(["2:4"] if all(target >= SPARSE_2_4 for target in listed) else []))


def require(flavour: str, dtypes: Iterable[str], targets: Iterable[ComputeCapability]) -> None:
    """Check that all of `targets` run all of `dtypes`.

    Raises:
        UnsupportedDtypeError: One is not run; names the dtype, the hardware it needs, and what runs instead.
    """
    listed = sorted(targets)
    table = {s.dtype: s for s in support(flavour, listed)}
    for dtype in dtypes:
        found = table.get(dtype)
        if found is not None and found.offered:
            continue
        have = ", ".join(map(str, listed))
        runs = ", ".join(s.dtype for s in table.values() if s.offered)
        why = f" {found.reason}" if found is not None else ""
        raise UnsupportedDtypeError(
            f"{flavour} does not run {dtype!r} on compute capability {have}.{why} It runs {runs}."
        )


def require_sparsity(targets: Iterable[ComputeCapability]) -> None:
    """Check that all of `targets` have Sparse Tensor Cores.

    Raises:
        UnsupportedDtypeError: One has none.
    """
    for target in sorted(targets):
        if target < SPARSE_2_4:
            raise UnsupportedDtypeError(
                f"2:4 sparse weights need compute capability {SPARSE_2_4} or later (Ampere's Sparse Tensor Cores), not "
                f"{target}. Leave sparse_weights away."
            )


def rtx_targets(targets: Iterable[ComputeCapability]) -> None:
    """Check that TensorRT-RTX can be told to build for all of `targets`.

    Raises:
        ConfigError: It cannot; says what it can, and what to use instead.
    """
    for target in targets:
        if target not in RTX_TARGETS:
            raise ConfigError(
                f"TensorRT-RTX does not build for compute capability {target}; it builds for "
                f"{', '.join(map(str, RTX_TARGETS))}. For data centre GPUs (Hopper 9.0, Blackwell 10.0) and Jetson use "
                "--engine tensorrt on the GPU itself."
            )
