from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from autocompress.config import RunConfig
from autocompress.errors import ConfigError
from autocompress.model.inventory import ChannelGroup, take_inventory
from autocompress.policy import CompressionPolicy, LayerPolicy
from autocompress.space.rank_choices import nearest_choice
from autocompress.space.search_space import (
    SearchSpace,
    SpaceFile,
    bind,
    channel_step,
    configured_space,
    load_space,
    shipped_spaces,
)
from tests.exploration.conftest import layer, make_inventory

EVERYTHING: dict[str, Any] = {
    "pruning": {"ratios": [0, 0.25, 0.5, 0.75]},
    "rank": {"ratios": [1, 0.5, 0.25]},
    "dtype": {"choices": ["dense", "int8"]},
    "blocks": {"remove": True},
}


def bound(int8: bool = True, **parts: Any) -> SearchSpace:
    return SearchSpace(SpaceFile.model_validate(parts), make_inventory(), "bf16", int8=int8)


# -- files ------------------------------------------------------------------------------------------------------------


def test_every_shipped_space_loads_and_binds() -> None:
    assert {"default", "prune-only", "quantize-only", "lowrank-only", "uniform"} <= set(shipped_spaces())
    for name in shipped_spaces():
        assert SearchSpace(load_space(name), make_inventory(), "fp32", int8=True).parameters
        assert load_space(name).description


def test_heads_are_offered_in_any_number_or_not_at_all() -> None:
    inventory = make_inventory()
    heads = ChannelGroup(
        "qkv", 3, ("qkv",), ("proj",), {"proj": 8}, heads={"qkv": (0, 1, 2) * 24, "proj": (0, 1, 2) * 8}
    )
    inventory = replace(inventory, groups={**inventory.groups, "qkv": heads})

    def allowed_choices(**pruning: Any) -> SearchSpace:
        file = SpaceFile.model_validate({"pruning": {"ratios": [0, 0.25, 0.5, 0.75], **pruning}})
        return SearchSpace(file, inventory, "fp32", int8=True)

    # 3, 2 (of 2.25 and of 1.5, to even) and 1 (of 0.75).
    assert allowed_choices().parameters["prune/qkv"] == (0, 1 / 3, 2 / 3)
    assert allowed_choices(round_to=16).parameters["prune/qkv"] == (0, 1 / 3, 2 / 3)
    assert "prune/qkv" not in allowed_choices(heads=False).parameters
    assert "prune/c0" in allowed_choices(heads=False).parameters


