"""The transform that factorizes layers; the factorizations themselves are in test_factorizations."""

from __future__ import annotations

import sys

import pytest
from torch import nn

from autocompress.compress import CompressionContext, Transform
from autocompress.compress.lowrank import LowRank, factorize
from autocompress.errors import CompressionError, MissingDependencyError
from autocompress.policy import FACTORIZATIONS, CompressionPolicy, LayerPolicy
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

    @pytest.mark.parametrize("factorization", ["spatial_svd", "cp"])
    def test_the_factorization_is_the_policys(
        self, factorization: str, transform: Transform, model: nn.Module, context: CompressionContext
    ) -> None:
        own = LayerPolicy(rank_ratio=0.5, factorization=factorization)
        result = transform.apply(model, CompressionPolicy(layers={"wider.conv2": own, "fc": own}), context)
        chain, matrix = result.get_submodule("wider.conv2"), result.get_submodule("fc")
        assert isinstance(chain, nn.Sequential) and isinstance(matrix, nn.Sequential)
        assert len(chain) == {"spatial_svd": 2, "cp": 3}[factorization]
        # A linear layer is a matrix: its truncated SVD, whatever is said of kernels.
        assert len(matrix) == 2 and isinstance(matrix[0], nn.Linear)

    def test_shapes_alone_need_no_decomposition(
        self, transform: Transform, model: nn.Module, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        policy = CompressionPolicy(layers={"wider.conv2": LayerPolicy(rank_ratio=0.5, factorization="cp")})
        whole = transform.apply(model, policy, CompressionContext(networks.images()))
        # As where tensorly is not installed.
        monkeypatch.setitem(sys.modules, "tensorly.decomposition", None)
        shapes = transform.apply(model, policy, CompressionContext(networks.images(), weights=False))
        assert {n: t.shape for n, t in shapes.state_dict().items()} == {
            n: t.shape for n, t in whole.state_dict().items()
        }
        with pytest.raises(MissingDependencyError, match=r"tensorly.*autocompress\[cp\]"):
            transform.apply(model, policy, CompressionContext(networks.images()))


def test_the_layer_is_not_changed() -> None:
    conv = nn.Conv2d(16, 16, 3)
    before = networks.state(conv)
    factorize(conv, LayerPolicy(rank_ratio=0.5))
    assert networks.same_state(conv, before)


@pytest.mark.parametrize("layer", [nn.Conv2d(8, 8, 3, groups=8), nn.Conv1d(8, 8, 3), nn.ReLU()])
def test_what_has_no_low_rank_form(layer: nn.Module) -> None:
    with pytest.raises(CompressionError, match=rf"'thing' \({type(layer).__name__}\) has no low-rank form"):
        factorize(layer, LayerPolicy(rank_ratio=0.5), "thing")


@pytest.mark.parametrize("factorization", FACTORIZATIONS)
def test_a_weight_that_is_not_finite_is_named(factorization: str) -> None:
    conv = nn.Conv2d(8, 8, 3)
    nn.init.constant_(conv.weight, float("nan"))
    with pytest.raises(CompressionError, match=rf"'thing' cannot be factorized by {factorization}: .*not finite"):
        factorize(conv, LayerPolicy(rank_ratio=0.5, factorization=factorization), "thing")
