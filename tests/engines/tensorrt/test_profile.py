"""The engine inspector's documents read as kernels; their form is that of TensorRT 10 and 11."""

from __future__ import annotations

from typing import Any

from autocompress.engines.kernel_attribution import KernelTime
from autocompress.engines.tensorrt.profile import kernel_times


def layer(name: str, kind: str, nodes: list[str], form: str) -> dict[str, Any]:
    return {
        "Name": name, "LayerType": kind, "TacticName": "sm80_xmma_fprop", "StreamId": 0,
        "Inputs": [{"Name": "x", "Location": "Device", "Dimensions": [1, 3, 8, 8], "Format/Datatype": form}],
        "Outputs": [{"Name": "y", "Location": "Device", "Dimensions": [1, 8, 8, 8], "Format/Datatype": form}],
        "Metadata": "\x1e".join(f"[ONNX Layer: {node}]" for node in nodes),
    }  # fmt: skip


def test_layers_tell_the_nodes_they_were_made_of() -> None:
    reformat = layer(
        "Reformatting CopyNode for Input Tensor 0 to conv1 + relu", "Reformat", [], "Row major linear FP32"
    )
    fused = layer("conv1 + relu", "CaskConvolution", ["conv1", "relu", "conv1"], "Thirty-two wide channel Int8 format")
    plain = layer("fc", "CaskGemmMatrixMultiply", ["fc"], "Row major linear FP16 format")
    unseen = layer("weights", "Constant", ["weights"], "Row major linear FP16 format")
    times = {reformat["Name"]: 0.001, "conv1 + relu": 0.02, "fc": 0.005, "something else": 1.0}
    found = kernel_times({"Layers": [reformat, unseen, fused, plain], "Bindings": ["x", "y"]}, times, 20)
    assert found == [
        KernelTime((), "Reformat", "sm80_xmma_fprop", "fp32", 0.001, 20),
        KernelTime(("conv1", "relu"), "CaskConvolution", "sm80_xmma_fprop", "int8", 0.02, 20),
        KernelTime(("fc",), "CaskGemmMatrixMultiply", "sm80_xmma_fprop", "fp16", 0.005, 20),
    ]


def test_names_alone_are_read_too() -> None:
    names = ["Reformatting CopyNode for Input Tensor 0 to a + b", "a + b"]
    found = kernel_times({"Layers": names}, dict.fromkeys(names, 0.01), 5)
    assert [kernel.nodes for kernel in found] == [(), ("a", "b")] and found[1].dtype == ""
    assert kernel_times({}, {}, 1) == []
