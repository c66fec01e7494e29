"""Factorized layers: exact at full rank and for weights that have the rank, the best possible below it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tensorly import tenalg
from torch import Tensor, nn

from autocompress.compress.base import LayerOutputs
from autocompress.compress.factorizations import FACTORIZATIONS, factorization_of, rank_at, ratio_of_energy
from autocompress.compress.factorizations import cp as cp_module
from autocompress.compress.factorizations.base import rank_of_energy
from autocompress.compress.lowrank import factorize
from autocompress.compress.shapes import factorized_macs_ratio
from autocompress.errors import CompressionError
from autocompress.model.inventory import count_macs, take_inventory
from autocompress.policy import FACTORIZATIONS as NAMES
from autocompress.policy import LayerPolicy


def chain_of(layer: nn.Module, ratio: float, name: str = "tucker2", outputs: LayerOutputs | None = None) -> nn.Module:
    """Return the low-rank form; at ratio 1 the one of full rank, which a policy never asks for."""
    if ratio < 1:
        return factorize(layer, LayerPolicy(rank_ratio=ratio, factorization=name), outputs=outputs)
    assert isinstance(layer, (nn.Conv2d, nn.Linear))
    kernel = layer.kernel_size if isinstance(layer, nn.Conv2d) else (1, 1)
    made = factorization_of(name, kernel)
    outs, ins = layer.weight.shape[:2]
    chain = made.build(layer, made.full_ranks(ins, outs, (kernel[0], kernel[1])))
    with torch.no_grad():
        made.fill(chain, layer, outputs)
    return chain


def close(first: nn.Module, second: nn.Module, x: Tensor, tolerance: float = 1e-5) -> None:
    with torch.no_grad():
        torch.testing.assert_close(first(x), second(x), rtol=tolerance, atol=tolerance)


def conv_of(weight: Tensor, **options: Any) -> nn.Conv2d:
    outs, ins, high, wide = weight.shape
    made = nn.Conv2d(ins, outs, (high, wide), **options)
    with torch.no_grad():
        made.weight.copy_(weight)
    return made


def test_every_name_of_a_policy_is_here() -> None:
    assert {*FACTORIZATIONS} == {"svd", *NAMES}
    assert all(factorization_of(name, ()) is factorization_of(name, (1, 1)) for name in NAMES)
    assert factorization_of("cp", (3, 3)).name == "cp" and factorization_of("cp", ()).name == "svd"


# -- exact ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sizes", [(16, 24), (24, 16), (4, 7)])
def test_full_rank_reproduces_linear_and_pointwise_layers(sizes: tuple[int, int], bias: bool) -> None:
    linear = nn.Linear(*sizes, bias=bias)
    close(chain_of(linear, 1.0), linear, torch.randn(3, 5, sizes[0]))
    conv = nn.Conv2d(*sizes, 1, stride=2, padding=1, bias=bias)
    close(chain_of(conv, 1.0), conv, torch.randn(2, sizes[0], 7, 7))


OPTIONS: list[dict[str, Any]] = [
    {"padding": 1},
    {"stride": 2, "bias": False},
    {"padding": 2, "dilation": 2},
    {"padding": (0, 1), "stride": (1, 2), "kernel_size": (1, 3)},
    {"padding": (2, 0), "stride": (2, 1), "dilation": (2, 1), "kernel_size": (3, 2)},
    {"padding": "same", "padding_mode": "circular"},
]


@pytest.mark.parametrize("name", ["tucker2", "spatial_svd"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_full_rank_reproduces_a_convolution(options: dict[str, Any], name: str) -> None:
    conv = nn.Conv2d(**{"in_channels": 8, "out_channels": 16, "kernel_size": 3, **options})
    chain = chain_of(conv, 1.0, name)
    *others, last = chain.children()
    assert all(factor.bias is None for factor in others) and (last.bias is None) == (conv.bias is None)
    close(chain, conv, torch.randn(2, 8, 9, 9))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_cp_finds_a_weight_that_has_the_rank(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    options = {"kernel_size": (3, 3), **options}
    high, wide = options.pop("kernel_size")
    # Of 8 x 8 channels and k kernel elements the full rank is 8 k: an eighth of it is k, rounded to 8.
    vectors = torch.randn(16, 2), torch.randn(8, 2), torch.randn(high, wide, 2)
    conv = conv_of(torch.einsum("or,ir,hwr->oihw", *vectors) / 4, **options)
    chain = chain_of(conv, 1 / 8, "cp")
    assert isinstance(chain, nn.Sequential) and chain[1].groups == chain[1].out_channels == 8
    close(chain, conv, torch.randn(2, 8, 9, 9), 1e-2)


def test_cp_of_full_rank_reproduces_a_small_convolution() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 3, 3, padding=1)
    chain = chain_of(conv, 1.0, "cp")
    assert isinstance(chain, nn.Sequential) and chain[0].out_channels == 6
    close(chain, conv, torch.randn(2, 2, 7, 7), 1e-2)


def test_tucker_finds_a_weight_that_has_the_rank() -> None:
    torch.manual_seed(0)
    core, u, v = torch.randn(8, 8, 3, 3), torch.randn(32, 8), torch.randn(16, 8)
    conv = conv_of(torch.einsum("rshw,or,is->oihw", core, u, v) / 32)
    # A quarter of 32 and a half of 16 are both 8: at 0.4 the ranks are 8 (of 16) and 16 (of 32), enough for it.
    chain = chain_of(conv, 0.4)
    assert [m.weight.shape[0] for m in chain.children()] == [8, 16, 32]
    close(chain, conv, torch.randn(2, 16, 6, 6))


def test_spatial_svd_finds_a_weight_that_has_the_rank() -> None:
    torch.manual_seed(0)
    conv = conv_of(
        torch.einsum("irh,orw->oihw", torch.randn(16, 8, 3), torch.randn(32, 8, 3)) / 16, stride=2, padding=1
    )
    # The full rank is 16 x 3.
    chain = chain_of(conv, 8 / 48, "spatial_svd")
    assert [tuple(m.weight.shape) for m in chain.children()] == [(8, 16, 3, 1), (32, 8, 1, 3)]
    close(chain, conv, torch.randn(2, 16, 9, 9))


# -- the best there is ------------------------------------------------------------------------------------------------


def test_truncated_svd_is_optimal() -> None:
    # Eckart and Young: the error of the best rank-8 matrix is the norm of the singular values left out.
    torch.manual_seed(0)
    layer = nn.Linear(32, 24)
    first, second = chain_of(layer, 8 / 24).children()
    assert first.out_features == 8
    error = torch.linalg.matrix_norm(layer.weight - second.weight @ first.weight)
    wanted = torch.linalg.svdvals(layer.weight)[8:].square().sum().sqrt()
    torch.testing.assert_close(error, wanted, rtol=1e-4, atol=1e-5)
    # Both factors weigh the same.
    torch.testing.assert_close(first.weight.norm(dim=1), second.weight.norm(dim=0), rtol=1e-4, atol=1e-5)


def test_spatial_svd_is_optimal() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 8, 3, bias=False)
    first, last = chain_of(conv, 8 / 24, "spatial_svd").children()
    made = torch.einsum("rih,orw->oihw", first.weight[..., 0], last.weight[:, :, 0])
    matrix = conv.weight.permute(1, 2, 0, 3).reshape(24, 24)
    wanted = torch.linalg.svdvals(matrix)[8:].square().sum().sqrt()
    torch.testing.assert_close((conv.weight - made).norm(), wanted, rtol=1e-4, atol=1e-5)


def seen(outputs: Tensor) -> LayerOutputs:
    return LayerOutputs(outputs.mean(0), torch.cov(outputs.T, correction=0))


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_what_outputs_say_is_kept_where_weights_say_otherwise(kind: str) -> None:
    # Output channels 16 to 31 have small weights, and inputs that are a hundred times as large.
    torch.manual_seed(0)
    scale = torch.ones(32, 1)
    scale[16:] = 0.1
    inputs = torch.randn(4096, 32) * torch.cat([torch.ones(16), 100 * torch.ones(16)])
    mask = torch.block_diag(torch.ones(16, 16), torch.ones(16, 16))
    linear = nn.Linear(32, 32)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(32, 32) * mask * scale)
    if kind == "conv":
        layer: nn.Module = conv_of(linear.weight[:, :, None, None].repeat(1, 1, 1, 2).detach())
        x = inputs[:, :, None, None].repeat(1, 1, 1, 2)
    else:
        layer, x = linear, inputs
    with torch.no_grad():
        wanted = layer(x).flatten(1)
        errors = [
            float((chain_of(layer, 0.5, outputs=outputs)(x).flatten(1) - wanted).square().mean())
            for outputs in (None, seen(wanted))
        ]
    # Without data the large weights are kept, and most of the outputs is lost.
    assert errors[0] > 0.5 * float(wanted.var(0).mean()) and errors[1] < 0.05 * errors[0]


def test_the_principal_components_and_their_mean_by_hand() -> None:
    # Three outputs: the first two move together, the third hardly moves around 5, and the weights say nothing of this.
    layer = nn.Linear(3, 3)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(3))
        layer.bias.zero_()
    outputs = LayerOutputs(
        torch.tensor([0.0, 0.0, 5.0]), torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.01]])
    )
    chain = chain_of(layer, 0.34, outputs=outputs)
    with torch.no_grad():
        found = chain(torch.tensor([[2.0, 2.0, 5.0], [1.0, -1.0, 4.0]]))
    # Along (1, 1, 0) all is kept; across it nothing, and the third output is its mean.
    torch.testing.assert_close(found, torch.tensor([[2.0, 2.0, 5.0], [0.0, 0.0, 5.0]]), rtol=0, atol=1e-5)


def test_outputs_of_another_width_are_passed_over() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(16, 16), torch.randn(4, 16)
    with torch.no_grad():
        expected = chain_of(layer, 0.5)(x)
        assert torch.equal(chain_of(layer, 0.5, outputs=LayerOutputs(torch.zeros(8), torch.eye(8)))(x), expected)


# -- cp that does not converge ----------------------------------------------------------------------------------------


def test_cp_is_the_same_every_time() -> None:
    conv = nn.Conv2d(16, 16, 3)
    first, second = (chain_of(conv, 0.125, "cp").state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_weight_of_zeros_stays_one() -> None:
    conv = conv_of(torch.zeros(8, 8, 3, 3))
    close(chain_of(conv, 0.25, "cp"), conv, torch.randn(2, 8, 5, 5))


def test_components_do_not_grow_and_cancel_each_other() -> None:
    # A tensor of rank 3 that tensors of rank 2 come near to without end, their parts growing (De Silva & Lim, 2008).
    a, b = np.linalg.qr(np.random.default_rng(1).standard_normal((4, 2)))[0].T
    weight = sum(np.einsum("i,j,k->ijk", *parts) for parts in ((a, a, b), (a, b, a), (b, a, a)))
    found = cp_module._components(weight, 2)
    assert np.prod([np.linalg.norm(x, axis=0) for x in found], axis=0).max() < 10
    assert np.linalg.norm(np.einsum("ir,jr,kr->ijk", *found) - weight) < np.linalg.norm(weight)


@pytest.mark.parametrize("mode", [0, 1, 2])
@pytest.mark.parametrize("shape", [(5, 7, 3), (3, 7, 5), (4, 4, 4)])
def test_the_product_that_takes_the_time_is_the_one_meant(shape: tuple[int, int, int], mode: int) -> None:
    rng = np.random.default_rng(0)
    tensor, factors = rng.standard_normal(shape), [rng.standard_normal((size, 6)) for size in shape]
    others = [f"{axis}r" for k, axis in enumerate("abc") if k != mode]
    expected = np.einsum(
        f"abc,{','.join(others)}->{'abc'[mode]}r", tensor, *(f for k, f in enumerate(factors) if k != mode)
    )
    np.testing.assert_allclose(cp_module._unfolded_product(tensor, (None, factors), mode), expected)
    weights = rng.standard_normal(6)
    np.testing.assert_allclose(cp_module._unfolded_product(tensor, (weights, factors), mode), expected * weights)


def test_no_matrix_of_inputs_times_outputs_is_made_and_tensorly_is_left_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = tenalg.current_backend()
    weight = np.random.default_rng(0).standard_normal((6, 6, 4))
    expected = cp_module._components(weight, 5)

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("the matrix was multiplied out")

    monkeypatch.setattr("tensorly.tenalg.core_tenalg.mttkrp.khatri_rao", forbidden)
    found = cp_module._components(weight, 5)
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))
    assert tenalg.current_backend() is before


@pytest.mark.parametrize("failure", ["singular", "nan"])
def test_cp_that_does_not_converge_is_an_error(failure: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def parafac(weight: Any, rank: int, **_: Any) -> Any:
        if failure == "singular":
            raise np.linalg.LinAlgError("Singular matrix")
        return np.ones(rank), [np.full((size, rank), np.nan) for size in weight.shape]

    monkeypatch.setattr("tensorly.decomposition.parafac", parafac)
    with pytest.raises(CompressionError, match=r"'layer' cannot be factorized by cp: .*rank 24 does not converge"):
        chain_of(nn.Conv2d(8, 8, 3), 1 / 3, "cp")


# -- ranks ------------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("ins", "outs", "kernel"), [(64, 128, (3, 3)), (64, 32, (1, 1)), (16, 16, (1, 3))])
@pytest.mark.parametrize("name", NAMES)
def test_macs_ratio_is_what_the_factorized_layer_does(
    name: str, ins: int, outs: int, kernel: tuple[int, int], stride: int
) -> None:
    padding = kernel[0] // 2, kernel[1] // 2
    conv, x = nn.Conv2d(ins, outs, kernel, stride, padding), torch.zeros(1, ins, 8, 8)
    layer = take_inventory(nn.Sequential(conv), x).layers["0"]
    whole = sum(count_macs(conv, x).values())
    for ratio in (0.25, 0.5):
        policy = LayerPolicy(rank_ratio=ratio, factorization=name)
        chain = sum(count_macs(factorize(conv, policy, weights=False), x).values())
        assert chain / whole == pytest.approx(factorized_macs_ratio(layer, name, ratio))


def test_macs_ratios_by_hand() -> None:
    inventory = take_inventory(nn.Sequential(nn.Conv2d(32, 64, 3, 2, 1)), torch.zeros(1, 32, 8, 8))
    conv, whole = inventory.layers["0"], 32 * 64 * 9
    # The 1x1 in front works on the map as it comes, four times as many positions.
    assert factorized_macs_ratio(conv, "tucker2", 0.5) == (4 * 32 * 16 + 16 * 32 * 9 + 32 * 64) / whole
    # Half of the full rank, 96, is 48; the first factor has the columns' stride still before it.
    assert factorized_macs_ratio(conv, "spatial_svd", 0.5) == (2 * 32 * 48 * 3 + 48 * 64 * 3) / whole
    # The full rank is 288.
    assert factorized_macs_ratio(conv, "cp", 0.25) == (4 * 32 * 72 + 72 * 9 + 72 * 64) / whole
    linear = take_inventory(nn.Sequential(nn.Linear(64, 32)), torch.zeros(1, 64)).layers["0"]
    assert factorized_macs_ratio(linear, "tucker2", 0.5) == 16 * (64 + 32) / (64 * 32)


# -- energy -----------------------------------------------------------------------------------------------------------


def test_the_rank_that_keeps_a_share_by_hand() -> None:
    energies = torch.tensor([6.0, 3.0, 1.0, 0.0])
    assert [rank_of_energy(energies, share) for share in (0.5, 0.6, 0.61, 0.9, 0.95, 1.0)] == [1, 1, 2, 2, 3, 3]


def test_the_ratio_that_keeps_a_share_of_each_kind() -> None:
    torch.manual_seed(0)
    svd, tucker2, spatial = (FACTORIZATIONS[name] for name in ("svd", "tucker2", "spatial_svd"))
    # Five singular values of 24: the next multiple of eight.
    matrix = (torch.randn(24, 5) @ torch.randn(5, 32))[:, :, None, None]
    assert ratio_of_energy(svd, matrix, 0.9999) == 8 / 24
    # Rank 3 of 4 channels: there is no room for a step.
    assert ratio_of_energy(svd, (torch.randn(4, 3) @ torch.randn(3, 6))[:, :, None, None], 0.9999) == 3 / 4
    # Six of 16 input channels and twelve of 32 output ones: half of both holds them, a quarter of the latter does not.
    core, u, v = torch.randn(12, 6, 3, 3), torch.randn(32, 12), torch.randn(16, 6)
    weight = torch.einsum("rshw,or,is->oihw", core, u, v)
    ratio = ratio_of_energy(tucker2, weight, 0.9999)
    assert tucker2.ranks(16, 32, (3, 3), ratio) == (8, 16)
    weight = torch.einsum("irh,orw->oihw", torch.randn(16, 6, 3), torch.randn(32, 6, 3))
    assert ratio_of_energy(spatial, weight, 0.9999) == 8 / 48
    assert ratio_of_energy(spatial, torch.randn(32, 16, 3, 3), 1.0) == 1.0
    assert FACTORIZATIONS["cp"].energies(weight) == ()


@pytest.mark.parametrize("name", ["svd", "tucker2", "spatial_svd"])
def test_energies_are_squared_singular_values(name: str) -> None:
    torch.manual_seed(0)
    weight = torch.randn(12, 6, 1, 1) if name == "svd" else torch.randn(12, 6, 3, 3)
    made = FACTORIZATIONS[name]
    kernel = tuple(weight.shape[2:])
    for energies, full in zip(made.energies(weight), made.full_ranks(6, 12, (kernel[0], kernel[1])), strict=True):
        assert len(energies) == full and bool((energies.diff() <= 0).all())
        torch.testing.assert_close(energies.sum(), weight.double().square().sum())
