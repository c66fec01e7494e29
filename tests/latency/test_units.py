"""Units say what each layer of a compressed network is and stands beside; the hash is the structure's alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from autocompress.compress import CompressionContext, apply_policy
from autocompress.compress.shapes import LayerShape, network_shape
from autocompress.engines.surroundings import Surroundings
from autocompress.engines.template import GraphTemplate
from autocompress.inventory import count_macs, take_inventory
from autocompress.latency.units import Layout, Unit
from autocompress.policy import CompressionPolicy, LayerPolicy
from tests import networks
from tests.latency.made_up import LAYOUT


def layout(model: nn.Module) -> Layout:
    x = networks.images(1)
    inventory = take_inventory(model, networks.images(2))
    template = GraphTemplate(model.eval(), x, inventory.blocks)
    return Layout(inventory, template.surroundings, template.structure)


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
    inventory, around = LAYOUT.inventory, LAYOUT.surroundings
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
    hashes = [Layout(other, around).hash for other in changed]
    hashes.append(Layout(inventory, around, "another graph").hash)
    hashes.append(Layout(inventory, {**around, "c1": replace(around["c1"], ops=("Gelu",))}).hash)
    assert len({LAYOUT.hash, *hashes}) == 1 + len(hashes)
    assert Layout(inventory, dict(reversed(around.items()))).hash == LAYOUT.hash


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


@pytest.mark.parametrize("model", [networks.Residual, networks.Mobile, networks.Tokens])
def test_multiply_accumulates_are_those_of_the_compressed_model(model: type[nn.Module]) -> None:
    base, x = networks.randomize(model()), networks.images(2)
    inventory = take_inventory(base, x)
    whole = Layout(inventory, {})
    ranks = {name: LayerPolicy(rank_ratio=0.5) for name, layer in inventory.layers.items() if layer.kind == "linear"}
    policy = CompressionPolicy(pruning=dict.fromkeys(inventory.groups, 0.5), layers=ranks)
    made = apply_policy(base, policy, CompressionContext(x))
    assert sum(unit.macs for unit in whole.units(policy)) == sum(count_macs(made, x).values())


def test_the_chains_of_factors() -> None:
    unit = LAYOUT.units(CompressionPolicy())[2]
    assert unit.chain == ((32, 64, 9),)
    assert unit._replace(ranks=(8, 16)).chain == ((32, 8, 1), (8, 16, 9), (16, 64, 1))
    assert unit._replace(ranks=(8, 16)).macs == unit.positions * (32 * 8 + 8 * 16 * 9 + 16 * 64)
    assert unit._replace(kind="linear", area=1, ranks=(8,)).chain == ((32, 8, 1), (8, 64, 1))
    assert unit._replace(kind="depthwise", in_channels=64).chain == ((1, 64, 9),)


def test_shares_of_int8_around_a_layer(residual: Layout) -> None:
    dense = by_name(residual, CompressionPolicy("bf16"))
    assert all((u.inputs_int8, u.outputs_int8, u.int8) == (0, 0, False) for u in dense.values())
    # wider.conv1 and the downsample both read the sum of stem's result and same.conv2's.
    around = residual.surroundings
    assert set(around["wider.conv1"].before) == {"stem", "same.conv2"} and around["wider.conv1"].readers == 2
    assert set(around["same.conv2"].after) == {"wider.conv1", "wider.downsample.0"}
    half = by_name(residual, int8("same.conv2", "wider.conv1"))
    assert half["wider.conv1"].int8 and half["wider.conv1"].inputs_int8 == 0.5
    assert half["same.conv2"].outputs_int8 == 0.5 and half["wider.downsample.0"].inputs_int8 == 0.5
    assert half["same.conv1"].outputs_int8 == 1.0 and not half["same.conv1"].int8
    every = by_name(residual, int8(*residual.inventory.layers))
    assert every["stem"].inputs_int8 == 0.0 and every["fc"].outputs_int8 == 0.0
    assert all(u.inputs_int8 == 1.0 for name, u in every.items() if name != "stem")


def test_layers_of_removed_blocks_are_gone_and_share_nothing(residual: Layout) -> None:
    policy = replace(int8("stem"), removed_blocks=("same",))
    found = by_name(residual, policy)
    assert set(found) == {name for name in residual.inventory.layers if not name.startswith("same.")}
    # Of the two that fed it, one is gone.
    assert found["wider.conv1"].inputs_int8 == 1.0


def test_shares_have_no_more_digits_than_a_table_keeps(residual: Layout) -> None:
    stem = by_name(residual, int8("same.conv1", "wider.conv1"))["stem"]
    assert stem.outputs_int8 == 0.6667 == float(f"{stem.outputs_int8:.7g}")


def test_one_unit_by_itself_is_the_one_in_the_network(residual: Layout) -> None:
    policy = CompressionPolicy(
        "bf16", {"stem": 0.25, "wider.conv1": 0.5},
        {"wider.conv1": LayerPolicy("int8"), "wider.conv2": LayerPolicy("int8", 0.5), "fc": LayerPolicy("dense", 0.5)},
    )  # fmt: skip
    shapes = network_shape(residual.inventory, policy).layers
    for unit in residual.units(policy):
        alone = residual.unit(
            unit.layer, shapes[unit.layer], inputs_int8=unit.inputs_int8, outputs_int8=unit.outputs_int8
        )
        assert alone == unit
    assert residual.unit("nowhere", LayerShape(1, 1, (), "int8"), inputs_int8=0, outputs_int8=0) is None


def test_layers_that_stand_alike_have_one_role_and_others_do_not() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(),
                          *(part for _ in range(3) for part in (nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())),
                          nn.Conv2d(8, 8, 3, padding=1))  # fmt: skip
    torch.manual_seed(0)
    roles = {unit.layer: unit.role for unit in layout(model).units(CompressionPolicy())}
    assert roles["2"] == roles["4"] == roles["6"] and len({roles["0"], roles["2"], roles["8"]}) == 3


def test_a_layer_without_surroundings_stands_alone() -> None:
    bare = Layout(LAYOUT.inventory, {})
    units = bare.units(int8("c1", "c2"))
    assert all((u.inputs_int8, u.outputs_int8) == (0.0, 0.0) for u in units)
    assert Surroundings() == Surroundings((), (), (), 1)
