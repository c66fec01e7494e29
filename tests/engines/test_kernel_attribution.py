"""Which kernel a fused node belongs to, when the engine tells of others alone."""

from __future__ import annotations

import json

import pytest

from autocompress.engines.kernel_attribution import Kernel, KernelTime, Node, attribute


def kernel(op: str, nodes: set[int], *inputs: int) -> Kernel:
    return Kernel(op, frozenset(nodes), inputs)


# conv relu | conv add relu | conv relu, with a shortcut around the second convolution and over the third.
RESIDUAL = [
    Node("Conv", ()),
    Node("Relu", (0,)),
    Node("Conv", (1,)),
    Node("Add", (2, 1)),
    Node("Relu", (3,)),
    Node("Conv", (4,)),
    Node("Relu", (5,)),
    Node("Add", (6, 4), is_output=True),
]


def test_all_told_is_kept() -> None:
    kernels = [kernel("Conv", {0, 1}), kernel("Conv", {2, 3, 4}, 0), kernel("Conv", {5, 6, 7}, 1)]
    assert attribute(RESIDUAL, kernels) == [(0, 1), (2, 3, 4), (5, 6, 7)]


@pytest.mark.parametrize(
    "told",
    [
        ({0}, {2}, {5}),  # by their convolutions
        ({1}, {2}, {6}),  # by the activation where there was one when they were named, as ONNX Runtime does
        ({1}, {4}, {7}),  # by their last node
    ],
)
def test_epilogues_belong_to_the_convolution_before(told: tuple[set[int], set[int], set[int]]) -> None:
    kernels = [kernel("Conv", told[0]), kernel("Conv", told[1], 0), kernel("FusedConv", told[2], 1)]
    assert attribute(RESIDUAL, kernels) == [(0, 1), (2, 3, 4), (5, 6, 7)]


def test_what_the_runtime_inserts_passes_data_on_and_computes_no_node() -> None:
    kernels = [
        kernel("ReorderInput", set()),
        kernel("Conv", {0}, 0),
        kernel("ReorderOutput", set(), 1),
        kernel("Convolution", {2}, 2, 1),
        kernel("Convolution", {5}, 3),
    ]
    assert attribute(RESIDUAL, kernels) == [(), (0, 1), (), (2, 3, 4), (5, 6, 7)]


def test_a_chain_of_convolutions_is_cut_between_an_activation_and_the_next() -> None:
    nodes = [Node("Conv", ()), Node("Relu", (0,)), Node("Conv", (1,)), Node("Relu", (2,), is_output=True)]
    for told in (({1}, {3}), ({0}, {3}), ({1}, {2})):
        assert attribute(nodes, [kernel("Conv", told[0]), kernel("Conv", told[1], 0)]) == [(0, 1), (2, 3)]


def test_dequantization_belongs_to_what_reads_it() -> None:
    nodes = [
        Node("Conv", ()),
        Node("QuantizeLinear", (0,)),
        Node("DequantizeLinear", (1,)),
        Node("DequantizeLinear", ()),  # of the weight
        Node("Conv", (2, 3), is_output=True),
    ]
    fused = [kernel("Conv", {0, 1}), kernel("QLinearConv", {4}, 0)]
    assert attribute(nodes, fused) == [(0, 1), (2, 3, 4)]
    apart = [kernel("Conv", {0}), kernel("QuantizeLinear", {1}, 0), kernel("QLinearConv", {4}, 1)]
    assert attribute(nodes, apart) == [(0,), (1,), (2, 3, 4)]


def test_a_product_belongs_to_the_kernel_named_after_its_bias() -> None:
    nodes = [Node("LayerNormalization", ()), Node("MatMul", (0,)), Node("Add", (1,)), Node("Gelu", (2,))]
    kernels = [kernel("MVN", {0}), kernel("FullyConnected", {2, 3}, 0)]
    assert attribute(nodes, kernels) == [(0,), (1, 2, 3)]


def test_a_product_is_not_taken_for_a_conversion_nor_by_a_kernel_that_has_one() -> None:
    nodes = [Node("MatMul", ()), Node("MatMul", (0,)), Node("Softmax", (1,))]
    assert attribute(nodes, [kernel("Gemm", {0}), kernel("Softmax", {2}, 0)]) == [(0,), (1, 2)]
    assert attribute([Node("Conv", ()), Node("Relu", (0,))], [kernel("Convert", {1})]) == [(0, 1)]


def test_a_node_that_fits_nowhere_is_in_no_kernel() -> None:
    # Read by two kernels, made by none, so it cannot have been computed in either.
    nodes = [Node("Reshape", ()), Node("MatMul", (0,)), Node("MatMul", (0,))]
    assert attribute(nodes, [kernel("Gemm", {1}), kernel("Gemm", {2})]) == [(1,), (2,)]


def test_a_node_computed_in_two_kernels_is_in_both() -> None:
    nodes = [Node("Conv", ()), Node("QuantizeLinear", (0,)), Node("Conv", (1,))]
    kernels = [kernel("Conv", {0, 1}), kernel("Subgraph", {1}, 0), kernel("Conv", {2}, 1)]
    assert attribute(nodes, kernels) == [(0, 1), (1,), (2,)]


def test_json() -> None:
    time = KernelTime(("conv", "relu"), "Convolution", "brgconv_avx512", "bf16", 0.004, 100)
    assert KernelTime.from_dict(json.loads(json.dumps(time.to_dict()))) == time
