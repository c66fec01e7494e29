"""Heads of each form: found, removed, judged, rebuilt, exported."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from autocompress.compress import IMPORTANCES, CompressionContext, Evidence, Transform, apply_policy, score_channels
from autocompress.compress.heads import HeadPruning
from autocompress.compress.quantization import activation_ranges, calibrate, quantization_mode
from autocompress.compress.shapes import network_shape
from autocompress.compress.thresholds import threshold_policy
from autocompress.engines import get_engine
from autocompress.engines.base import EngineOptions
from autocompress.graph.builder import GraphBuilder, Ranges
from autocompress.graph.export import save_onnx
from autocompress.graph.layout import Layout
from autocompress.graph.template import GraphTemplate
from autocompress.model.attention import head_axes, keep_heads
from autocompress.model.inventory import Inventory, count_macs, take_inventory
from autocompress.policy import CompressionPolicy, LayerPolicy
from autocompress.recipes.prune import _widths
from autocompress.recovery.reconstruction import Reconstruction
from tests.attention_networks import FORMS, HEADS, SIZE, WIDTH, make, text
from tests.compress.contract import TransformContract


@dataclass(frozen=True)
class Known:
    model: nn.Module
    inputs: Tensor
    inventory: Inventory

    @property
    def heads(self) -> list[str]:
        return [name for name, group in self.inventory.groups.items() if group.heads]


@pytest.fixture(scope="module", params=FORMS)
def known(request: pytest.FixtureRequest) -> Known:
    model, inputs = make(request.param)
    return Known(model, inputs, take_inventory(model, inputs))


def test_heads_and_mlp_widths_are_groups_of_every_form(known: Known) -> None:
    groups = known.inventory.groups
    assert [groups[name].channels for name in known.heads] == [HEADS, HEADS]
    widths = [name for name, group in groups.items() if group.channels == 2 * WIDTH]
    assert len(widths) == 2


class TestHeadPruning(TransformContract):
    @pytest.fixture
    def transform(self) -> Transform:
        return HeadPruning()

    @pytest.fixture
    def policy(self) -> CompressionPolicy:
        return CompressionPolicy(pruning={"blocks.0.attn.qkv": 0.5})

    @pytest.fixture
    def unknown(self) -> CompressionPolicy:
        return CompressionPolicy(pruning={"nowhere": 0.5})

    @pytest.fixture
    def model(self) -> nn.Module:
        return make("fused")[0]

    @pytest.fixture
    def context(self) -> CompressionContext:
        return CompressionContext(make("fused")[1])


def silenced(model: nn.Module, name: str, gone: list[int]) -> nn.Module:
    """Return a copy in which nobody reads these heads."""
    model = copy.deepcopy(model)
    axis = head_axes(model)[name]
    with torch.no_grad():
        for layer, heads in axis.read.items():
            for column, head in enumerate(heads):
                if head in gone:
                    model.get_submodule(layer).weight[:, column] = 0  # type: ignore[index]
    return model


def test_the_pruned_model_gives_what_the_whole_one_gives_with_these_heads_silenced(known: Known) -> None:
    name = known.heads[1]
    scores = {name: torch.tensor([3.0, 1.0, 4.0, 2.0])}
    before = copy.deepcopy(known.model.state_dict())
    pruned = HeadPruning().apply(
        known.model, CompressionPolicy(pruning={name: 0.5}), CompressionContext(known.inputs, scores)
    )
    with torch.no_grad():
        found, whole = pruned(known.inputs), known.model(known.inputs)
        wanted = silenced(known.model, name, [1, 3])(known.inputs)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert (whole - wanted).abs().max() > 1e-3
    for key, tensor in known.model.state_dict().items():
        torch.testing.assert_close(tensor, before[key], rtol=0, atol=0)
    axis = head_axes(pruned)[name]
    assert axis.heads == HEADS - 2
    for layer, heads in axis.made.items():
        assert pruned.get_submodule(layer).out_features == len(heads)


def test_one_head_stays_whatever_the_ratio(known: Known) -> None:
    policy = CompressionPolicy(pruning=dict.fromkeys(known.heads, 0.99))
    pruned = apply_policy(known.model, policy, CompressionContext(known.inputs))
    assert [axis.heads for axis in head_axes(pruned).values()] == [1, 1]


def test_a_head_scores_the_sum_of_its_channels_by_hand(known: Known) -> None:
    name = known.heads[0]
    found = score_channels(known.model, known.inputs, known.inventory, "magnitude")[name]
    axis = head_axes(known.model)[name]
    wanted = torch.zeros(HEADS)
    for layer, heads in axis.made.items():
        for row, head in enumerate(heads):
            wanted[head] += known.model.get_submodule(layer).weight[row].detach().square().sum()  # type: ignore[index]
    for layer, heads in axis.read.items():
        for column, head in enumerate(heads):
            wanted[head] += known.model.get_submodule(layer).weight[:, column].detach().square().sum()  # type: ignore[index]
    torch.testing.assert_close(found, wanted / wanted.mean(), rtol=1e-4, atol=1e-5)


def test_the_mean_activation_of_a_head_is_that_of_what_the_output_projection_reads(known: Known) -> None:
    name = known.heads[0]
    axis = head_axes(known.model)[name]
    (layer, heads), seen = next(iter(axis.read.items())), []

    def outputs() -> Any:
        with torch.no_grad():
            yield known.model(known.inputs)

    handle = known.model.get_submodule(layer).register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    list(outputs())
    handle.remove()
    means = seen[0].abs().flatten(0, -2).mean(0)
    wanted = torch.zeros(HEADS).index_add_(0, torch.tensor(heads), means)
    found = score_channels(known.model, known.inputs, known.inventory, "activation_mean", Evidence(outputs=outputs))
    torch.testing.assert_close(found[name], wanted / wanted.mean(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", IMPORTANCES)
def test_every_importance_scores_heads(known: Known, method: str) -> None:
    def losses(batch_size: int) -> Iterator[Tensor]:
        for batch in known.inputs.split(batch_size):
            yield known.model(batch).square().mean()

    def outputs() -> Iterator[Tensor]:
        with torch.no_grad():
            yield known.model(known.inputs)

    scores = score_channels(known.model, known.inputs, known.inventory, method, Evidence(losses, outputs))
    for name in known.heads:
        assert scores[name].shape == (HEADS,)
        assert bool((scores[name] > 0).all())
        # Of four samples all entropies are alike.
        assert method == "activation_entropy" or len(scores[name].unique()) > 1


def test_the_first_order_of_a_head_by_hand(known: Known) -> None:
    name = known.heads[1]

    def losses(_: int) -> Iterator[Tensor]:
        yield known.model(known.inputs).square().mean()

    found = score_channels(known.model, known.inputs, known.inventory, "taylor", Evidence(losses))[name]
    model = copy.deepcopy(known.model)
    model(known.inputs).square().mean().backward()
    wanted, axis = torch.zeros(HEADS), head_axes(model)[name]
    for layers, dimension in ((axis.made, 0), (axis.read, 1)):
        for layer, heads in layers.items():
            weight = model.get_parameter(f"{layer}.weight")
            assert weight.grad is not None
            each = (weight * weight.grad).abs().sum(1 - dimension).detach()
            wanted.index_add_(0, torch.tensor(heads), each)
    torch.testing.assert_close(found, wanted / wanted.mean(), rtol=1e-3, atol=1e-4)


def everything(known: Known) -> CompressionPolicy:
    """Return a policy with heads, MLP widths, int8 and a low rank."""
    groups, layers = known.inventory.groups, {}
    for name in known.heads:
        layers |= dict.fromkeys(groups[name].producers, LayerPolicy("int8"))
        layers |= dict.fromkeys(groups[name].consumers, LayerPolicy("int8"))
    first = groups[known.heads[0]]
    layers[first.producers[0]] = LayerPolicy("int8", 0.5)
    layers[first.consumers[0]] = LayerPolicy("dense", 0.5)
    pruning = {name: 0.5 if group.channels == 2 * WIDTH else 0.25 for name, group in groups.items() if (
        group.heads or group.channels == 2 * WIDTH
    )}  # fmt: skip
    return CompressionPolicy("fp32", pruning, layers)


def test_units_of_the_predictor_have_the_widths_that_are_left(known: Known) -> None:
    policy = CompressionPolicy(pruning={known.heads[0]: 0.5})
    model = apply_policy(known.model, policy, CompressionContext(known.inputs))
    whole, layout = known.inventory.macs, Layout(known.inventory)
    assert (
        layout.macs(policy) == sum(count_macs(model, known.inputs).values()) < whole == layout.macs(CompressionPolicy())
    )


def test_steps_count_heads(known: Known) -> None:
    scores = score_channels(known.model, known.inputs, known.inventory, "magnitude")
    policy = threshold_policy(scores, known.inventory, 0.5, scope="layer", multiple=16)
    assert [policy.pruning[name] for name in known.heads] == [0.5, 0.5]
    model = apply_policy(known.model, policy, CompressionContext(known.inputs, scores))
    left = _widths(take_inventory(model, known.inputs), known.inventory)
    assert [left[name] for name in known.heads] == [HEADS / 2, HEADS / 2]


def test_shapes_by_arithmetic_are_those_of_the_model(known: Known) -> None:
    policy = everything(known)
    model = apply_policy(known.model, policy, CompressionContext(known.inputs))
    shapes = network_shape(known.inventory, policy)
    assert shapes.groups[known.heads[0]] == HEADS - 1
    for name, shape in shapes.layers.items():
        module = model.get_submodule(name)
        parts = list(module) if isinstance(module, nn.Sequential) else [module]
        outs, ins = parts[-1].weight.shape[0], parts[0].weight.shape[1]
        assert (shape.in_channels, shape.out_channels) == (ins, outs), name
    assert sum(count_macs(model, known.inputs).values()) < known.inventory.macs
    query = known.inventory.groups[known.heads[1]].producers[0]
    assert shapes.layers[query].out_channels in ((HEADS - 1) * SIZE, 3 * (HEADS - 1) * SIZE)


def test_a_stored_model_is_rebuilt_from_policy_and_weights(known: Known) -> None:
    policy = CompressionPolicy(pruning=dict.fromkeys(known.heads, 0.5))
    scores = score_channels(known.model, known.inputs, known.inventory, "magnitude")
    made = apply_policy(known.model, policy, CompressionContext(known.inputs, scores))
    again = apply_policy(known.model, policy, CompressionContext(known.inputs))
    again.load_state_dict(made.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(again(known.inputs), made(known.inputs))


def test_what_is_left_is_fitted(known: Known) -> None:
    policy = CompressionPolicy(pruning=dict.fromkeys(known.heads, 0.5))
    model = apply_policy(known.model, policy, CompressionContext(known.inputs))
    with torch.no_grad():
        wanted = known.model(known.inputs)
        before = (model(known.inputs) - wanted).square().mean()
        fitted = Reconstruction(known.model, known.inventory, known.inputs, torch.float32).apply(model, policy, {})
        after = (model(known.inputs) - wanted).square().mean()
    assert fitted >= 1
    assert after < before


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
def test_engines_agree_with_torch(known: Known, engine: str, tmp_path: Any) -> None:
    policy = everything(known)
    scores = score_channels(known.model, known.inputs, known.inventory, "magnitude")
    model = apply_policy(known.model, policy, CompressionContext(known.inputs, scores))
    calibrate(model, [known.inputs])
    one = known.inputs[:1]
    builder = GraphBuilder(known.model, one, known.inventory, engine)
    graph = builder.build(model, Ranges(activation_ranges(model)))
    save_onnx(graph.model, tmp_path / "model.onnx")
    runtime = get_engine(engine)
    file = runtime.build(tmp_path / "model.onnx", EngineOptions("fp32", 1, 1), tmp_path / "model")
    with torch.no_grad():
        wanted = model(one).numpy()
    with runtime.open(file) as runner:
        found = runner.infer(one.float().numpy())
    assert np.abs(found - wanted).max() < 0.05 * np.abs(wanted).max()


@pytest.mark.parametrize("kind", ["Roberta", "DistilBert"])
def test_other_text_models_have_heads(kind: str) -> None:
    torch.manual_seed(0)
    settings = {"dim": WIDTH, "n_heads": HEADS, "hidden_dim": WIDTH, "n_layers": 2} if kind == "DistilBert" else {}
    model, inputs = text(kind, **settings)
    groups = take_inventory(model.eval(), inputs).groups
    assert sum(group.channels == HEADS for group in groups.values() if group.heads) == 2


def test_windows_lose_their_heads_bias_too() -> None:
    swin = pytest.importorskip("timm.models.swin_transformer")
    torch.manual_seed(0)
    model = swin.SwinTransformer(
        img_size=16, patch_size=4, window_size=2, embed_dim=WIDTH, depths=(2,), num_heads=(HEADS,), num_classes=5
    ).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("relative_position_bias_table"):
            nn.init.normal_(parameter)
    inputs = torch.rand(2, 3, 16, 16)
    inventory = take_inventory(model, inputs)
    (name, _) = (name for name, group in inventory.groups.items() if group.heads)
    scores = {name: torch.tensor([3.0, 1.0, 4.0, 2.0])}
    pruned = HeadPruning().apply(model, CompressionPolicy(pruning={name: 0.5}), CompressionContext(inputs, scores))
    with torch.no_grad():
        torch.testing.assert_close(pruned(inputs), silenced(model, name, [1, 3])(inputs), rtol=1e-4, atol=1e-5)


class Interleaved(nn.Module):
    """Query, key and value of one head after those of another: not what the fused form takes them to be."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        samples, length, _ = x.shape
        q, k, v = self.qkv(x).reshape(samples, length, self.num_heads, 3, SIZE).permute(3, 0, 2, 1, 4).unbind(0)
        x = (q @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.proj(x.transpose(1, 2).reshape(samples, length, -1))


class OneHead(Interleaved):
    """Attention with one head."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 1


@pytest.mark.parametrize(
    ("module", "reason"), [(Interleaved, "does not compute"), (OneHead, "one head")], ids=["interleaved", "one"]
)
def test_what_cannot_lose_heads_is_left_alone_and_named(module: type[Interleaved], reason: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), module(), nn.Linear(WIDTH, 5)).eval()
    if module is OneHead:
        model[1].forward = lambda x: model[1].proj(model[1].qkv(x)[..., :WIDTH])  # type: ignore[method-assign]
    found = take_inventory(model, torch.rand(2, 3, WIDTH))
    assert not any(group.heads for group in found.groups.values())
    assert reason in found.skipped["1.qkv (heads)"]


def test_heads_leave_in_place_and_keep_their_order() -> None:
    model, inputs = make("fused")
    name, axis = next(iter(head_axes(model).items()))
    before = model.get_submodule(name).weight.detach().clone()  # type: ignore[operator]
    keep_heads(model, axis, [1, 3])
    kept = [row for row in range(3 * WIDTH) if (row % WIDTH) // SIZE in (1, 3)]
    torch.testing.assert_close(model.get_submodule(name).weight.detach(), before[kept])  # type: ignore[operator]
    with torch.no_grad():
        model(inputs)


def test_graphs_with_fewer_heads_are_edited(known: Known) -> None:
    one = known.inputs[:1]
    if one.dim() == 2:
        pytest.skip("the exporter folds the embeddings of BERT's positions, so its graphs are always exported")
    template = GraphTemplate(known.model, one, known.inventory.blocks)
    for ratio in (0.25, 0.75):
        policy = replace(everything(known), pruning=dict.fromkeys(known.heads, ratio))
        model = apply_policy(known.model, policy, CompressionContext(known.inputs))
        graph = template.bind(model)
        assert graph is not None
        with torch.no_grad(), quantization_mode(model, "off"):
            wanted = model(one).numpy()
        session = onnxruntime.InferenceSession(ir.to_proto(graph).SerializeToString())
        np.testing.assert_allclose(session.run(None, {"input": one.float().numpy()})[0], wanted, rtol=1e-3, atol=1e-4)
