"""TensorRT's layers as kernels: the engine inspector says what each one computes, the profiler how long it takes.

The inspector's account of an engine that was built with detailed profiling verbosity names, for every layer, the ONNX
nodes it came from (``Metadata``), its tactic and its tensors' formats. Pure functions on those documents: no runtime,
no device.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from autocompress.engines.kernel_attribution import KernelTime

_ONNX_LAYER = re.compile(r"\[ONNX Layer: ([^\]]+)\]")
# Words in an output's ``Format/Datatype``, as "Row major linear FP16 format", the longer ones first.
_DTYPES = (("int8", "int8"), ("bf16", "bf16"), ("bfloat16", "bf16"), ("fp16", "fp16"), ("half", "fp16"),
           ("fp8", "fp8_e4m3"), ("fp32", "fp32"), ("float", "fp32"))  # fmt: skip


def kernel_times(information: Mapping[str, Any], times: Mapping[str, float], n: int) -> list[KernelTime]:
    """Return the layers of an engine in their order, those that the profiler timed.

    Args:
        information: The inspector's JSON, with ``Layers``. Engines built without detailed verbosity give names alone,
            in which fused nodes are joined by " + ".
        times: Layer name to its ms in one inference.
        n: Inferences that the times are means of.
    """
    found = []
    for layer in information.get("Layers", ()):
        described: Mapping[str, Any] = {"Name": layer} if isinstance(layer, str) else layer
        name = str(described.get("Name", ""))
        if name not in times:
            continue
        found.append(
            KernelTime(
                nodes=_nodes(described, name),
                op=str(described.get("LayerType", "")),
                kernel=str(described.get("TacticName", "")),
                dtype=_dtype(described),
                time_ms=times[name],
                n=n,
            )
        )
    return found


def _nodes(layer: Mapping[str, Any], name: str) -> tuple[str, ...]:
    """Return the ONNX nodes of a layer, in graph order; none for a reformat, which the builder inserted."""
    if layer.get("LayerType") == "Reformat" or name.startswith("Reformatting CopyNode"):
        return ()
    named = _ONNX_LAYER.findall(str(layer.get("Metadata", "")))
    return tuple(dict.fromkeys(named or name.split(" + ")))


def _dtype(layer: Mapping[str, Any]) -> str:
    """Return what a layer's first input is in, which is what it computes in."""
    tensors = layer.get("Inputs") or layer.get("Outputs") or ()
    text = str(tensors[0].get("Format/Datatype", "")) if tensors and isinstance(tensors[0], Mapping) else ""
    return next((dtype for word, dtype in _DTYPES if word in text.lower()), text)
