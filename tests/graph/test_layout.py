"""Units say what each layer of a compressed network is and stands beside; the hash is the structure's alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
from torch import nn

from autocompress.compress import CompressionContext, apply_policy
from autocompress.compress.factorizations import Factor
from autocompress.graph.layout import Layout, Unit
from autocompress.graph.template import GraphTemplate
from autocompress.graph.tensor_dtypes import Context
from autocompress.model.inventory import count_macs, take_inventory
from autocompress.policy import FACTORIZATIONS, CompressionPolicy, LayerPolicy
from autocompress.prediction.layer_features import coordinates
from tests import networks
from tests.prediction.made_up import LAYOUT


def layout(model: nn.Module) -> Layout:
    x = networks.images(1)
    inventory = take_inventory(model, networks.images(2))
    template = GraphTemplate(model.eval(), x, inventory.blocks)
    return Layout(inventory, template.wiring, template.structure)


@pytest.fixture(scope="module")
def residual() -> Layout:
    return layout(networks.randomize(networks.Residual()))


def int8(*names: str) -> CompressionPolicy:
    return CompressionPolicy("bf16", layers={name: LayerPolicy("int8") for name in names})


def by_name(found: Layout, policy: CompressionPolicy) -> dict[str, Unit]:
    return {unit.layer: unit for unit in found.units(policy)}


# -- identity ---------------------------------------------------------------------------------------------------------


def test_the_hash_is_of_the_structure_and_not_of_the_weights(residual: Layout) -> None:
    assert len(residual.hash) == 16 and int(residual.hash, 16) >= 0
    assert layout(networks.randomize(networks.Residual(), seed=9)).hash == residual.hash
    assert layout(networks.randomize(networks.Plain())).hash != residual.hash


def test_a_change_of_anything_that_costs_time_changes_the_hash() -> None:
    inventory, wired = LAYOUT.inventory, LAYOUT.wiring
    layers, groups = dict(inventory.layers), dict(inventory.groups)
    changed = [
        replace(inventory, layers={**layers, "c1": replace(layers["c1"], out_channels=40)}),
        replace(inventory, layers={**layers, "c1": replace(layers["c1"], kernel=(5, 5))}),
        replace(inventory, layers={**layers, "c1": replace(layers["c1"], macs=1)}),
        replace(inventory, groups={**groups, "c1": replace(groups["c1"], consumers=())}),
        replace(inventory, groups={**groups, "c1": replace(groups["c1"], multiples={"c2": 2})}),
        replace(inventory, blocks={}),
        replace(inventory, blocks={"b": replace(inventory.blocks["b"], layers=("c2", "c3"))}),
    ]
    hashes = [Layout(other, wired).hash for other in changed]
    hashes.append(Layout(inventory, wired, "another graph").hash)
    hashes.append(Layout(inventory, wired, placement="another way").hash)
    assert len({LAYOUT.hash, *hashes}) == 1 + len(hashes)


# -- units ------------------------------------------------------------------------------------------------------------


def test_every_layer_of_the_uncompressed_network_in_order(residual: Layout) -> None:
    units = residual.units(CompressionPolicy("bf16"))
    assert [unit.layer for unit in units] == list(residual.inventory.layers)
    for unit, layer in zip(units, residual.inventory.layers.values(), strict=True):
        assert (unit.kind, unit.in_channels, unit.out_channels) == (layer.kind, layer.in_channels, layer.out_channels)
        assert unit.macs == layer.macs and unit.ranks == () and not unit.int8
    assert {u.layer: u.positions for u in units} == {
        "stem": 64, "same.conv1": 64, "same.conv2": 64, "wider.conv1": 16, "wider.conv2": 16,
        "wider.downsample.0": 16, "fc": 1,
    }  # fmt: skip


@pytest.mark.parametrize("factorization", FACTORIZATIONS)
@pytest.mark.parametrize("model", [networks.Residual, networks.Mobile, networks.Tokens])
def test_multiply_accumulates_are_those_of_the_compressed_model(model: type[nn.Module], factorization: str) -> None:
    base, x = networks.randomize(model()), networks.images(2)
    inventory = take_inventory(base, x)
    whole = Layout(inventory)
    ranks = {
        name: LayerPolicy(rank_ratio=0.5, factorization=factorization)
        for name, layer in inventory.layers.items()
        if layer.factorizable
    }
    policy = CompressionPolicy(pruning=dict.fromkeys(inventory.groups, 0.5), layers=ranks)
    made = apply_policy(base, policy, CompressionContext(x, weights=False))
    assert sum(unit.macs for unit in whole.units(policy)) == sum(count_macs(made, x).values())


def test_the_chains_of_factors() -> None:
    unit = LAYOUT.units(CompressionPolicy())[2]
    assert unit.chain == (Factor(32, 64, 9),)
    assert unit._replace(kind="depthwise", in_channels=64).chain == (Factor(1, 64, 9),)

    def factorized(name: str, ratio: float) -> Unit:
        return LAYOUT.units(CompressionPolicy(layers={unit.layer: LayerPolicy("dense", ratio, factorization=name)}))[2]

    tucker2 = factorized("tucker2", 0.25)
    assert (tucker2.ranks, tucker2.factorization) == ((8, 16), "tucker2")
    assert tucker2.chain == (Factor(32, 8, 1), Factor(8, 16, 9), Factor(16, 64, 1))
    assert tucker2.macs == unit.positions * (32 * 8 + 8 * 16 * 9 + 16 * 64)
    spatial = factorized("spatial_svd", 0.25)
    assert spatial.ranks == (24,) and spatial.chain == (Factor(32, 24, 3), Factor(24, 64, 3))
    cp = factorized("cp", 0.25)
    assert cp.ranks == (72, 72) and cp.chain == (Factor(32, 72, 1), Factor(1, 72, 9), Factor(72, 64, 1))
    # What the predictor sees of them differs, and of those that older tables know it is what it was.
    seen = {name: coordinates(factorized(name, 0.25)) for name in ("tucker2", "spatial_svd", "cp")}
    assert seen["tucker2"][-2:] == [0.0, 0.0] and seen["spatial_svd"][-2:] == [10.0, 0.0]
    assert seen["cp"][-2:] == [0.0, 10.0]


def test_how_the_tensors_around_a_layer_are_kept(residual: Layout) -> None:
    dense = by_name(residual, CompressionPolicy("bf16"))
    # The stem's result is read by same.conv1 and by the sum; that sum's by wider.conv1 and the downsample.
    assert {name: u.context.joins for name, u in dense.items() if u.context.joins} == {
        "stem": 1, "same.conv2": 1, "wider.conv2": 1, "wider.downsample.0": 1,
    }  # fmt: skip
    assert all(u.context[:3] == (0, 0, 0) and u.context.beyond_int8 == 0 and not u.int8 for u in dense.values())
    half = by_name(residual, int8("same.conv2", "wider.conv1"))
    assert half["wider.conv1"].int8 and half["wider.conv1"].context.inputs_int8 == 0.5
    assert half["wider.conv1"].context.siblings_int8 == half["wider.downsample.0"].context.siblings_int8 == 0.5
    # A sum alone reads what same.conv2 gives; beyond it, one of two wants int8.
    assert half["same.conv2"].context[2:] == (0.0, 1, 0.5)
    assert half["same.conv1"].context.outputs_int8 == 1.0 and not half["same.conv1"].int8
    every = by_name(residual, int8(*residual.inventory.layers))
    assert every["stem"].context == (0.0, 1.0, 0.5, 1, 1.0) and every["fc"].context.outputs_int8 == 0.0
    assert all(u.context.inputs_int8 == u.context.siblings_int8 == 1.0 for n, u in every.items() if n in ("fc",))


def test_a_removed_block_leaves_its_input_to_whoever_read_its_result(residual: Layout) -> None:
    policy = replace(int8("stem", "wider.conv1", "wider.downsample.0"), removed_blocks=("same",))
    found = by_name(residual, policy)
    assert set(found) == {name for name in residual.inventory.layers if not name.startswith("same.")}
    # No sum reads the stem's result any more: it is kept in int8.
    assert found["stem"].context == (0.0, 1.0, 1.0, 0, 0.0)
    assert found["wider.conv1"].context.inputs_int8 == found["wider.conv1"].context.siblings_int8 == 1.0
    assert residual.units(policy) == residual.units(policy)


def test_a_layer_that_the_graph_does_not_have_stands_alone() -> None:
    units = Layout(LAYOUT.inventory).units(int8("c1", "c2"))
    assert all(unit.context == Context() for unit in units) and sum(unit.int8 for unit in units) == 2


def test_a_grouped_convolution_has_its_true_positions() -> None:
    grouped = layout(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=4)))
    first, second = grouped.units(CompressionPolicy())
    assert first.positions == second.positions == 64 and (first.groups, second.groups) == (1, 4)
    assert second.macs == grouped.inventory.layers["1"].macs == 64 * 8 * 2 * 9
