"""Least-squares reconstruction: what is left takes over what was removed."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from autocompress.compress import CompressionContext, apply_policy, rewrite
from autocompress.compress.pruning import kept_indices
from autocompress.compress.quantization import observing
from autocompress.errors import ConfigError
from autocompress.model.inventory import take_inventory
from autocompress.policy import CompressionPolicy, LayerPolicy
from autocompress.recovery import reconstruction as module
from autocompress.recovery.recalibration import fast_dtype, recalibrate
from autocompress.recovery.reconstruction import Reconstruction
from autocompress.recovery.training_free import TrainingFreeCompressor
from autocompress.tasks.cifar_models import ResNet


class Twice(nn.Module):
    """Hidden units 0 and 1 are the same, 2 is another."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 3)
        self.second = nn.Linear(3, 2)
        with torch.no_grad():
            self.first.weight.copy_(torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]))
            self.first.bias.zero_()
            self.second.weight.copy_(torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]))
            self.second.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(functional.relu(self.first(x)))  # type: ignore[no-any-return]


def fitted(model: nn.Module, policy: CompressionPolicy, inputs: Tensor, scores: dict[str, Tensor]) -> nn.Module:
    inventory = take_inventory(model, inputs[:2])
    made = apply_policy(model, policy, CompressionContext(inputs[:2], scores))
    Reconstruction(model, inventory, inputs, torch.float32).apply(made, policy, scores)
    return made


