"""Factorized layers: exact at full rank, the best possible below it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from autocompress.compress import CompressionContext, Transform
from autocompress.compress.lowrank import LowRank, factorize, factorized_macs_ratio, rank_at
from autocompress.errors import CompressionError
from autocompress.inventory import count_macs
from autocompress.policy import CompressionPolicy, LayerPolicy
from tests import networks
from tests.compress.contract import TransformContract


class TestLowRank(TransformContract):
    @pytest.fixture
    def transform(self) -> Transform:
        return LowRank()

    @pytest.fixture
    def policy(self) -> CompressionPolicy:
        return CompressionPolicy(
            layers={n: LayerPolicy(rank_ratio=0.5) for n in ("wider.conv2", "wider.downsample.0", "fc")}
        )

    @pytest.fixture
    def unknown(self) -> CompressionPolicy:
        return CompressionPolicy(layers={"nowhere": LayerPolicy(rank_ratio=0.5)})

    def test_layers_become_chains(
        self, transform: Transform, policy: CompressionPolicy, model: nn.Module, context: CompressionContext
    ) -> None:
        result = transform.apply(model, policy, context)
        for name, length in (("wider.conv2", 3), ("wider.downsample.0", 2), ("fc", 2)):
            chain = result.get_submodule(name)
            assert isinstance(chain, nn.Sequential)
            assert len(chain) == length
        assert isinstance(result.get_submodule("same.conv1"), nn.Conv2d)

    def test_a_layer_inside_a_removed_block_is_passed_over(
        self, transform: Transform, model: nn.Module, context: CompressionContext
    ) -> None:
        policy = CompressionPolicy(layers={"gone.conv": LayerPolicy(rank_ratio=0.5)}, removed_blocks=("gone",))
        assert transform.apply(model, policy, context) is model

    def test_a_depthwise_layer_has_no_low_rank_form(self, transform: Transform, context: CompressionContext) -> None:
        policy = CompressionPolicy(layers={"last.conv.3": LayerPolicy(rank_ratio=0.5)})
        with pytest.raises(CompressionError, match=r"last\.conv\.3"):
            transform.apply(networks.Mobile(), policy, context)


def close(first: nn.Module, second: nn.Module, x: torch.Tensor) -> None:
    with torch.no_grad():
        torch.testing.assert_close(first(x), second(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sizes", [(16, 24), (24, 16), (4, 7)])
def test_full_rank_reproduces_linear_and_pointwise_layers(sizes: tuple[int, int], bias: bool) -> None:
    linear = nn.Linear(*sizes, bias=bias)
    close(factorize(linear, 1.0), linear, torch.randn(3, 5, sizes[0]))
    conv = nn.Conv2d(*sizes, 1, stride=2, bias=bias)
    close(factorize(conv, 1.0), conv, torch.randn(2, sizes[0], 7, 7))


@pytest.mark.parametrize(
    "options",
    [
        {"padding": 1},
        {"stride": 2, "bias": False},
        {"padding": 2, "dilation": 2},
        {"padding": (0, 1), "stride": (1, 2), "kernel_size": (1, 3)},
        {"padding": "same", "padding_mode": "circular"},
    ],
    ids=str,
)
def test_full_rank_tucker_reproduces_a_convolution(options: dict[str, Any]) -> None:
    conv = nn.Conv2d(**{"in_channels": 8, "out_channels": 16, "kernel_size": 3, **options})
    first, middle, last = factorize(conv, 1.0)
    assert isinstance(middle, nn.Conv2d)
    assert (middle.stride, middle.padding, middle.dilation) == (conv.stride, conv.padding, conv.dilation)
    assert first.bias is None
    assert middle.bias is None
    assert (last.bias is None) == (conv.bias is None)
    close(nn.Sequential(first, middle, last), conv, torch.randn(2, 8, 9, 9))


def test_truncated_svd_is_optimal() -> None:
    # Eckart and Young: the error of the best rank-8 matrix is the norm of the singular values left out.
    torch.manual_seed(0)
    layer = nn.Linear(32, 24)
    first, second = factorize(layer, 8 / 24)
    assert isinstance(first, nn.Linear)
    assert isinstance(second, nn.Linear)
    assert first.out_features == 8
    error = torch.linalg.matrix_norm(layer.weight - second.weight @ first.weight)
    wanted = torch.linalg.svdvals(layer.weight)[8:].square().sum().sqrt()
    torch.testing.assert_close(error, wanted, rtol=1e-4, atol=1e-5)


def test_tucker_finds_a_weight_that_has_the_rank() -> None:
    torch.manual_seed(0)
    core, u, v = torch.randn(8, 8, 3, 3), torch.randn(32, 8), torch.randn(16, 8)
    conv = nn.Conv2d(16, 32, 3)
    with torch.no_grad():
        conv.weight.copy_(torch.einsum("rshw,or,is->oihw", core, u, v) / 32)
    # A quarter of 32 and a half of 16 are both 8: at 0.4 the ranks are 8 (of 16) and 16 (of 32), enough for it.
    chain = factorize(conv, 0.4)
    assert [m.weight.shape[0] for m in chain if isinstance(m, nn.Conv2d)] == [8, 16, 32]
    close(chain, conv, torch.randn(2, 16, 6, 6))


def test_the_layer_is_not_changed() -> None:
    conv = nn.Conv2d(16, 16, 3)
    before = networks.state(conv)
    factorize(conv, 0.5)
    assert networks.same_state(conv, before)


@pytest.mark.parametrize("layer", [nn.Conv2d(8, 8, 3, groups=8), nn.Conv1d(8, 8, 3), nn.ReLU()])
def test_what_has_no_low_rank_form(layer: nn.Module) -> None:
    with pytest.raises(CompressionError, match=type(layer).__name__):
        factorize(layer, 0.5, "thing")


@pytest.mark.parametrize(
    ("full", "ratio", "rank"),
    [
        (64, 0.5, 32),
        (64, 0.3, 16),
        (64, 0.01, 8),
        (8, 0.5, 4),
        (4, 0.1, 1),
        (20, 0.6, 16),
        (20, 1.0, 20),
        (12, 1.0, 12),
    ],
)
def test_ranks(full: int, ratio: float, rank: int) -> None:
    assert rank_at(full, ratio) == rank


@pytest.mark.parametrize(("ins", "outs", "kernel"), [(64, 128, (3, 3)), (64, 32, (1, 1)), (16, 16, (1, 3))])
@pytest.mark.parametrize("ratio", [0.25, 0.5])
def test_macs_ratio_is_what_the_factorized_layer_does(
    ins: int, outs: int, kernel: tuple[int, int], ratio: float
) -> None:
    conv, x = nn.Conv2d(ins, outs, kernel, padding="same"), torch.zeros(1, ins, 6, 6)
    whole = sum(count_macs(conv, x).values())
    chain = sum(count_macs(factorize(conv, ratio), x).values())
    assert chain / whole == pytest.approx(factorized_macs_ratio(ins, outs, kernel, ratio))


def test_macs_ratio_of_a_linear_layer_by_hand() -> None:
    assert factorized_macs_ratio(64, 32, (), 0.5) == 16 * (64 + 32) / (64 * 32)
