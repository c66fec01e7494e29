"""What every transform must do. Subclass `TransformContract` with a `transform` and a `policy` fixture."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from autocompress.compress import CompressionContext, Transform
from autocompress.errors import CompressionError
from autocompress.policy import CompressionPolicy
from tests import networks


class TransformContract:
    """Inherited by one test class per transform; `policy` is for `networks.Residual`."""

    @pytest.fixture
    def transform(self) -> Transform:
        raise NotImplementedError

    @pytest.fixture
    def policy(self) -> CompressionPolicy:
        raise NotImplementedError

    @pytest.fixture
    def unknown(self) -> CompressionPolicy:
        """A policy that names what the model does not have."""
        raise NotImplementedError

    @pytest.fixture
    def model(self) -> nn.Module:
        return networks.randomize(networks.Residual())

    @pytest.fixture
    def context(self) -> CompressionContext:
        return CompressionContext(networks.images())

    def test_never_changes_its_input(
        self, transform: Transform, policy: CompressionPolicy, model: nn.Module, context: CompressionContext
    ) -> None:
        before, kinds = networks.state(model), [type(m) for m in model.modules()]
        result = transform.apply(model, policy, context)
        assert result is not model
        for parameter in result.parameters():
            parameter.data.fill_(7)
        assert networks.same_state(model, before)
        assert [type(m) for m in model.modules()] == kinds

    def test_the_identity_policy_changes_nothing(
        self, transform: Transform, model: nn.Module, context: CompressionContext
    ) -> None:
        result = transform.apply(model, CompressionPolicy(dense_dtype="bf16"), context)
        with torch.no_grad():
            assert torch.equal(result(context.inputs), model(context.inputs))

    def test_does_something_and_keeps_the_shape_of_the_output(
        self, transform: Transform, policy: CompressionPolicy, model: nn.Module, context: CompressionContext
    ) -> None:
        with torch.no_grad():
            before, after = model(context.inputs), transform.apply(model, policy, context)(context.inputs)
        assert after.shape == before.shape
        assert bool(after.isfinite().all())
        assert not torch.equal(after, before)

    def test_the_result_can_be_trained(
        self, transform: Transform, policy: CompressionPolicy, model: nn.Module, context: CompressionContext
    ) -> None:
        result = transform.apply(model, policy, context)
        result(context.inputs).square().sum().backward()
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in result.parameters())

    def test_an_unknown_name_is_an_error_that_names_it(
        self, transform: Transform, unknown: CompressionPolicy, model: nn.Module, context: CompressionContext
    ) -> None:
        with pytest.raises(CompressionError, match="nowhere"):
            transform.apply(model, unknown, context)