def test_an_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"'prune_only'.* Did you mean 'prune-only'.* \.yaml file works too"):
        load_space("prune_only")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("prunning: {}", "unknown key 'prunning'.* Did you mean 'pruning'"),
        ("pruning: {ratio: [0.5]}", "unknown key 'pruning.ratio'.* Did you mean 'ratios'"),
        ("pruning: {ratios: [1.5]}", r"pruning\.ratios: pruning ratios are fractions of channels removed"),
        ("rank: {ratios: [0]}", r"rank\.ratios: rank ratios are fractions of the rank kept"),
        ("rank: {ratios: [1.5]}", r"rank\.ratios: .*in \(0, 1\]; no rank is above the full one"),
        ("rank: {energy: [99]}", r"rank\.energy: energies are shares of the squared singular values kept, in \(0, 1\]"),
        ("rank: {methods: [tucker]}", r"rank\.methods: unknown factorization 'tucker'\. Did you mean 'tucker2'"),
        ("rank: {methods: []}", r"rank\.methods"),
        ("rank: {method: [cp]}", r"unknown key 'rank.method'.* Did you mean 'methods'"),
        ("{uniform: true, rank: {energy: [0.9]}}", r"rank\.energy gives every layer its own ranks"),
        ("dtype: {choices: [int3]}", r"dtype\.choices"),
        ("pruning: {round_to: 0}", r"pruning\.round_to"),
        ("importance: taylr", r"importance: unknown importance 'taylr'\. Did you mean 'taylor'"),
        ("a: [", "space.yaml"),
        ("- 1", "space.yaml"),
    ],
)
def test_a_bad_file_names_itself_and_the_key(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "space.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=said) as caught:
        load_space(str(path))
    assert str(path) in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no\.yaml does not exist"):
        load_space(str(tmp_path / "no.yaml"))


# -- binding ----------------------------------------------------------------------------------------------------------


def test_parameters_are_named_by_what_they_change_and_start_with_doing_nothing() -> None:
    parameters = bound(**EVERYTHING).parameters
    assert parameters["block/b0"] == ("keep", "remove")
    assert parameters["prune/c0"] == (0, 0.25, 0.5, 0.75)
    assert parameters["rank/c0"] == (1.0, 0.5, 0.25)
    assert parameters["dtype/head"] == ("dense", "int8")
    assert "rank/head" not in parameters and "prune/head" not in parameters


def test_include_and_exclude_are_shell_patterns() -> None:
    space = bound(pruning={"ratios": [0, 0.5], "include": ["c*"], "exclude": ["c[13]"]})
    assert list(space.parameters) == ["prune/c0", "prune/c2", "prune/c4"]


def test_int8_is_not_offered_where_the_engine_has_none() -> None:
    space = bound(int8=False, **EVERYTHING)
    assert not [name for name in space.parameters if name.startswith("dtype/")]
    with pytest.raises(ConfigError, match=r"leaves nothing to choose.*inspect"):
        bound(int8=False, dtype={"choices": ["dense", "int8"]})


def test_a_forced_choice_is_always_done() -> None:
    space = bound(dtype={"choices": ["int8"]}, pruning={"ratios": [0]})
    assert set(space.parameters.values()) == {("int8",)}
    assert len(space.policy({}).int8_layers) == 6


@pytest.mark.parametrize(("channels", "step"), [(3, 8), (63, 8), (64, 16), (255, 16), (256, 32), (2048, 32)])
def test_channel_steps(channels: int, step: int) -> None:
    assert channel_step(channels) == step


@pytest.mark.parametrize("channels", [1, 4, 8, 12, 32, 100, 512])
def test_pruned_widths_are_on_a_step_and_never_empty(channels: int) -> None:
    inventory = make_inventory()
    groups = {"c0": replace(inventory.groups["c0"], channels=channels)}
    ratios = [0, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99]
    file = SpaceFile.model_validate({"pruning": {"ratios": ratios}, "dtype": {"choices": ["dense", "int8"]}})
    space = SearchSpace(file, replace(inventory, groups=groups), "fp32", int8=True)
    kept = [channels * (1 - float(r)) for r in space.parameters.get("prune/c0", (0.0,))]
    assert kept[0] == channels and len(set(kept)) == len(kept)
    assert all(k >= 1 and (round(k) % channel_step(channels) == 0 or round(k) == channels) for k in kept)


def test_round_to_may_be_fixed() -> None:
    space = bound(pruning={"ratios": [0, 0.1, 0.2], "round_to": 1})
    assert space.parameters["prune/c0"] == (0, 3 / 32, 6 / 32)


def test_ranks_that_cannot_pay_are_not_offered() -> None:
    # Of a 1x1 convolution with as many channels in as out, half of the rank already costs what the layer does.
    inventory = replace(make_inventory(), layers={"p": layer("p", kernel=(1, 1), kind="pointwise")})
    file = SpaceFile.model_validate({"rank": {"ratios": [1, 0.75, 0.5, 0.25]}})
    assert SearchSpace(file, inventory, "fp32", int8=True).parameters == {"rank/p": (1.0, 0.25)}


def test_factorizations_are_offered_where_they_cut_arithmetic() -> None:
    every = ["tucker2", "spatial_svd", "cp"]
    layers = {
        "c0": layer("c0"),
        "point": layer("point", kernel=(1, 1), kind="pointwise"),
        "deep": layer("deep", kind="depthwise", factorizable=False),
    }
    file = SpaceFile.model_validate({"rank": {"ratios": [1, 0.5, 0.25], "methods": every}})
    space = SearchSpace(file, replace(make_inventory(), layers=layers), "fp32", int8=True)
    # Half of the full rank of spatial SVD costs what the layer does, and that of CP more.
    assert space.parameters == {
        "rank/c0": (1.0, 0.5, 0.25, "spatial_svd 0.25", "cp 0.25"),
        # A matrix has one low-rank form.
        "rank/point": (1.0, 0.25),
    }
    assert space.policy({"rank/c0": "spatial_svd 0.25", "rank/point": 0.25}).layers == {
        "c0": LayerPolicy(rank_ratio=0.25, factorization="spatial_svd"), "point": LayerPolicy(rank_ratio=0.25),
    }  # fmt: skip
    assert space.skipped == {f"rank/deep ({m})": "a depthwise layer has no low-rank form" for m in every}
    assert space.narrowed({"rank/c0": (1.0, "cp 0.25")}).parameters["rank/c0"] == (1.0, "cp 0.25")


def test_what_a_factorization_is_not_offered_for_is_named() -> None:
    file = SpaceFile.model_validate({"rank": {"ratios": [1, 0.5], "methods": ["tucker2", "cp"], "include": ["c1"]}})
    space = SearchSpace(file, make_inventory(), "fp32", int8=True)
    assert space.parameters == {"rank/c1": (1.0, 0.5)}
    assert space.skipped == {"rank/c1 (cp)": "no rank that was asked for cuts its multiply-accumulates"}


def test_ranks_by_energy() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(32, 32, 3), nn.Flatten(), nn.Linear(32 * 36, 64))
    with torch.no_grad():
        # Eight of 32 channels on either side, and twelve of 64 singular values, of which four are tiny.
        model[0].weight.copy_(
            torch.einsum("rshw,or,is->oihw", torch.randn(8, 8, 3, 3), torch.randn(32, 8), torch.randn(32, 8))
        )
        u, v = torch.linalg.qr(torch.randn(64, 64))[0], torch.linalg.qr(torch.randn(1152, 64))[0]
        model[2].weight.copy_((u[:, :12] * torch.tensor([1.0] * 8 + [0.01] * 4)) @ v[:, :12].T)
    inventory = take_inventory(model, torch.randn(2, 32, 8, 8))
    file = SpaceFile.model_validate(
        {"rank": {"energy": [0.9, 0.99999, 0.95], "methods": ["tucker2", "cp", "spatial_svd"]}}
    )
    space = bind(file, model, inventory, "fp32", ())
    # 0.9 and 0.95 give the same rank of the linear layer. CP has no singular values.
    assert space.parameters["rank/2"] == (1.0, 16 / 64, 8 / 64)
    first, second, *others = space.parameters["rank/0"]
    assert (first, second) == (1.0, 8 / 32) and all(str(c).startswith("spatial_svd 0.") for c in others)
    assert space.skipped == {"rank/0 (cp)": "no rank that was asked for cuts its multiply-accumulates"}
    narrowed = space.narrowed({"rank/2": (1.0, 8 / 64)})
    assert narrowed.parameters["rank/0"] == space.parameters["rank/0"]


