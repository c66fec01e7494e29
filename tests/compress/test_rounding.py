"""Rounding to a grid: torch's own figures and gradients, to the last bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from autocompress.compress.rounding import fake_quantize


def values(dtype: torch.dtype, seed: int, layout: torch.memory_format = torch.contiguous_format) -> Tensor:
    torch.manual_seed(seed)
    return (3 * torch.randn(4, 8, 9, 5)).to(dtype).to(memory_format=layout)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("low", "high"), [(0, 255), (-128, 127), (-127, 127)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_one_step_is_that_of_torch(dtype: torch.dtype, low: int, high: int, layout: torch.memory_format) -> None:
    zero = torch.tensor(0, dtype=torch.int32)
    for seed in range(20):
        x = values(dtype, seed, layout)
        before, step = x.clone(), torch.rand(()) * 0.05 + 1e-3
        found = fake_quantize(x, step, low, high)
        assert torch.equal(
            found, torch.fake_quantize_per_tensor_affine(x.float(), step, zero, low, high).to(dtype)
        ) and found.is_contiguous(memory_format=layout)
        assert found.dtype == dtype and torch.equal(x, before)


def test_a_step_for_each_channel_is_that_of_torch() -> None:
    for seed in range(20):
        x = values(torch.float32, seed)
        step = torch.rand(4) * 0.05 + 1e-3
        expected = torch.fake_quantize_per_channel_affine(x, step, torch.zeros(4, dtype=torch.int32), 0, -127, 127)
        assert torch.equal(fake_quantize(x, step.view(-1, 1, 1, 1), -127, 127), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_torch(dtype: torch.dtype) -> None:
    x, step, zero = values(dtype, 1), torch.tensor(0.02), torch.tensor(0, dtype=torch.int32)
    weights = values(dtype, 2)
    gradients = []
    for rounded in (
        lambda given: fake_quantize(given, step, 0, 255),
        lambda given: torch.fake_quantize_per_tensor_affine(given.float(), step, zero, 0, 255).to(dtype),
    ):
        given = x.clone().requires_grad_()
        (rounded(given) * weights).sum().backward()
        gradients.append(given.grad)
    assert gradients[0] is not None and gradients[1] is not None and torch.equal(*gradients)
    cut = (x.float() < -0.5 * step) | (x.float() > 255.5 * step)
    assert cut.any() and not gradients[0][cut].any() and gradients[0][~cut].all()


def test_halves_go_to_the_even_code_and_what_is_too_large_to_the_last() -> None:
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, float("inf"), -float("inf"), float("nan"), 1e38, -1e38])
    found = fake_quantize(x, torch.tensor(1.0), -128, 127)
    assert found[:6].tolist() == [0, 2, 2, 0, 127, -128] and found[6].isnan() and found[7:].tolist() == [127, -128]
