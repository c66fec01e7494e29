"""Residual blocks replaced by their shortcut."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from autocompress.compress import CompressionContext, Transform
from autocompress.compress.blocks import BlockRemoval
from autocompress.policy import CompressionPolicy
from tests import networks
from tests.compress.contract import TransformContract


class TestBlockRemoval(TransformContract):
    @pytest.fixture
    def transform(self) -> Transform:
        return BlockRemoval()

    @pytest.fixture
    def policy(self) -> CompressionPolicy:
        return CompressionPolicy(removed_blocks=("same",))

    @pytest.fixture
    def unknown(self) -> CompressionPolicy:
        return CompressionPolicy(removed_blocks=("nowhere.1",))

    def test_what_is_left_is_the_network_without_the_block(
        self, transform: Transform, policy: CompressionPolicy, model: nn.Module, context: CompressionContext
    ) -> None:
        assert isinstance(model, networks.Residual)
        result = transform.apply(model, policy, context)
        with torch.no_grad():
            wanted = model.fc(model.wider(model.stem(context.inputs).relu()).mean((2, 3)))
            assert torch.equal(result(context.inputs), wanted)

    def test_a_block_inside_a_chain(self, transform: Transform, context: CompressionContext) -> None:
        model = networks.Mobile().eval()
        result = transform.apply(model, CompressionPolicy(removed_blocks=("features.0",)), context)
        assert isinstance(result.get_submodule("features.0"), nn.Identity)
        assert isinstance(result.get_submodule("features.1"), networks.InvertedResidual)