# -- policies ---------------------------------------------------------------------------------------------------------


def test_choices_become_a_policy() -> None:
    policy = bound(**EVERYTHING).policy(
        {"prune/c0": 0.5, "rank/c4": 0.25, "dtype/c4": "int8", "dtype/head": "int8", "block/b1": "remove"}
    )
    assert policy == CompressionPolicy(
        "bf16", {"c0": 0.5}, {"c4": LayerPolicy("int8", 0.25), "head": LayerPolicy("int8")}, ("b1",)
    )
    assert bound(**EVERYTHING).policy({}) == CompressionPolicy("bf16")


def test_what_is_said_of_layers_in_removed_blocks_is_dropped() -> None:
    space = bound(**EVERYTHING)
    inside = {"prune/c1": 0.5, "rank/c1": 0.5, "dtype/c2": "int8", "block/b0": "remove"}
    assert space.policy(inside) == space.policy({"block/b0": "remove"}) == CompressionPolicy("bf16", {}, {}, ("b0",))


def test_a_uniform_space_has_one_parameter_a_kind() -> None:
    space = bound(uniform=True, **EVERYTHING)
    assert space.parameters == {
        "prune/*": (0, 0.25, 0.5, 0.75),
        "rank/*": (1.0, 0.5, 0.25),
        "dtype/*": ("dense", "int8"),
    }
    policy = space.policy({"prune/*": 0.5, "rank/*": 1.0, "dtype/*": "int8"})
    assert policy.pruning == {f"c{i}": 0.5 for i in range(5)} and len(policy.int8_layers) == 6
    space = bound(uniform=True, rank={"ratios": [1, 0.25], "methods": ["cp", "spatial_svd"]})
    assert space.parameters == {"rank/*": (1.0, "cp 0.25", "spatial_svd 0.25")}
    policy = space.policy({"rank/*": "spatial_svd 0.25"})
    assert policy.layers == {f"c{i}": LayerPolicy(rank_ratio=0.25, factorization="spatial_svd") for i in range(5)}


def test_the_hash_tells_spaces_apart() -> None:
    assert bound(**EVERYTHING).hash == bound(**EVERYTHING).hash
    assert len({bound(**EVERYTHING).hash, bound(False, **EVERYTHING).hash, bound(uniform=True, **EVERYTHING).hash}) == 3


def test_everywhere_sets_a_kind_to_the_nearest_of_what_is_offered() -> None:
    space = bound(**EVERYTHING)
    choices = space.everywhere(prune=0.6, dtype="int8")
    assert choices.keys() == space.parameters.keys()
    assert choices["prune/c0"] == 0.5 and choices["dtype/c0"] == "int8" and choices["rank/c0"] == 1.0
    assert space.policy(space.everywhere()) == CompressionPolicy("bf16")


def test_nearest_choice() -> None:
    assert nearest_choice((0.0, 0.5), 0.4) == 0.5
    assert nearest_choice(("dense", "int8"), "int8") == "int8"
    assert nearest_choice(("dense",), "int8") == "dense"
    ranks = (1.0, 0.5, 0.25, "cp 0.25", "cp 0.125")
    assert nearest_choice(ranks, 0.3) == 0.25 and nearest_choice(ranks, 0.9) == 1.0
    assert nearest_choice(ranks, "cp 0.1") == "cp 0.125" and nearest_choice(ranks, "cp 0.9") == 1.0
    # Of a layer that has none of its kind, another.
    assert nearest_choice((1.0, 0.5), "cp 0.4") == 0.5 and nearest_choice((1.0, "cp 0.25"), 0.25) == "cp 0.25"


