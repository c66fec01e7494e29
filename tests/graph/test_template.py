"""An edited graph computes what the compressed torch model does, in ONNX Runtime; what cannot be edited is refused."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx_ir as ir
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from autocompress.compress import CompressionContext, apply_policy, rewrite
from autocompress.compress.quantization import QuantizationRange, activation_ranges, calibrate, quantization_mode
from autocompress.compress.smoothing import divisors, undivided
from autocompress.graph.export import save_onnx, to_onnx
from autocompress.graph.input_division import divide_inputs
from autocompress.graph.qdq import insert_qdq
from autocompress.graph.template import GraphTemplate
from autocompress.model.inventory import Inventory, take_inventory
from autocompress.policy import CompressionPolicy, LayerPolicy
from autocompress.tasks.cifar_models import CIFAR_MODELS
from tests import networks
from tests.compress.test_shapes import Flattened, Twice, random_policy

onnxruntime = pytest.importorskip("onnxruntime")


class Chain(nn.Module):
    """Three blocks with identity shortcuts, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.blocks = nn.Sequential(*(networks.BasicBlock(16, 16) for _ in range(3)))
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(functional.relu(self.stem(x))).mean((2, 3)))


class Everything(nn.Module):
    """Channels that become tokens, a norm that reads no convolution, a bias of one element, a learned scale."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.BatchNorm2d(3)
        self.conv = nn.Conv2d(3, 24, 3, padding=1)
        self.before = nn.BatchNorm2d(24)
        self.next = nn.Conv2d(24, 16, 3, 2, 1)
        self.act = nn.PReLU()
        self.tokens, self.more = nn.Linear(16, 24), nn.Linear(24, 16, bias=False)
        self.norm = nn.LayerNorm(16)
        self.scale = nn.Parameter(torch.tensor([0.3]))
        self.fc = nn.Linear(16, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(functional.relu(self.conv(self.first(x))))
        x = self.act(self.next(x)).flatten(2).transpose(1, 2)
        x = x + self.scale * self.more(functional.gelu(self.tokens(x)))
        return self.fc(self.norm(x).mean(1))


class ReadTwice(nn.Module):
    """What a convolution gives is read by a batch-norm and by something else, so the norm cannot be folded."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1)
        self.bn = nn.BatchNorm2d(16)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.fc((self.bn(x) + x.tanh()).mean((2, 3)))


class EndsInBlock(nn.Module):
    """The last block's output is the network's."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.block = networks.BasicBlock(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.stem(x))


class Slopes(nn.Module):
    """A slope of its own for each channel, after a convolution and after a linear layer; a shortcut past one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first = nn.Conv2d(3, 16, 3, padding=1), nn.PReLU(16)
        self.conv, self.second = nn.Conv2d(16, 16, 3, padding=1), nn.PReLU(16)
        self.hidden, self.third, self.fc = nn.Linear(16, 24), nn.PReLU(24), nn.Linear(24, 5)
        with torch.no_grad():
            for act in (self.first, self.second, self.third):
                act.weight.uniform_(-0.5, 0.9, generator=torch.Generator().manual_seed(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self.stem(x))
        x = (x + self.second(self.conv(x))).mean((2, 3))
        return self.fc(self.third(self.hidden(x)))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "plain": networks.Plain,
    "residual": networks.Residual,
    "mobile": networks.Mobile,
    "concat": networks.Concat,
    "tokens": networks.Tokens,
    "flattened": Flattened,
    "twice": Twice,
    "chain": Chain,
    "everything": Everything,
    "read twice": ReadTwice,
    "slopes": Slopes,
    "resnet20": CIFAR_MODELS["resnet20"],
}


class Known:
    """A model, its inventory and its templates; each made once."""

    _made: ClassVar[dict[str, Known]] = {}

    def __init__(self, name: str) -> None:
        self.model = rewrite(networks.randomize(MODELS[name]()))
        self.inventory: Inventory = take_inventory(self.model, networks.images())
        self._templates: dict[int, GraphTemplate] = {}

    @classmethod
    def get(cls, name: str) -> Known:
        if name not in cls._made:
            cls._made[name] = cls(name)
        return cls._made[name]

    def template(self, batch: int) -> GraphTemplate:
        if batch not in self._templates:
            self._templates[batch] = GraphTemplate(self.model, networks.images(batch), self.inventory.blocks)
        return self._templates[batch]

    def apply(self, policy: CompressionPolicy) -> nn.Module:
        return apply_policy(self.model, policy, CompressionContext(networks.images()))


def run(graph: ir.Model, x: Tensor, folder: Path) -> NDArray[np.float32]:
    save_onnx(graph, folder / "model.onnx")
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    (found,) = session.run(["output"], {"input": x.numpy()})
    return np.asarray(found)