def test_the_twin_takes_over_what_a_removed_channel_did(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_RIDGE", 1e-6)
    model, inputs = Twice().eval(), torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
    scores = {"first": torch.tensor([0.0, 1.0, 2.0])}
    made = fitted(model, CompressionPolicy(pruning={"first": 1 / 3}), inputs, scores)
    # Unit 0 is gone; unit 1 now counts for both: 1 + 2 and 4 + 5.
    expected = torch.tensor([[3.0, 3.0], [9.0, 6.0]])
    assert torch.allclose(made.get_submodule("second").weight, expected, atol=1e-3)
    assert torch.allclose(made(inputs), model(inputs), atol=1e-3)


def test_the_mean_of_what_is_gone_goes_to_the_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_RIDGE", 1e-6)
    model = Twice().eval()
    with torch.no_grad():
        model.first.weight[2].zero_()
        model.first.bias[2] = 2.0
    inputs = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
    made = fitted(model, CompressionPolicy(pruning={"first": 1 / 3}), inputs, {"first": torch.tensor([1.0, 1.0, 0.0])})
    assert torch.allclose(made.get_submodule("second").bias, torch.tensor([6.0, 12.0]), atol=1e-3)


def small() -> nn.Module:
    torch.manual_seed(0)
    model = rewrite(ResNet(1))
    recalibrate(model, [torch.randn(64, 3, 32, 32)])
    return model.eval()


POLICIES = {
    "pruned": CompressionPolicy(pruning={"layer1.0.conv1": 0.5, "layer2.0.conv1": 0.5, "conv1": 0.25}),
    "factorized": CompressionPolicy(layers={"layer3.0.conv2": LayerPolicy(rank_ratio=0.25)}),
    "without a block": CompressionPolicy(removed_blocks=("layer1.0",)),
    "of all kinds": CompressionPolicy(
        pruning={"layer2.0.conv1": 0.5}, layers={"layer3.0.conv1": LayerPolicy("int8", 0.5)},
        removed_blocks=("layer1.0",),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", POLICIES)
def test_a_reconstructed_network_is_nearer_to_the_original(name: str) -> None:
    model = small()
    generator = torch.Generator().manual_seed(1)
    inputs, others = torch.randn(2, 48, 3, 32, 32, generator=generator)
    inventory = take_inventory(model, inputs[:2])
    off = []
    for reconstruct in (False, True):
        made = TrainingFreeCompressor(model, inventory, {}, inputs[:2], [inputs], reconstruct=reconstruct)
        with torch.no_grad():
            off.append(float((made.model(POLICIES[name])(others) - model(others)).square().mean()))
    assert off[1] < 0.9 * off[0], off


def test_nothing_is_fitted_where_nothing_changed() -> None:
    model, inputs = small(), torch.randn(16, 3, 32, 32)
    made = Reconstruction(model, take_inventory(model, inputs[:2]), inputs, torch.float32)
    untouched = copy.deepcopy(model)
    assert made.apply(untouched, CompressionPolicy(), {}) == 0
    # The first layers see what they always saw: the last block is all that is fitted, and what comes after it.
    policy = CompressionPolicy(pruning={"layer3.0.conv1": 0.5})
    pruned = apply_policy(model, policy, CompressionContext(inputs[:2]))
    before = {n: p.clone() for n, p in pruned.named_parameters()}
    count = made.apply(pruned, policy, {})
    changed = {n.removesuffix(".weight") for n, p in pruned.named_parameters() if not torch.equal(p, before[n])}
    assert 0 < count <= 3 and "layer3.0.conv2" in changed
    assert not any(name.startswith(("conv1", "layer1", "layer2", "layer3.0.conv1")) for name in changed)


@pytest.mark.parametrize("name", POLICIES)
def test_one_pass_fits_moves_statistics_and_observes(name: str) -> None:
    model = small()
    inputs = torch.randn(48, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    made = TrainingFreeCompressor(model, take_inventory(model, inputs[:2]), {}, inputs[:2], [inputs]).model(
        POLICIES[name]
    )
    # The last batch-norm reads what every change before it has moved, and no channel of its own was removed.
    assert not torch.equal(made.layer3[0].bn2.running_mean, model.layer3[0].bn2.running_mean)
    again = copy.deepcopy(made)
    # What layers saw in that pass is what they see in the finished network.
    fast = torch.autocast("cpu", fast_dtype(), enabled=fast_dtype() != torch.float32)
    with torch.no_grad(), fast, observing(again):
        again(inputs)
    for key, expected in again.state_dict().items():
        assert torch.equal(made.state_dict()[key], expected), key
    assert not any(m.training for m in made.modules())


def test_compressed_networks_keep_the_layout_that_is_fast() -> None:
    model = small().to(memory_format=torch.channels_last)
    inputs = torch.randn(8, 3, 32, 32)
    shots = TrainingFreeCompressor(model, take_inventory(model, inputs[:2]), {}, inputs[:2], [inputs])
    for policy in POLICIES.values():
        weights = [p for p in shots.model(policy).parameters() if p.dim() == 4]
        assert all(w.is_contiguous(memory_format=torch.channels_last) for w in weights)


def test_precision_of_products_is_the_callers_afterwards() -> None:
    before = torch.get_float32_matmul_precision()
    with pytest.raises(RuntimeError), module._products(torch.bfloat16):
        assert torch.get_float32_matmul_precision() == "medium"
        raise RuntimeError
    with module._products(torch.float32):
        assert torch.get_float32_matmul_precision() == before
    assert torch.get_float32_matmul_precision() == before


def test_sparse_reused_and_shared_layers_are_left_alone() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(8, 8)
            self.again = nn.Linear(8, 8)
            self.shared = nn.Linear(8, 8)
            self.twin = nn.Linear(8, 8)
            self.twin.weight = self.shared.weight
            self.sparse = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = self.again(self.again(functional.relu(self.first(x))))
            return self.sparse(self.twin(self.shared(x)))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    model, inputs = Tied().eval(), torch.randn(64, 8)
    policy = CompressionPolicy(
        layers={"first": LayerPolicy(rank_ratio=0.25), "sparse": LayerPolicy(sparsity="2:4")},
    )
    made = copy.deepcopy(model)
    with torch.no_grad():
        made.first.weight.mul_(0.5)
    before = copy.deepcopy(made.state_dict())
    assert Reconstruction(model, take_inventory(model, inputs[:2]), inputs, torch.float32).apply(made, policy, {}) == 1
    assert [n for n, t in made.state_dict().items() if not torch.equal(t, before[n])] == ["first.weight", "first.bias"]


def test_layers_with_a_forward_of_their_own_are_left_alone() -> None:
    class Same(nn.Conv2d):
        """Pads what it reads itself, as TensorFlow does."""

        def forward(self, input: Tensor) -> Tensor:
            return super().forward(functional.pad(input, (0, 1, 0, 1)))

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), Same(8, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    inputs = torch.randn(16, 3, 8, 8)
    made = copy.deepcopy(model)
    with torch.no_grad():
        made[0].weight.mul_(0.5)
    policy = CompressionPolicy(layers={"0": LayerPolicy(rank_ratio=0.5)})
    before = copy.deepcopy(made.state_dict())
    Reconstruction(model, take_inventory(model, inputs[:2]), inputs, torch.float32).apply(made, policy, {})
    changed = {n for n, t in made.state_dict().items() if not torch.equal(t, before[n])}
    assert "0.weight" in changed and not {n for n in changed if n.startswith("2.")}


def test_a_layer_of_which_a_part_is_cut_off_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = Twice().eval(), torch.randn(64, 2)
    made = Reconstruction(model, take_inventory(model, inputs[:2]), inputs, torch.float32)
    policy = CompressionPolicy(pruning={"first": 1 / 3})
    pruned = apply_policy(model, policy, CompressionContext(inputs[:2]))
    # As in GhostNet: the group has more channels than one of the layers that make it.
    monkeypatch.setattr(made, "_kept", lambda *_: [1, 3])
    weight = pruned.get_submodule("first").weight.clone()
    made.apply(pruned, policy, {})
    assert torch.equal(pruned.get_submodule("first").weight, weight)


def test_linear_layers_over_maps_are_fitted_along_their_last_axis(monkeypatch: pytest.MonkeyPatch) -> None:
    # As in networks that keep channels last; the map is as high as the layer is wide.
    monkeypatch.setattr(module, "_RIDGE", 1e-6)
    model, inputs = Twice().eval(), torch.randn(16, 2, 5, 2, generator=torch.Generator().manual_seed(0))
    scores = {"first": torch.tensor([0.0, 1.0, 2.0])}
    made = apply_policy(model, CompressionPolicy(pruning={"first": 1 / 3}), CompressionContext(inputs[:2], scores))
    inventory = take_inventory(model, inputs[:2])
    assert Reconstruction(model, inventory, inputs, torch.float32).apply(
        made, CompressionPolicy(pruning={"first": 1 / 3}), scores
    )
    assert torch.allclose(made(inputs), model(inputs), atol=1e-3)


def test_one_sample_is_not_fitted_to_and_none_is_said() -> None:
    model, inputs = small(), torch.randn(1, 3, 32, 32)
    inventory = take_inventory(model, torch.randn(2, 3, 32, 32))
    made = TrainingFreeCompressor(model, inventory, {}, inputs, [inputs]).model(POLICIES["pruned"])
    assert bool(made(inputs).isfinite().all())
    with pytest.raises(ConfigError, match="no calibration data"):
        TrainingFreeCompressor(model, inventory, {}, inputs, [])


def test_both_forms_of_the_fit_agree() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs, residual = torch.randn(6, 8, generator=generator), torch.randn(6, 3, generator=generator)
    ridge = module._RIDGE * inputs.square().sum() / 6
    expected = torch.linalg.solve(inputs.T @ inputs + ridge * torch.eye(8), inputs.T @ residual)
    assert torch.allclose(module._ridge(inputs, residual), expected, atol=1e-5)


def test_kept_channels_are_the_important_ones_in_order() -> None:
    assert kept_indices(4, 0.5, torch.tensor([3.0, 0.0, 1.0, 2.0])).tolist() == [0, 3]
    assert kept_indices(4, 0.5, None).tolist() == [0, 1]


# -- what layers give, for those that are factorized ------------------------------------------------------------------


class Kinds(nn.Module):
    """A layer with a bias, one without but with a batch-norm after it, and one with neither."""

    def __init__(self) -> None:
        super().__init__()
        self.biased = nn.Linear(6, 8)
        self.normed, self.norm = nn.Linear(8, 8, bias=False), nn.BatchNorm1d(8)
        self.plain = nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.biased(x))
        return self.plain(functional.relu(self.norm(self.normed(x))))  # type: ignore[no-any-return]


def test_what_factorized_layers_gave_of_the_channels_that_are_kept() -> None:
    torch.manual_seed(0)
    model, inputs = Kinds().eval(), torch.randn(256, 6)
    inventory = take_inventory(model, inputs[:2])
    half = LayerPolicy(rank_ratio=0.5)
    policy = CompressionPolicy(pruning={"biased": 0.25}, layers=dict.fromkeys(("biased", "normed", "plain"), half))
    scores = {"biased": torch.tensor([0.0, 9, 9, 9, 1, 9, 9, 9])}
    found = Reconstruction(model, inventory, inputs, torch.float32).outputs(policy, scores)
    assert found.keys() == {"biased", "normed", "plain"}
    with torch.no_grad():
        biased = model.biased(inputs).double()
        normed = model.normed(model.biased(inputs).relu()).double()
    kept = biased[:, [1, 2, 3, 5, 6, 7]]
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(found["biased"].mean, kept.mean(0), **close)
    torch.testing.assert_close(found["biased"].covariance, torch.cov(kept.T, correction=0), **close)
    torch.testing.assert_close(found["normed"].covariance, torch.cov(normed.T, correction=0), **close)
    with torch.no_grad():
        # Batch-norms normalise by their running statistics, as in the network.
        scaled = model.norm(normed.float()).relu()
        plain = model.plain(scaled).double()
    # Nothing takes the mean of this one.
    torch.testing.assert_close(found["plain"].covariance, plain.T @ plain / 256, **close)
    assert Reconstruction(model, inventory, inputs, torch.float32).outputs(CompressionPolicy(), {}) == {}


@pytest.mark.parametrize("factorization", ["tucker2", "spatial_svd", "cp"])
def test_one_shot_factorizes_by_what_layers_give(factorization: str) -> None:
    # Inputs of which two channels in sixteen are large, and weights that do not tell.
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1)).eval()
    inputs, others = torch.randn(2, 64, 16, 6, 6)
    inputs[:, 2:], others[:, 2:] = inputs[:, 2:] / 20, others[:, 2:] / 20
    inventory = take_inventory(model, inputs[:2])
    policy = CompressionPolicy(layers={"0": LayerPolicy(rank_ratio=0.12, factorization=factorization)})
    off = []
    for reconstruct in (False, True):
        made = TrainingFreeCompressor(model, inventory, {}, inputs[:2], [inputs], reconstruct=reconstruct).model(policy)
        with torch.no_grad():
            off.append(float((made(others) - model(others)).square().mean()))
    assert off[1] < 0.7 * off[0], off