# -- narrowed ---------------------------------------------------------------------------------------------------------


def test_a_narrowed_space_offers_what_is_left_and_no_more() -> None:
    space = bound(**EVERYTHING)
    left = space.narrowed({"prune/c0": (0.0, 0.5), "rank/c0": [1.0], "dtype/head": ("dense",), "prune/nobody": (0.0,)})
    assert left.parameters["prune/c0"] == (0.0, 0.5)
    assert "rank/c0" not in left.parameters and "dtype/head" not in left.parameters
    assert left.parameters["prune/c1"] == space.parameters["prune/c1"]
    assert left.policy(left.everywhere(rank=0.25, dtype="int8")).layer("c0") == LayerPolicy("int8")
    # The nearest of what is left.
    assert left.policy(left.everywhere(prune=0.75)).pruning["c0"] == 0.5


def test_narrowing_changes_the_hash_and_leaves_that_of_a_whole_space_alone() -> None:
    space = bound(**EVERYTHING)
    allowed_choices = {"prune/c0": (0.0, 0.5)}
    assert space.narrowed(allowed_choices).hash not in (space.hash, space.narrowed({"prune/c1": (0.0, 0.5)}).hash)
    assert space.narrowed(allowed_choices).hash == bound(**EVERYTHING).narrowed(dict(allowed_choices)).hash
    same = {"prune/c0": space.every["prune/c0"], "prune/nobody": (0.0,)}
    assert space.narrowed({}).hash == space.narrowed(same).hash == space.hash


def test_choices_that_are_not_there_are_passed_over() -> None:
    space = bound(**EVERYTHING)
    assert space.narrowed({"prune/c0": (0.0, 0.33, 0.5)}).parameters["prune/c0"] == (0.0, 0.5)
    assert space.narrowed({"prune/c0": (0.33,)}).parameters == space.parameters


def test_a_uniform_space_is_narrowed_per_layer() -> None:
    space = bound(uniform=True, **EVERYTHING).narrowed({"prune/c0": (0.0, 0.75), "dtype/c1": ("dense",)})
    assert space.parameters["prune/*"] == (0, 0.25, 0.5, 0.75)
    policy = space.policy({"prune/*": 0.5, "dtype/*": "int8"})
    assert policy.pruning["c0"] == 0.75 and policy.pruning["c1"] == 0.5
    assert "c1" not in policy.int8_layers and "c0" in policy.int8_layers


def test_a_space_narrowed_to_nothing_is_refused() -> None:
    space = bound(dtype={"choices": ["dense", "int8"]})
    with pytest.raises(ConfigError, match="leaves nothing to choose"):
        space.narrowed(dict.fromkeys(space.every, ("dense",)))


def test_2_4_sparsity_is_offered_where_the_device_skips_zeros() -> None:
    file = SpaceFile.model_validate({"sparsity": {"choices": ["2:4", "none"], "exclude": ["c0"]}, **EVERYTHING})
    inventory = make_inventory()
    without = SearchSpace(file, inventory, "fp16", int8=True)
    assert not any(name.startswith("sparsity/") for name in without.parameters)
    space = SearchSpace(file, inventory, "fp16", int8=True, sparse=True)
    allowed_choices = {name: choices for name, choices in space.parameters.items() if name.startswith("sparsity/")}
    # Not for what is excluded, nor for layers that have no low-rank form: depthwise ones, and the head here.
    assert set(allowed_choices) == {f"sparsity/c{i}" for i in range(1, 5)} and set(allowed_choices.values()) == {
        ("none", "2:4")
    }
    policy = space.policy({"sparsity/c1": "2:4", "dtype/c1": "int8"})
    assert policy.layers["c1"] == LayerPolicy("int8", 1.0, "2:4") and policy.sparse_layers == ("c1",)
    assert space.narrowed({"sparsity/c2": ("none",)}).parameters.keys() == space.parameters.keys() - {"sparsity/c2"}
    uniform = SearchSpace(file.model_copy(update={"uniform": True}), inventory, "fp16", int8=True, sparse=True)
    assert uniform.parameters["sparsity/*"] == ("none", "2:4")


# -- the run file -----------------------------------------------------------------------------------------------------


def test_the_run_file_may_name_another_importance() -> None:
    assert configured_space(RunConfig(space="prune-only")).importance == "magnitude"
    assert configured_space(RunConfig(space="prune-only", importance="apoz")).importance == "apoz"
    with pytest.raises(ConfigError, match=r"Unknown importance 'apox'\. Did you mean 'apoz'"):
        configured_space(RunConfig(importance="apox"))