def compare(graph: ir.Model | None, model: nn.Module, batch: int, folder: Path) -> None:
    assert graph is not None
    x = networks.images(batch, seed=7)
    with torch.no_grad(), quantization_mode(model, "off"):
        wanted = model(x).numpy()
    found = run(graph, x, folder)
    assert found.shape == wanted.shape
    np.testing.assert_allclose(found, wanted, atol=1e-4 * max(1.0, float(np.abs(wanted).max())))


@pytest.mark.parametrize(
    ("name", "batch"),
    [*((name, 1) for name in MODELS), *((name, 2) for name in ("residual", "flattened", "everything"))],
)
def test_an_edited_graph_computes_what_the_model_does(name: str, batch: int, tmp_path: Path) -> None:
    base, rng = Known.get(name), random.Random(f"{name} {batch}")
    template = base.template(batch)
    policies = [CompressionPolicy(), *(random_policy(base.inventory, rng) for _ in range(4))]
    for policy in policies:
        model = base.apply(policy)
        before = networks.state(model)
        compare(template.bind(model, policy.removed_blocks), model, batch, tmp_path)
        assert networks.same_state(model, before)


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
def test_int8_layers_are_found_in_the_edited_graph(engine: str, tmp_path: Path) -> None:
    base = Known.get("residual")
    policy = CompressionPolicy(
        pruning={"stem": 0.25, "wider.conv1": 0.5},
        layers={
            "stem": LayerPolicy("int8"),
            "wider.conv1": LayerPolicy("int8"),
            "wider.conv2": LayerPolicy("int8", 0.5),
            "wider.downsample.0": LayerPolicy("int8", 0.5),
            "fc": LayerPolicy("int8", 0.5),
        },
        removed_blocks=("same",),
    )
    model = base.apply(policy)
    calibrate(model, [networks.images(16, seed=9)])
    layers = {name: QuantizationRange(r.scale, r.signed) for name, r in activation_ranges(model).items()}
    assert len(layers) == 8  # two whole layers, chains of three and of two, the first factor of the linear layer
    edited = base.template(2).bind(model, policy.removed_blocks)
    assert edited is not None
    with quantization_mode(model, "off"), undivided(model):
        exported = to_onnx(model, networks.images(2))
    divided = {name: divisor.float().numpy() for name, divisor in divisors(model).items()}
    for graph in (edited, exported):
        divide_inputs(graph, divided)
    x = networks.images(2, seed=5)
    dense = run(copy_of(edited), x, tmp_path)
    for graph in (edited, exported):
        insert_qdq(graph, layers, engine)
    found, wanted = run(edited, x, tmp_path), run(exported, x, tmp_path)
    # A sum on the edge of a step may round to either side.
    assert np.linalg.norm(found - wanted) < 0.3 * np.linalg.norm(dense - wanted)


def copy_of(graph: ir.Model) -> ir.Model:
    return ir.from_proto(ir.to_proto(graph))


def test_nodes_have_names_of_their_own_that_tell_their_layer(tmp_path: Path) -> None:
    base = Known.get("chain")
    layers = {"blocks.1.conv1": LayerPolicy(rank_ratio=0.5), "fc": LayerPolicy(rank_ratio=0.5)}
    model = base.apply(CompressionPolicy(layers=layers, removed_blocks=("blocks.0",)))
    template = base.template(1)
    graph = template.bind(model, ["blocks.0"])
    assert graph is not None
    names = [node.name for node in graph.graph]
    assert None not in names and len(set(names)) == len(names)
    told: dict[str, int] = {}
    for node in graph.graph:
        if (layer := template.layer_of(node.name or "")) is not None:
            assert node.op_type in ("Conv", "Gemm")
            told[layer] = told.get(layer, 0) + 1
    there = {name for name in base.inventory.layers if not name.startswith("blocks.0.")}
    assert told == {name: {"blocks.1.conv1": 3, "fc": 2}.get(name, 1) for name in there}
    assert template.layer_of("nothing") is None
    save_onnx(graph, tmp_path / "model.onnx")
    saved = ir.load(tmp_path / "model.onnx")
    assert all(not node.metadata_props for node in saved.graph)
    assert not saved.metadata_props and not saved.graph.metadata_props
    kept = [node.name for node in saved.graph]
    assert len(set(kept)) == len(kept)
    # Neither does the exporter's knowledge of the source leave.
    assert b".py" not in (tmp_path / "model.onnx").read_bytes()


def test_what_is_left_out_leaves_nothing_behind() -> None:
    base = Known.get("chain")
    model = base.apply(CompressionPolicy(removed_blocks=("blocks.0", "blocks.1", "blocks.2")))
    graph = base.template(1).bind(model, ["blocks.2", "blocks.0", "blocks.1"])
    assert graph is not None
    assert [node.op_type for node in graph.graph].count("Conv") == 1
    assert not [name for name in graph.graph.initializers if name.startswith("blocks.")]


def test_one_template_gives_independent_graphs_of_the_same_values(tmp_path: Path) -> None:
    base = Known.get("residual")
    template, rng = base.template(1), random.Random(3)
    policies = [random_policy(base.inventory, rng) for _ in range(3)]
    models = [base.apply(policy) for policy in policies]
    graphs = [template.bind(m, p.removed_blocks) for m, p in zip(models, policies, strict=True)]
    for graph, model in zip(graphs, models, strict=True):
        compare(graph, model, 1, tmp_path)
    compare(template.bind(models[0], policies[0].removed_blocks), models[0], 1, tmp_path)


# -- what cannot be edited --------------------------------------------------------------------------------------------


class Padded(nn.Module):
    """Padding said by a word."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding="same")
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).relu().mean((2, 3)))


class Both(nn.Module):
    """A block whose inside is read from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.block = networks.BasicBlock(16, 16)
        self.block.conv1.register_forward_hook(self._keep)
        self.fc = nn.Linear(16, 5)

    def _keep(self, _: nn.Module, __: object, output: Tensor) -> None:
        self.inner = output

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(self.stem(x))
        return self.fc((x + self.inner).mean((2, 3)))


class Shuffled(nn.Module):
    """Channels in groups: their number is in the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1)
        self.next = nn.Conv2d(16, 16, 1)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).relu()
        x = x.view(len(x), 2, -1, 8, 8).transpose(1, 2).flatten(1, 2)
        return self.fc(self.next(x).relu().mean((2, 3)))


class Computed(nn.Module):
    """A constant that is computed from a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1)
        self.gate = nn.Parameter(torch.randn(16, 1, 1))
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc((self.conv(x) * self.gate.sigmoid()).mean((2, 3)))


def bound(
    model: nn.Module, policy: CompressionPolicy, blocks: tuple[str, ...] = ()
) -> tuple[ir.Model | None, nn.Module]:
    model, x = networks.randomize(model), networks.images(1)
    made = apply_policy(model, policy, CompressionContext(x))
    return GraphTemplate(model, x, blocks).bind(made, policy.removed_blocks), made


def test_padding_said_by_a_word_is_edited_but_not_factorized(tmp_path: Path) -> None:
    assert bound(Padded(), CompressionPolicy(layers={"conv": LayerPolicy(rank_ratio=0.5)}))[0] is None
    compare(*bound(Padded(), CompressionPolicy(pruning={"conv": 0.5})), 1, tmp_path)


def test_a_block_that_cannot_be_cut_out_is_refused(tmp_path: Path) -> None:
    template = GraphTemplate(networks.randomize(EndsInBlock()), networks.images(1), ["block"])
    made = apply_policy(
        EndsInBlock(), CompressionPolicy(removed_blocks=("block",)), CompressionContext(networks.images(1))
    )
    assert template.bind(made, ["block"]) is None
    both = networks.randomize(Both())
    template = GraphTemplate(both, networks.images(1), ["block"])
    assert template.bind(both, ["block"]) is None
    compare(template.bind(both), both, 1, tmp_path)
    assert Known.get("chain").template(1).bind(both, ["never heard of"]) is None


def test_numbers_of_channels_in_the_graph_are_only_edited_while_they_hold(tmp_path: Path) -> None:
    assert bound(Shuffled(), CompressionPolicy(pruning={"conv": 0.5}))[0] is None
    policy = CompressionPolicy(pruning={"next": 0.5}, layers={"conv": LayerPolicy(rank_ratio=0.5)})
    compare(*bound(Shuffled(), policy), 1, tmp_path)


def test_what_is_computed_from_weights_is_never_left_as_it_was(tmp_path: Path) -> None:
    graph, model = bound(Computed(), CompressionPolicy())
    if graph is not None:  # an exporter that leaves the computation in the graph can be edited
        compare(graph, model, 1, tmp_path)


def test_a_model_without_the_bases_weights_is_refused() -> None:
    model = networks.randomize(networks.Residual())
    template = GraphTemplate(model, networks.images(1), ["same"])
    model.fc = nn.Identity()  # type: ignore[assignment]
    assert template.bind(model) is None


def test_the_base_is_not_changed() -> None:
    model = networks.randomize(networks.Residual())
    before, kinds = networks.state(model), [type(m) for m in model.modules()]
    GraphTemplate(model, networks.images(1), ["same"]).bind(model)
    assert networks.same_state(model, before) and [type(m) for m in model.modules()] == kinds
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
